"""The kernel against the reference, bit for bit, and as a differentiable function."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsekit.kernels.kept_weights import cpu, reference

SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (3, 0, 2), (7, 5, 3, 3, 3), (1 << 12, 131)]
DENSITIES = ["none", "one", "half", "all"]


def operands(shape: tuple[int, ...], density: str) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=random)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-42])
    hit = torch.rand(shape, generator=random) < 0.3
    weight[hit] = special[torch.randint(4, (int(hit.sum()),), generator=random)]
    mask = torch.rand(shape, generator=random) < 0.5
    if density != "half":
        mask.fill_(density == "all")
    if density == "one" and mask.numel():
        mask.view(-1)[mask.numel() // 2] = True
    return weight, mask


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.numpy().tobytes() == b.contiguous().numpy().tobytes()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_the_reference(shape: tuple[int, ...], density: str, threads: int) -> None:
    weight, mask = operands(shape, density)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cpu.kept_weights(weight, mask)
    finally:
        torch.set_num_threads(before)
    assert same_bits(found, reference.kept_weights(weight, mask))


def test_any_byte_but_0_keeps_and_strides_are_followed() -> None:
    weight, mask = operands((6, 50), "half")
    bytes_ = mask.to(torch.uint8) * torch.arange(1, 301, dtype=torch.uint8).view(6, 50).clamp(1)
    assert same_bits(cpu.select_kept(weight, bytes_), torch.where(mask, weight, 0.0))
    turned = cpu.kept_weights(weight.T, mask.T)
    assert same_bits(turned, torch.where(mask.T, weight.T, 0.0))


def test_gradients_of_any_order() -> None:
    weight, mask = operands((5, 21), "half")
    weight = weight.nan_to_num(0.5, 2.0, -2.0).requires_grad_()

    def second(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        y = function(weight, mask)
        (first,) = torch.autograd.grad((y**3).sum(), weight, create_graph=True)
        return first, torch.autograd.grad((first**2).sum(), weight)[0]

    for ours, wanted in zip(second(cpu.kept_weights), second(reference.kept_weights), strict=True):
        assert same_bits(ours.detach(), wanted.detach())
        assert not ours.detach()[~mask].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_derivative() -> None:
    weight, mask = operands((4, 9), "half")
    tangent = torch.randn(4, 9)
    with forward_ad.dual_level():
        y = cpu.kept_weights(forward_ad.make_dual(weight, tangent), mask)
        found = forward_ad.unpack_dual(y).tangent
    assert found is not None
    assert torch.equal(found, torch.where(mask, tangent, 0.0))
