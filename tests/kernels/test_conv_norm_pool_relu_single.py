"""The fused block for one input channel against torch's layers in float64."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.conv_norm_pool_relu import single_channel
from sparsekit.kernels.conv_norm_pool_relu.single_channel import Plan, Saved, SavedInputs

Compare = Callable[[str, str, Tensor, npt.NDArray[np.float64]], None]
OP = "conv_norm_pool_relu_single"
EPS = 1e-5


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def keep(channels: int, kept: int, seed: int = 5) -> Tensor:
    """A mask with so many True, anywhere."""
    order = torch.randperm(27 * channels, generator=torch.Generator().manual_seed(seed))
    return (order < kept).view(channels, 1, 3, 3, 3)


def convolve(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.conv3d(x, torch.where(mask, weight, 0.0), bias, padding=1)


def torch_layers(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    z = convolve(x, weight, mask, bias)
    return functional.relu(functional.max_pool3d(functional.instance_norm(z, eps=EPS), 2))


def torch_gradients(
    x: Tensor, weight: Tensor, mask: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and gradient of the weight, in the dtype of x."""
    leaf = weight.detach().to(x.dtype).requires_grad_()
    y = torch_layers(x, leaf, mask)
    (grad,) = torch.autograd.grad(y, leaf, grad_y.to(x.dtype))
    return y.detach(), grad


def run(
    x: Tensor, weight: Tensor, mask: Tensor, grad_y: Tensor, threads: int = 2, eps: float = EPS
) -> tuple[Tensor, Tensor, Saved | SavedInputs]:
    y, saved = single_channel.forward(x, weight, Plan(mask), None, eps=eps, threads=threads)
    assert saved is not None
    grad, grad_bias = single_channel.backward(saved, grad_y, threads=threads)
    assert grad_bias is not None
    # The norm takes the bias away.
    assert torch.equal(grad_bias, torch.zeros(len(weight)))
    assert not bool(grad[~mask].any())
    return y, grad, saved


def winners(saved: Saved, y: Tensor) -> Tensor:
    """Flat position of each window's winner in the map before the pooling."""
    n, c, d, h, w = y.shape
    number = saved.winners.view(n, c, d, h, -1)[..., :w].long()
    # Those of an empty filter are never written.
    number[:, ~saved.plan.mask.flatten(1).any(1)] = 8
    assert torch.equal(number >= 8, y == 0)
    number = number % 8
    depth, height, width = saved.grid
    assert (depth // 2, height // 2, width // 2) == (d, h, w)
    at_d = 2 * torch.arange(d).view(d, 1, 1) + number // 4
    at_h = 2 * torch.arange(h).view(h, 1) + number // 2 % 2
    at_w = 2 * torch.arange(w) + number % 2
    return (at_d * height + at_h) * width + at_w


def exact(
    x: Tensor, weight: Tensor, mask: Tensor, grad_y: Tensor, saved: Saved, y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the weight for the op's own winners, in float64.

    Rounding decides near-ties, and one other winner changes the gradient by far more than rounding.
    That the winners are largest but for rounding is checked here.
    """
    leaf = weight.detach().double().requires_grad_()
    z = functional.instance_norm(convolve(x.double(), leaf, mask), eps=eps)
    picked = z.flatten(2).gather(2, winners(saved, y).flatten(2)).view_as(y)
    largest = functional.max_pool3d(z, 2).detach()
    assert float((largest - picked.detach()).max()) <= 2e-6 * float(z.detach().abs().max())
    (grad,) = torch.autograd.grad(picked, leaf, torch.where(y > 0, grad_y.double(), 0.0))
    return functional.relu(largest), grad


def check(compare: Compare, x: Tensor, weight: Tensor, mask: Tensor, eps: float = EPS) -> None:
    n, _, d, h, w = x.shape
    grad_y = normal(n, len(weight), d // 2, h // 2, w // 2, seed=3)
    y, grad, saved = run(x, weight, mask, grad_y, eps=eps)
    assert isinstance(saved, Saved)
    exact_y, exact_grad = exact(x, weight, mask, grad_y, saved, y, eps)
    compare(OP, "forward", y, exact_y.numpy())
    compare(OP, "weight", grad, exact_grad.numpy())


GRIDS = [
    pytest.param((2, 2, 2), id="one-window"),
    pytest.param((4, 6, 8), id="even"),
    pytest.param((3, 5, 9), id="odd"),
    pytest.param((7, 11, 13), id="prime"),
    pytest.param((2, 2, 31), id="flat-dh"),
    pytest.param((17, 2, 3), id="flat-hw"),
    pytest.param((2, 19, 2), id="flat-dw"),
    pytest.param((5, 4, 14), id="row-fills-the-pitch"),
    pytest.param((5, 4, 15), id="row-beyond-the-pitch"),
    pytest.param((9, 10, 97), id="several-tiles"),
    pytest.param((4, 131, 66), id="several-bands"),
    pytest.param((2, 3, 5003), id="long-rows"),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_against_float64(grid: tuple[int, int, int], density: float, compare: Compare) -> None:
    mask = keep(7, round(density * 27 * 7))
    check(compare, normal(1, 1, *grid), 0.3 * normal(7, 1, 3, 3, 3, seed=2), mask, eps=0.1)


@pytest.mark.parametrize("channels", [1, 2, 3, 32])
@pytest.mark.parametrize("samples", [1, 3])
def test_channels_and_samples(channels: int, samples: int, compare: Compare) -> None:
    x = normal(samples, 1, 9, 8, 11) + torch.arange(samples).view(samples, 1, 1, 1, 1)
    mask = keep(channels, 9 * channels)
    check(compare, x, normal(channels, 1, 3, 3, 3, seed=2), mask)


@pytest.mark.parametrize("tap", range(27))
def test_one_weight(tap: int, compare: Compare) -> None:
    mask = torch.arange(3 * 27).view(3, 1, 3, 3, 3) == 27 + tap
    x, weight = normal(2, 1, 5, 6, 7), normal(3, 1, 3, 3, 3, seed=2)
    # The scale of a lone weight matters to the norm through eps only: a small one would leave a
    # gradient that is all rounding.
    check(compare, x, weight, mask, eps=1.0)
    y, _ = single_channel.forward(x, weight, Plan(mask), None, eps=EPS, threads=1)
    assert not bool(y[:, [0, 2]].any())


@pytest.mark.parametrize("first", range(27))
def test_every_pair_of_taps(first: int, compare: Compare) -> None:
    """Each entry of the Gram matrix, and that none is missing for the masks that need it."""
    others = [tap for tap in range(27) if tap != first]
    mask = torch.zeros(len(others), 27, dtype=torch.bool)
    mask[:, first] = True
    mask[torch.arange(len(others)), others] = True
    x = normal(1, 1, 4, 5, 6) + 0.5
    weight = normal(len(others), 1, 3, 3, 3, seed=2)
    check(compare, x, weight, mask.view(-1, 1, 3, 3, 3))
    # Filters one by one: the mask then does not ask for other distances.
    for i in range(len(others)):
        one = mask[i].view(1, 1, 3, 3, 3)
        y, _ = single_channel.forward(x, weight[i : i + 1], Plan(one), None, eps=EPS, threads=1)
        compare(OP, "forward", y, torch_layers(x.double(), weight[i : i + 1].double(), one).numpy())


def test_nothing_kept() -> None:
    x, weight = normal(2, 1, 4, 5, 6), normal(3, 1, 3, 3, 3)
    mask = torch.zeros(3, 1, 3, 3, 3, dtype=torch.bool)
    y, grad, _ = run(x, weight, mask, normal(2, 3, 2, 2, 3))
    assert not bool(y.any())
    assert not bool(grad.any())


@pytest.mark.parametrize("levels", [2, 3])
def test_of_equal_voxels_the_first_takes_the_gradient(levels: int, compare: Compare) -> None:
    """Sums of small integers are exact, so that ties are ties in float32 as well."""
    random = torch.Generator().manual_seed(levels)
    x = torch.randint(0, levels, (2, 1, 8, 9, 21), generator=random).float()
    weight = torch.randint(-2, 3, (6, 1, 3, 3, 3), generator=random).float()
    mask = keep(6, 30)
    z = convolve(x, weight, mask)
    windows = functional.unfold(z[0, :, 0].unsqueeze(1), (2, 2), stride=2)
    largest = windows.amax(1, keepdim=True)
    assert bool(((windows == largest).sum(1) > 1).any())
    grad_y = normal(2, 6, 4, 4, 10, seed=3)
    y, grad, saved = run(x, weight, mask, grad_y)
    assert isinstance(saved, Saved)
    exact_y, exact_grad = torch_gradients(x.double(), weight, mask, grad_y)
    compare(OP, "forward", y, exact_y.numpy())
    compare(OP, "weight", grad, exact_grad.numpy())


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(8))
def test_ties_of_two_voxels(first: int, second: int) -> None:
    """The winner's number itself, for the identity as filter."""
    x = torch.zeros(1, 1, 4, 2, 2)
    x[0, 0, :2].view(-1)[[first, second]] = 1.0
    mask = torch.arange(27).view(1, 1, 3, 3, 3) == 13
    y, saved = single_channel.forward(
        x, torch.ones(1, 1, 3, 3, 3), Plan(mask), None, eps=EPS, threads=1
    )
    assert isinstance(saved, Saved)
    assert int(winners(saved, y)[0, 0, 0, 0, 0]) == min(first, second)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    x, weight = normal(2, 1, 21, 34, 27), normal(8, 1, 3, 3, 3, seed=2)
    mask, grad_y = keep(8, 80), normal(2, 8, 10, 17, 13, seed=3)
    one = run(x, weight, mask, grad_y, threads=1)
    more = run(x, weight, mask, grad_y, threads=threads)
    assert torch.equal(one[0], more[0])
    assert torch.equal(one[1], more[1])


def test_without_saving_the_output_is_the_same() -> None:
    x, weight, mask = normal(1, 1, 6, 7, 8), normal(4, 1, 3, 3, 3), keep(4, 40)
    plan = Plan(mask)
    y, saved = single_channel.forward(x, weight, plan, None, eps=EPS, threads=1, save=False)
    assert saved is None
    assert torch.equal(y, single_channel.forward(x, weight, plan, None, eps=EPS, threads=1)[0])


def test_a_plan_serves_other_weights_and_grids(compare: Compare) -> None:
    mask = keep(4, 40)
    plan = Plan(mask)
    for grid in ((4, 5, 6), (5, 4, 33), (4, 5, 6)):
        x, weight = normal(1, 1, *grid), normal(4, 1, 3, 3, 3, seed=sum(grid))
        y, _ = single_channel.forward(x, weight, plan, None, eps=EPS, threads=1)
        compare(OP, "forward", y, torch_layers(x.double(), weight.double(), mask).numpy())


def test_a_backward_pass_after_another_forward_pass() -> None:
    weight, mask, grad_y = normal(4, 1, 3, 3, 3, seed=2), keep(4, 40), normal(1, 4, 3, 3, 4)
    plan = Plan(mask)
    _, expected, _ = run(normal(1, 1, 6, 7, 8), weight, mask, grad_y)
    _, saved = single_channel.forward(normal(1, 1, 6, 7, 8), weight, plan, None, eps=EPS, threads=1)
    assert saved is not None
    single_channel.forward(normal(1, 1, 6, 7, 8, seed=9), -weight, plan, None, eps=EPS, threads=1)
    for _ in range(2):
        grad, nothing = single_channel.backward(saved, grad_y, threads=1, need_bias=False)
        assert nothing is None
        assert torch.equal(grad, expected)


def test_a_bias_changes_nothing() -> None:
    x, weight, mask = normal(1, 1, 6, 7, 8), normal(4, 1, 3, 3, 3), keep(4, 40)
    plain, _ = single_channel.forward(x, weight, Plan(mask), None, eps=EPS, threads=1)
    y, _ = single_channel.forward(x, weight, Plan(mask), normal(4), eps=EPS, threads=1)
    assert torch.equal(plain, y)


def test_pruned_weights_may_hold_anything() -> None:
    x, mask, grad_y = normal(1, 1, 6, 7, 8), keep(4, 40), normal(1, 4, 3, 3, 4)
    weight = normal(4, 1, 3, 3, 3, seed=2)
    expected = run(x, weight, mask, grad_y)
    for value in (float("nan"), float("inf")):
        y, grad, saved = run(x, torch.where(mask, weight, value), mask, grad_y)
        assert isinstance(saved, Saved)
        assert torch.equal(y, expected[0])
        assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
def test_eps(eps: float) -> None:
    x, weight, mask = normal(1, 1, 6, 7, 8), normal(4, 1, 3, 3, 3), keep(4, 40)
    mask[3] = False
    y, _ = single_channel.forward(x, weight, Plan(mask), None, eps=eps, threads=1)
    z = functional.instance_norm(convolve(x.double(), weight.double(), mask), eps=eps)
    expected = functional.relu(functional.max_pool3d(z, 2))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


def test_sparse_random_shapes(compare: Compare) -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        d, h, w = (int(i) for i in random.integers(2, 24, 3))
        channels, samples = int(random.integers(1, 9)), int(random.integers(1, 4))
        mask = keep(channels, int(random.integers(1, 27 * channels + 1)))
        seed = int(random.integers(1 << 30))
        x = normal(samples, 1, d, h, w, seed=seed)
        check(compare, x, normal(channels, 1, 3, 3, 3, seed=seed + 1), mask, eps=0.1)


def test_a_plan_may_be_used_by_several_threads_at_once() -> None:
    mask, weight = keep(8, 100), normal(8, 1, 3, 3, 3, seed=2)
    plan = Plan(mask)
    inputs = [normal(1, 1, 12, 14, width) for width in (9, 40, 13, 70)]

    def output(x: Tensor) -> Tensor:
        return single_channel.forward(x, weight, plan, None, eps=EPS, threads=2)[0]

    expected = [output(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, alone in zip(pool.map(output, inputs), expected, strict=True):
                assert torch.equal(got, alone)
