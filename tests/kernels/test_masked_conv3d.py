"""The reference convolution against loops over taps, written without torch's convolution."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.ops import masked_conv3d
from tests.kernels.convolutions import (
    CASES,
    DENSITIES,
    Case,
    Compare,
    drawn,
    make_inputs,
    make_mask,
    naive,
)


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


@settings(drawn, max_examples=60)
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
