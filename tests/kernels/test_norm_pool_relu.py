"""The fused op against instance norm, max pooling and ReLU of torch in float64."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.errors import ArgumentError, ArgumentTypeError, BackendError
from sparsekit.kernels import dispatch
from sparsekit.models import BrainAgeCNN
from sparsekit.ops import norm_pool_relu

Array = npt.NDArray[np.float64]
Compare = Callable[[str, str, Tensor, Array], None]

# Two channels of this are enough work for two threads.
LARGE = (2, 3, 40, 41, 42)


def torch_sequence(x: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.relu(functional.max_pool3d(functional.instance_norm(x, eps=eps), 2))


def make(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(
    run: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output of `run` and the gradient of x, for a fixed random gradient of the output."""
    x = x.detach().requires_grad_()
    y = run(x)
    grad_y = make(tuple(y.shape), seed=2) if grad_y is None else grad_y
    (grad_x,) = torch.autograd.grad(y, x, grad_y.to(y.dtype))
    return y.detach(), grad_x


def run_cpu(x: Tensor) -> Tensor:
    return norm_pool_relu(x, backend="cpu")


def check(compare: Compare, x: Tensor, run: Callable[[Tensor], Tensor] = run_cpu) -> None:
    exact_y, exact_grad = with_gradient(torch_sequence, x.double())
    y, grad_x = with_gradient(run, x)
    compare("norm_pool_relu", "forward", y, exact_y.numpy())
    compare("norm_pool_relu", "input", grad_x, exact_grad.numpy())


SHAPES = [
    pytest.param((1, 1, 2, 2, 2), id="one-window"),
    pytest.param((2, 3, 4, 4, 4), id="even"),
    pytest.param((1, 2, 3, 5, 9), id="odd"),
    pytest.param((3, 2, 7, 11, 13), id="prime"),
    pytest.param((2, 2, 2, 2, 31), id="flat-dh"),
    pytest.param((2, 2, 17, 2, 3), id="flat-hw"),
    pytest.param((5, 1, 3, 3, 3), id="batch-5"),
    pytest.param((1, 16, 6, 7, 6), id="channels-16"),
    pytest.param(LARGE, id="large"),
    pytest.param((1, 1, 2, 2, 100_003), id="long-lines"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient(shape: tuple[int, ...], backend: str, compare: Compare) -> None:
    check(compare, make(shape) * 3 + 1, lambda x: norm_pool_relu(x, backend=backend))


LAYOUTS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("channels-last", lambda x: x.to(memory_format=torch.channels_last_3d)),
    ("transposed", lambda x: x.transpose(2, 4).contiguous().transpose(2, 4)),
    ("strided", lambda x: x.repeat_interleave(2, 4)[..., ::2]),
    ("offset", lambda x: torch.cat([x[:1], x])[1:]),
    ("cut", lambda x: functional.pad(x, (1, 2, 0, 1, 3, 0))[:, :, 3:, :-1, 1:-2]),
    ("expanded", lambda x: x[:, :1].expand(-1, 3, -1, -1, -1)),
]


@pytest.mark.parametrize("layout", [pytest.param(f, id=name) for name, f in LAYOUTS])
def test_memory_layouts(layout: Callable[[Tensor], Tensor], compare: Compare) -> None:
    check(compare, layout(make((2, 3, 5, 6, 7))))


def test_gradient_in_any_layout() -> None:
    x = make((2, 3, 4, 6, 8))
    grad = make((2, 3, 2, 3, 4), seed=4)
    _, expected = with_gradient(run_cpu, x, grad)
    _, channels_last = with_gradient(run_cpu, x, grad.to(memory_format=torch.channels_last_3d))
    assert torch.equal(channels_last, expected)
    # The gradient of a sum is one number, expanded.
    _, expected = with_gradient(run_cpu, x, torch.ones(2, 3, 2, 3, 4))
    leaf = x.clone().requires_grad_()
    run_cpu(leaf).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


def test_negative_slopes_reach_the_loss_through_a_sum_of_squares(compare: Compare) -> None:
    """The gradient of the output depends on the output here."""

    def gradient(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x)
        return grad

    x = make((2, 2, 6, 5, 7))
    exact = gradient(torch_sequence, x.double())
    compare("norm_pool_relu", "input", gradient(run_cpu, x), exact.numpy())


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_of_equal_voxels_the_first_takes_the_gradient(levels: int, compare: Compare) -> None:
    random = torch.Generator().manual_seed(levels)
    x = torch.randint(0, levels, (3, 4, 7, 8, 9), generator=random).float()
    windows = functional.unfold(x[0, 0, :6, :8, :8].flatten(1)[None, None], (1, 2), stride=(1, 2))
    assert bool((windows[:, 0] == windows[:, 1]).any())
    check(compare, x)


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(8))
def test_ties_of_two_voxels(first: int, second: int) -> None:
    x = torch.zeros(1, 1, 4, 2, 2)
    x[0, 0, :2].view(-1)[[first, second]] = 1.0
    grad = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1)
    _, grad_x = with_gradient(run_cpu, x, grad)
    # The winner's own gradient stands far above the rest, which comes through mean and spread.
    assert int(grad_x.argmax()) == min(first, second)
    assert float(grad_x.max()) > 2 * float(grad_x.flatten().sort().values[-2])


def test_a_constant_channel_gives_zeros() -> None:
    x = make((2, 3, 4, 5, 6))
    x[0, 1] = 0.1
    x[1, 2] = -4.0
    y, grad_x = with_gradient(run_cpu, x)
    exact_y, exact_grad = with_gradient(torch_sequence, x.double())
    for sample, channel in ((0, 1), (1, 2)):
        assert not bool(y[sample, channel].any())
        assert not bool(exact_y[sample, channel].any())
        assert not bool(exact_grad[sample, channel].any())
        assert not bool(grad_x[sample, channel].any())
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 2, 3), (4, 5, 6)], ids=["first", "inside", "last"])
def test_what_is_not_finite_stays_in_its_channel(value: float, at: tuple[int, int, int]) -> None:
    x = make((2, 2, 5, 6, 7))
    x[(0, 1, *at)] = value
    y, grad_x = with_gradient(run_cpu, x)
    for sequence in (torch_sequence(x), with_gradient(torch_sequence, x.double())[0]):
        assert torch.equal(y.isnan(), sequence.isnan())
    assert bool(y[0, 1].isnan().all())
    assert int(y.isnan().sum()) == y[0, 1].numel()
    _, torch_grad = with_gradient(torch_sequence, x)
    assert torch.equal(grad_x.isnan(), torch_grad.isnan())


def test_a_gradient_that_is_not_finite_goes_where_torch_sends_it() -> None:
    x = make((1, 2, 4, 4, 4))
    x[0, 0, :2, :2, :2] -= 9.0
    grad = make((1, 2, 2, 2, 2), seed=3)
    positive = torch_sequence(x) > 0
    for place in (positive, ~positive):
        bad = grad.clone()
        bad[0, 0].view(-1)[place[0, 0].flatten().nonzero()[0]] = float("nan")
        _, grad_x = with_gradient(run_cpu, x, bad)
        _, expected = with_gradient(torch_sequence, x, bad)
        assert torch.equal(grad_x.isnan(), expected.isnan())


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    ("mean", "spread", "corner"),
    [
        pytest.param(1e4, 1.0, None, id="large-mean"),
        pytest.param(-1e4, 1.0, None, id="large-negative-mean"),
        pytest.param(1e4, 1.0, 0.0, id="corner-is-an-outlier"),
        pytest.param(1.0, 1e-4, -3.0, id="small-spread"),
        pytest.param(0.0, 1.0, 1e4, id="outlier-alone"),
        pytest.param(0.0, 1e25, None, id="squares-overflow"),
        pytest.param(0.0, 1e-12, None, id="spread-below-eps"),
    ],
)
def test_no_worse_than_torch_in_float32(mean: float, spread: float, corner: float | None) -> None:
    x = make((2, 2, 11, 12, 13)) * spread + mean
    if corner is not None:
        x[..., 0, 0, 0] = corner
    exact = with_gradient(torch_sequence, x.double())
    ours = with_gradient(run_cpu, x)
    theirs = with_gradient(torch_sequence, x)
    for result, other, reference in zip(ours, theirs, exact, strict=True):
        assert error(result, reference) <= max(1.5 * error(other, reference), 2e-6)


@pytest.mark.parametrize("mean", [1e4, -1e4, 3e5])
def test_a_large_mean_costs_no_digits(mean: float, compare: Compare) -> None:
    check(compare, make((2, 2, 11, 12, 13)) + mean)


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0, 1])
def test_eps(eps: float) -> None:
    x = make((1, 2, 4, 5, 6))
    y = norm_pool_relu(x, eps=eps, backend="cpu")
    torch.testing.assert_close(y.double(), torch_sequence(x.double(), eps), rtol=1e-5, atol=1e-6)


def test_gradient_against_differences() -> None:
    """The formulas themselves, without torch's derivatives."""
    x = make((1, 1, 4, 4, 4)).double()
    grad = make((1, 1, 2, 2, 2), seed=2).double()
    _, got = with_gradient(run_cpu, x.float(), grad)
    step = 1e-6
    expected = torch.zeros(64, dtype=torch.float64)
    for i in range(64):
        change = torch.zeros(64, dtype=torch.float64)
        change[i] = step
        up, down = (torch_sequence(x + s * change.view_as(x)) for s in (1, -1))
        expected[i] = ((up - down) * grad).sum() / (2 * step)
    torch.testing.assert_close(got.double().flatten(), expected, rtol=1e-4, atol=1e-5)


def test_the_input_is_left_alone_and_nothing_is_kept_without_a_gradient() -> None:
    x = make((2, 2, 4, 5, 6))
    before = x.clone()
    with torch.no_grad():
        y = run_cpu(x.requires_grad_())
    assert not y.requires_grad
    assert y.grad_fn is None
    assert torch.equal(y, run_cpu(x))
    with torch.inference_mode():
        assert torch.equal(run_cpu(x), y)
    assert torch.equal(x.detach(), before)


def test_backward_twice_with_a_retained_graph_adds_up() -> None:
    x = make((1, 2, 4, 4, 4)).requires_grad_()
    loss = run_cpu(x).sum()
    loss.backward(retain_graph=True)
    assert x.grad is not None
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


def test_changing_what_backward_needs_raises() -> None:
    x = make((1, 1, 4, 4, 4)).requires_grad_()
    y = run_cpu(x)
    loss = y.sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_raise_on_the_cpu_and_work_on_the_reference() -> None:
    x = make((1, 1, 4, 4, 4), seed=5).requires_grad_()
    (grad,) = torch.autograd.grad(run_cpu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice .*once_differentiable"):
        grad.square().sum().backward()
    y = norm_pool_relu(x, backend="reference")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert bool(second.any())


@pytest.fixture
def calls() -> Iterator[Callable[[], list[tuple[str, str]]]]:
    dispatch.clear_records()
    yield lambda: [(r.backend, r.reason) for r in dispatch.records()]
    dispatch.clear_records()


Calls = Callable[[], list[tuple[str, str]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_take_the_reference(dtype: torch.dtype, calls: Calls) -> None:
    x = make((1, 2, 4, 5, 6)).to(dtype)
    y, grad_x = with_gradient(norm_pool_relu, x)
    expected_y, expected_grad = with_gradient(torch_sequence, x)
    assert y.dtype == grad_x.dtype == dtype
    assert torch.equal(y, expected_y)
    assert torch.equal(grad_x, expected_grad)
    ((backend, reason),) = calls()
    assert backend == "reference"
    assert "need non-empty float32 input" in reason


def test_float32_takes_the_cpu_kernels(calls: Calls) -> None:
    norm_pool_relu(make((1, 2, 4, 5, 6)))
    assert calls() == [("cpu", "the first choice for cpu tensors")]


def test_empty_batch_and_meta(calls: Calls) -> None:
    y, grad_x = with_gradient(norm_pool_relu, torch.ones(0, 2, 4, 5, 6))
    assert y.shape == (0, 2, 2, 2, 3)
    assert grad_x.shape == (0, 2, 4, 5, 6)
    assert calls()[0][0] == "reference"
    y = norm_pool_relu(torch.ones(3, 2, 4, 5, 6, device="meta"))
    assert y.shape == (3, 2, 2, 2, 3)
    assert y.is_meta


# Compiling this at the first call, torch itself uses what it deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_sees_the_reference(calls: Calls) -> None:
    compiled = torch.compile(norm_pool_relu, backend="eager", fullgraph=True)
    x = make((1, 2, 4, 5, 6))
    assert torch.equal(compiled(x), torch_sequence(x))
    assert calls() == []


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_computes_anew() -> None:
    traced: Any = torch.jit.trace(norm_pool_relu, (make((1, 2, 4, 5, 6)),))
    x = make((1, 2, 4, 5, 6), seed=8)
    torch.testing.assert_close(traced(x), torch_sequence(x))


def test_torch_func_sees_the_reference() -> None:
    x = make((3, 2, 4, 5, 6))

    def loss(scan: Tensor) -> Tensor:
        return norm_pool_relu(scan[None]).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss))(x)
    _, expected = with_gradient(lambda t: torch_sequence(t).square().sum(), x, torch.tensor(1.0))
    torch.testing.assert_close(per_sample, expected)
    with pytest.raises(BackendError, match=r"torch\.func"):
        torch.func.vmap(run_cpu)(x[None])


def test_autocast_around_it() -> None:
    x = make((2, 2, 5, 6, 7))
    expected = with_gradient(run_cpu, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradient(norm_pool_relu, x)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))
    conv = nn.Conv3d(2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm_pool_relu(conv(x))
    y.float().sum().backward()
    assert conv.weight.grad is not None
    assert bool(conv.weight.grad.isfinite().all())


REFUSALS = [
    ([1.0], "auto", ArgumentTypeError, "x: expected a Tensor, got list"),
    (torch.ones(2, 4, 4, 4), "auto", ArgumentError, r"x: expected .* got shape \(2, 4, 4, 4\)"),
    (torch.ones(1, 1, 4, 1, 4), "auto", ArgumentError, r"got shape \(1, 1, 4, 1, 4\)"),
    (torch.ones(1, 0, 4, 4, 4), "auto", ArgumentError, r"c >= 1.* got shape \(1, 0, 4, 4, 4\)"),
    (torch.ones(1, 1, 2, 2, 2).int(), "auto", ArgumentTypeError, r"got torch\.int32"),
    (torch.ones(1, 1, 2, 2, 2) + 0j, "auto", ArgumentTypeError, r"got torch\.complex64"),
    (torch.ones(1, 1, 2, 2, 2), "fast", ArgumentError, "backend: expected 'auto', .* got 'fast'"),
    (torch.ones(1, 1, 2, 2, 2), "triton", BackendError, "no 'triton' .* 'cpu', 'reference'"),
    (torch.ones(1, 1, 2, 2, 2).double(), "cpu", BackendError, "'cpu' cannot .* float32 input"),
    (torch.ones(0, 1, 2, 2, 2), "cpu", BackendError, "non-empty .* use backend='auto'"),
    (torch.ones(1, 1, 2, 2, 2, device="meta"), "cpu", BackendError, "for meta tensors"),
]


@pytest.mark.parametrize(("x", "backend", "kind", "text"), REFUSALS)
def test_refusals(x: Tensor, backend: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        norm_pool_relu(x, backend=backend)


def torch_network(model: BrainAgeCNN) -> nn.Sequential:
    """The same network from torch.nn layers, with the model's weights, in float64."""
    layers: list[nn.Module] = []
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv3d)]
    for conv in convolutions[:-2]:
        layers += [conv, nn.InstanceNorm3d(conv.out_channels), nn.MaxPool3d(2), nn.ReLU()]
    neck, out = convolutions[-2:]
    layers += [neck, nn.ReLU(), nn.AdaptiveAvgPool3d(1), out, nn.Flatten(0)]
    return copy.deepcopy(nn.Sequential(*layers)).double()


def test_gradient_of_the_whole_network(compare: Compare) -> None:
    random = torch.Generator().manual_seed(1)
    model = BrainAgeCNN((17, 18, 19), width=0.2, blocks=3, generator=random)
    twin = torch_network(model)
    scans, ages = make((3, 1, 17, 18, 19)), torch.tensor([20.0, 50.0, 80.0])
    functional.mse_loss(model(scans), ages).backward()
    functional.mse_loss(twin(scans.double()), ages.double()).backward()
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    assert len(pairs) == 10
    for ours, exact in pairs[:6:2] + pairs[6:]:
        assert ours.grad is not None
        assert exact.grad is not None
        compare("norm_pool_relu", "network", ours.grad, exact.grad.numpy())
    first = pairs[0][0].grad
    assert first is not None
    for bias, _ in pairs[1:6:2]:
        # The norm takes a block's bias out again: its exact gradient is 0.
        assert bias.grad is not None
        assert float(bias.grad.abs().max()) < 1e-4 * float(first.abs().max())
