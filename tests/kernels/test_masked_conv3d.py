"""The reference convolution against loops over taps, written without torch's convolution."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.ops import masked_conv3d

Array = npt.NDArray[np.float64]
Compare = Callable[[str, str, Tensor, Array], None]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    c_in: int = 2
    c_out: int = 4
    grid: tuple[int, int, int] = (5, 6, 7)
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options.update(
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups
        )

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.grid, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )


CASES = [
    pytest.param(Case(), id="plain"),
    pytest.param(Case(padding=(1, 1, 1), c_in=3, c_out=5), id="same-size"),
    pytest.param(Case(batch=1, c_in=1, c_out=1, grid=(3, 3, 3)), id="one-voxel-out"),
    pytest.param(Case(c_in=1, c_out=1, grid=(1, 1, 1), kernel=(1, 1, 1)), id="all-ones"),
    pytest.param(Case(grid=(7, 11, 13), kernel=(1, 1, 1), c_in=3), id="pointwise-prime"),
    pytest.param(Case(grid=(1, 7, 1), kernel=(1, 3, 1), padding=(0, 2, 0)), id="flat"),
    pytest.param(Case(batch=0), id="empty-batch"),
    pytest.param(Case(stride=(2, 2, 2), padding=(1, 1, 1)), id="stride-2"),
    pytest.param(Case(grid=(7, 8, 9), stride=(3, 1, 2), padding=(2, 0, 1)), id="stride-uneven"),
    pytest.param(Case(grid=(7, 7, 8), dilation=(2, 1, 3), padding=(2, 1, 3)), id="dilated"),
    pytest.param(Case(c_in=4, c_out=6, groups=2, padding=(1, 1, 1)), id="groups-2"),
    pytest.param(Case(c_in=4, c_out=4, groups=4, stride=(2, 1, 1)), id="depthwise"),
    pytest.param(
        Case(4, 4, 2, (8, 7, 9), (2, 3, 4), (2, 1, 3), (1, 2, 3), (3, 2, 1), 2), id="everything"
    ),
]
DENSITIES = ["none", "one", "half", "all"]


def make_mask(shape: tuple[int, ...], density: str) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if density == "one":
        mask.view(-1)[mask.numel() // 2] = True
    elif density == "half":
        order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(3))
        mask.view(-1)[order[: mask.numel() // 2]] = True
    elif density == "all":
        mask.fill_(True)
    return mask


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(case.batch, case.c_in, *case.grid, dtype=torch.float64, generator=random)
    weight = torch.randn(
        case.c_out, case.c_in // case.groups, *case.kernel, dtype=torch.float64, generator=random
    )
    bias = torch.randn(case.c_out, dtype=torch.float64, generator=random)
    tensors = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    return tensors[0], tensors[1], tensors[2]


def taps(case: Case) -> list[tuple[tuple[int, int, int], tuple[slice, slice, slice]]]:
    """Each kernel tap with the slices of the padded input that it reads."""
    found = []
    for tap in product(*map(range, case.kernel)):
        at = [t * d for t, d in zip(tap, case.dilation, strict=True)]
        slices = [
            slice(a, a + s * (n - 1) + 1, s)
            for a, s, n in zip(at, case.stride, case.out, strict=True)
        ]
        found.append(((tap[0], tap[1], tap[2]), (slices[0], slices[1], slices[2])))
    return found


def naive(
    case: Case, x: Array, weight: Array, mask: npt.NDArray[np.bool_], bias: Array, g: Array
) -> tuple[Array, Array, Array, Array]:
    """Output, and the gradients of x, weight and bias for the output gradient g."""
    pad = [(0, 0), (0, 0), *((p, p) for p in case.padding)]
    padded = np.pad(x, pad)
    y = np.zeros((case.batch, case.c_out, *case.out))
    dx, dw = np.zeros_like(padded), np.zeros_like(weight)
    c_in, c_out = case.c_in // case.groups, case.c_out // case.groups
    for o, c in product(range(case.c_out), range(c_in)):
        source = o // c_out * c_in + c
        for (i, j, k), (at_d, at_h, at_w) in taps(case):
            if not mask[o, c, i, j, k]:
                continue
            y[:, o] += weight[o, c, i, j, k] * padded[:, source, at_d, at_h, at_w]
            dx[:, source, at_d, at_h, at_w] += weight[o, c, i, j, k] * g[:, o]
            dw[o, c, i, j, k] = (g[:, o] * padded[:, source, at_d, at_h, at_w]).sum()
    y += bias[:, None, None, None]
    inner = tuple(slice(p, p + n) for p, n in zip(case.padding, case.grid, strict=True))
    return y, dx[(slice(None), slice(None), *inner)], dw, g.sum(axis=(0, 2, 3, 4))


def check_case(case: Case, density: str, dtype: torch.dtype, compare: Compare) -> None:
    x, weight, bias = make_inputs(case, dtype)
    mask = make_mask(tuple(weight.shape), density)
    y = masked_conv3d(x, weight, mask, bias, **case.options)
    g = torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(11))
    y.backward(g)
    arrays = [t.detach().double().numpy() for t in (x, weight)]
    exact = naive(
        case, arrays[0], arrays[1], mask.numpy(), bias.detach().double().numpy(), g.double().numpy()
    )
    results = (y, x.grad, weight.grad, bias.grad)
    for direction, result, wanted in zip(
        ("forward", "input", "weight", "bias"), results, exact, strict=True
    ):
        assert result is not None
        compare("masked_conv3d", direction, result, wanted)
    assert weight.grad is not None
    assert torch.equal(weight.grad[~mask], torch.zeros_like(weight.grad[~mask]))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_loops(case: Case, density: str, compare: Compare) -> None:
    check_case(case, density, torch.float64, compare)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_within_tolerance_of_float64(case: Case, compare: Compare) -> None:
    check_case(case, "half", torch.float32, compare)


def test_naive_loops_are_right_where_the_answer_is_known() -> None:
    case = Case(1, 1, 1, (1, 1, 3), (1, 1, 2))
    one = np.ones((1, 1, 1, 1, 2))
    x = np.arange(3.0).reshape(1, 1, 1, 1, 3)
    y, dx, dw, db = naive(case, x, one * [2.0, 3.0], one > 0, np.array([10.0]), one * [1.0, 5.0])
    assert y.ravel().tolist() == [13.0, 18.0]
    assert dx.ravel().tolist() == [2.0, 13.0, 15.0]
    assert dw.ravel().tolist() == [5.0, 11.0]
    assert db.tolist() == [6.0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_pruned_weights_may_hold_anything(poison: float) -> None:
    x, weight, bias = make_inputs(Case(padding=(1, 1, 1)))
    mask = make_mask(tuple(weight.shape), "half")
    clean = torch.where(mask, weight, 0.0).detach().requires_grad_()
    dirty = torch.where(mask, weight, poison).detach().requires_grad_()
    results = []
    for w in (clean, dirty):
        leaf = x.detach().clone().requires_grad_()
        y = masked_conv3d(leaf, w, mask, bias, padding=1)
        y.square().sum().backward()
        assert leaf.grad is not None
        assert w.grad is not None
        results.append((y.detach(), leaf.grad, w.grad))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)


def test_gradient_of_pruned_weights_is_zero_even_if_the_output_gradient_is_nan() -> None:
    x, weight, bias = make_inputs(Case())
    mask = make_mask(tuple(weight.shape), "half")
    y = masked_conv3d(x, weight, mask, bias)
    y.backward(torch.full_like(y, float("nan")))
    assert weight.grad is not None
    assert torch.equal(weight.grad[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    assert bool(weight.grad[mask].isnan().all())


@pytest.mark.parametrize("per_scan", [False, True], ids=["one-mask", "mask-per-scan"])
def test_voxel_mask_zeroes_output_and_gradients(per_scan: bool, compare: Compare) -> None:
    case = Case(padding=(1, 1, 1))
    x, weight, bias = make_inputs(case)
    mask = make_mask(tuple(weight.shape), "half")
    shape = (case.batch, 1, *case.out) if per_scan else case.out
    voxels = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.4
    y = masked_conv3d(x, weight, mask, bias, voxel_mask=voxels, **case.options)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    y.backward(g)

    inside = voxels.expand(case.batch, 1, *case.out).numpy()
    full, dx, dw, db = naive(
        case,
        x.detach().numpy(),
        weight.detach().numpy(),
        mask.numpy(),
        bias.detach().numpy(),
        np.where(inside, g.numpy(), 0.0),
    )
    results = {"forward": y, "input": x.grad, "weight": weight.grad, "bias": bias.grad}
    exact = {"forward": np.where(inside, full, 0.0), "input": dx, "weight": dw, "bias": db}
    for direction, result in results.items():
        assert result is not None
        compare("masked_conv3d", direction, result, exact[direction])
    outside = ~torch.from_numpy(inside.copy()).expand_as(y)
    assert torch.equal(y.detach()[outside], torch.zeros(int(outside.sum()), dtype=torch.float64))


@pytest.mark.parametrize("density", DENSITIES)
def test_gradcheck(density: str) -> None:
    case = Case(1, 2, 2, (3, 4, 3), (2, 2, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), 2)
    x, weight, bias = make_inputs(case)
    mask = make_mask(tuple(weight.shape), density)
    voxels = torch.rand(case.out, generator=torch.Generator().manual_seed(5)) < 0.6

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_conv3d(x, weight, mask, bias, voxel_mask=voxels, **case.options)

    assert torch.autograd.gradcheck(op, (x, weight, bias))
    assert torch.autograd.gradgradcheck(op, (x, weight, bias))


def test_strides_of_the_inputs_do_not_matter() -> None:
    x, weight, bias = make_inputs(Case(padding=(1, 1, 1)))
    mask = make_mask(tuple(weight.shape), "half")
    expected = masked_conv3d(x, weight, mask, bias, padding=1)
    turned = x.detach().transpose(2, 4).contiguous().transpose(2, 4)
    spaced = torch.stack([weight.detach(), -weight.detach()], dim=-1)[..., 0]
    flipped_mask = mask.flip(0).contiguous().flip(0)
    assert not turned.is_contiguous()
    assert not spaced.is_contiguous()
    got = masked_conv3d(turned, spaced, flipped_mask, bias, padding=1)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    last = x.detach().to(memory_format=torch.channels_last_3d)
    got = masked_conv3d(last, weight, mask, bias, padding=1)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_inputs_give_half_outputs(dtype: torch.dtype) -> None:
    x, weight, bias = make_inputs(Case(), dtype)
    mask = make_mask(tuple(weight.shape), "half")
    y = masked_conv3d(x, weight, mask, bias)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    exact = masked_conv3d(x.double(), weight.double(), mask, bias.double())
    # One rounding of the result and of nothing else of that size.
    error = (y.double() - exact).detach().abs().max() / exact.detach().abs().max()
    assert float(error) < torch.finfo(dtype).eps


axis = st.tuples(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2)
)  # size, kernel, stride, padding, dilation


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
@given(
    axes=st.tuples(axis, axis, axis),
    batch=st.integers(0, 2),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    density=st.sampled_from(DENSITIES),
)
def test_drawn_shapes_equal_loops(
    compare: Compare,
    axes: tuple[tuple[int, ...], ...],
    batch: int,
    channels: tuple[int, int, int],
    density: str,
) -> None:
    by_argument = [(values[0], values[1], values[2]) for values in zip(*axes, strict=True)]
    grid, kernel, stride, padding, dilation = by_argument
    c_in, c_out, groups = channels
    case = Case(
        batch, c_in * groups, c_out * groups, grid, kernel, stride, padding, dilation, groups
    )
    assume(min(case.out) >= 1)
    check_case(case, density, torch.float64, compare)
