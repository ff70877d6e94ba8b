"""The fused block for one input channel where digits or finiteness are at stake."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.conv_norm_pool_relu import single_channel
from sparsekit.kernels.conv_norm_pool_relu.single_channel import Plan, Saved, SavedInputs

EPS = 1e-5
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torch_layers(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = weight.detach().to(x.dtype).requires_grad_()
    bias = None if bias is None else bias.detach().to(x.dtype).requires_grad_()
    z = functional.conv3d(x, torch.where(mask, weight, 0.0), bias, padding=1)
    y = functional.relu(functional.max_pool3d(functional.instance_norm(z, eps=EPS), 2))
    leaves = [weight] if bias is None else [weight, bias]
    grads = torch.autograd.grad(y, leaves, grad_y.to(x.dtype))
    return y.detach(), grads[0], None if bias is None else grads[1]


def run(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Saved | SavedInputs]:
    y, saved = single_channel.forward(x, weight, Plan(mask), bias, eps=EPS, threads=2)
    assert saved is not None
    grad, grad_bias = single_channel.backward(saved, grad_y, threads=2, need_bias=bias is not None)
    return y, grad, grad_bias, saved


def example() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = torch.rand(4, 1, 3, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[1] = False
    x, weight, bias = normal(2, 1, 5, 6, 7), normal(4, 1, 3, 3, 3, seed=2), normal(4, seed=3)
    return x, weight, mask, bias, normal(2, 4, 2, 3, 3, seed=4)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["x-first", "x-last", "weight", "bias"])
def test_what_is_not_finite_is_so_where_torch_has_it(value: float, where: str) -> None:
    x, weight, mask, bias, grad_y = example()
    if where == "weight":
        place = [int(i) for i in mask.nonzero()[0]]
        weight[tuple(place)] = value
    else:
        tensor = bias if where == "bias" else x
        tensor.view(-1)[0 if where == "x-first" else -1] = value
    y, grad, grad_bias, _ = run(x, weight, mask, bias, grad_y)
    expected_y, expected_grad, expected_bias = torch_layers(x, weight, mask, bias, grad_y)
    assert bool(expected_y.isnan().any())
    assert torch.equal(y.isnan(), expected_y.isnan())
    assert torch.equal(grad.isnan(), expected_grad.isnan())
    assert grad_bias is not None
    assert expected_bias is not None
    assert torch.equal(grad_bias.isnan(), expected_bias.isnan())


def test_an_overflow_ends_as_in_torch() -> None:
    x, weight, mask, bias, grad_y = example()
    x[0] *= 1e35
    weight[3] *= 1e10
    y, grad, _, _ = run(x, weight, mask, bias, grad_y)
    expected_y, expected_grad, _ = torch_layers(x, weight, mask, bias, grad_y)
    assert bool(expected_y.isnan().any())
    assert torch.equal(y.isnan(), expected_y.isnan())
    assert torch.equal(grad.isnan(), expected_grad.isnan())


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("alive", [True, False])
def test_a_gradient_that_is_not_finite_goes_where_torch_sends_it(value: float, alive: bool) -> None:
    _, weight, mask, _, _ = example()
    x, grad_y = normal(2, 1, 13, 16, 19), normal(2, 4, 6, 8, 9, seed=4)
    positive = torch_layers(x, weight, mask, None, grad_y)[0] > 0
    positive[:, 1] = not alive  # The empty filter's.
    grad_y.view(-1)[(positive == alive).flatten().nonzero()[-1]] = value
    _, grad, _, saved = run(x, weight, mask, None, grad_y)
    assert isinstance(saved, Saved)
    expected = torch_layers(x, weight, mask, None, grad_y)[1]
    assert bool(expected.isnan().any()) == alive
    # torch multiplies the pruned taps too, before the mask takes them away.
    assert torch.equal(grad.isnan(), expected.isnan() & mask)


def test_an_infinite_gradient_leaves_no_infinity() -> None:
    """All terms of a tap's gradient have one sign here; torch subtracts a mean at each voxel."""
    x = torch.where(torch.arange(8) % 2 == 0, 1.0, -1.0).expand(1, 1, 4, 6, 8).clone() - 0.2
    x[0, 0, 1, 1, 2:4] = 3.0
    mask = torch.zeros(1, 27, dtype=torch.bool)
    mask[0, 13:15] = True
    mask = mask.view(1, 1, 3, 3, 3)
    weight = torch.full((1, 1, 3, 3, 3), 1.0)
    weight[0, 0, 1, 1, 2] = 0.1
    grad_y = torch.zeros(1, 1, 2, 3, 4)
    grad_y[0, 0, 0, 0, 1] = float("inf")
    _, grad, _, saved = run(x, weight, mask, None, grad_y)
    assert isinstance(saved, Saved)
    expected = torch_layers(x, weight, mask, None, grad_y)[1]
    assert bool(expected[mask].isnan().all())
    assert bool(grad[mask].isnan().all())


@pytest.mark.parametrize(
    ("mean", "spread"),
    [
        pytest.param(1000.0, 1.0, id="large-mean"),
        pytest.param(-1e4, 1.0, id="large-negative-mean"),
        pytest.param(1e6, 1.0, id="huge-mean"),
        pytest.param(1.0, 1e-4, id="small-spread"),
        pytest.param(0.0, 1e-12, id="spread-below-eps"),
        pytest.param(0.0, 1e15, id="large-numbers"),
    ],
)
@pytest.mark.parametrize("kept", ["centre", "few", "all"])
def test_no_worse_than_torch_in_float32(mean: float, spread: float, kept: str) -> None:
    """The border's zeros spread the map of a large mean, unless only the centre is kept."""
    weight, grad_y = normal(6, 1, 3, 3, 3, seed=2), normal(1, 6, 5, 6, 6, seed=3)
    x = normal(1, 1, 11, 12, 13) * spread + mean
    mask = torch.zeros(6, 27, dtype=torch.bool)
    mask[:, 13] = True
    if kept == "few":
        mask[torch.arange(6), torch.arange(0, 24, 4)] = True
    mask = (mask | (kept == "all")).view(6, 1, 3, 3, 3)
    exact = torch_layers(x.double(), weight, mask, None, grad_y)
    ours = run(x, weight, mask, None, grad_y)
    theirs = torch_layers(x, weight, mask, None, grad_y)
    assert error(ours[0], exact[0]) <= max(1.5 * error(theirs[0], exact[0]), 2e-6)
    assert error(ours[1], exact[1]) <= max(1.5 * error(theirs[1], exact[1]), 2e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1000.0, 1e6])
def test_a_constant_input(value: float) -> None:
    """Filters that look over the border see it; the one that does not gives a constant."""
    weight, grad_y = normal(3, 1, 3, 3, 3, seed=2), normal(1, 3, 2, 3, 3, seed=3)
    x = torch.full((1, 1, 5, 6, 7), value)
    mask = torch.ones(3, 1, 3, 3, 3, dtype=torch.bool)
    y, grad, _, _ = run(x, weight, mask, None, grad_y)
    exact_y, _, _ = torch_layers(x.double(), weight, mask, None, grad_y)
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-5, atol=2e-6)
    assert bool(grad.isfinite().all())
    centre = (torch.arange(27) == 13).view(1, 1, 3, 3, 3).expand_as(mask)
    y, grad, _, _ = run(x, weight, centre, None, grad_y)
    assert float(y.abs().max()) <= 1e-6
    assert float(grad.abs().max()) <= 1e-6 * max(1.0, abs(value))


def test_the_layers_of_torch_are_taken_only_where_digits_would_be_lost() -> None:
    mask = torch.zeros(1, 1, 3, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1, 1] = True
    weight, grad_y = torch.ones(1, 1, 3, 3, 3), torch.zeros(1, 1, 4, 4, 4)
    x = normal(1, 1, 8, 9, 9)
    assert isinstance(run(x, weight, mask, None, grad_y)[3], Saved)
    assert isinstance(run(x + 10, weight, mask, None, grad_y)[3], Saved)
    assert isinstance(run(x + 1000, weight, mask, None, grad_y)[3], SavedInputs)
    x[0, 0, 0, 0, 0] = float("nan")
    assert isinstance(run(x, weight, mask, None, grad_y)[3], SavedInputs)
