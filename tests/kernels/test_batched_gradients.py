"""Gradients of many outputs at once: `is_grads_batched`, vectorised Jacobians, vmap."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.kernels.kept_weights.cpu import kept_weights
from sparsekit.ops import conv_norm_pool_relu, masked_conv3d, norm_pool_relu


def make(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


X, ONE = make(2, 4, 7, 6, 9), make(2, 1, 7, 6, 9).detach()
WEIGHT, ONE_WEIGHT, BIAS = make(6, 2, 3, 3, 3), make(6, 1, 3, 3, 3), make(6)
MASK, ONE_MASK = (make(*w.shape, seed=3) > 0.5 for w in (WEIGHT, ONE_WEIGHT))
VOXELS = make(2, 1, 4, 3, 5, seed=5) > 0

Case = tuple[Callable[[str], Tensor], tuple[Tensor, ...]]
CASES: dict[str, Case] = {
    "convolution": (
        lambda backend: masked_conv3d(
            X, WEIGHT, MASK, BIAS, stride=2, padding=1, groups=2, voxel_mask=VOXELS,
            backend=backend,
        ),
        (X, WEIGHT, BIAS),
    ),
    "no-input-gradient": (
        lambda backend: masked_conv3d(
            X.detach(), WEIGHT, MASK, BIAS, groups=2, backend=backend
        ),
        (BIAS, WEIGHT),
    ),
    "block": (
        lambda backend: conv_norm_pool_relu(
            X, WEIGHT, MASK, BIAS, padding=1, groups=2, backend=backend
        ),
        (X, WEIGHT),
    ),
    "block-of-one-channel": (
        lambda backend: conv_norm_pool_relu(ONE, ONE_WEIGHT, ONE_MASK, padding=1, backend=backend),
        (ONE_WEIGHT,),
    ),
    "norm": (lambda backend: norm_pool_relu(X, backend=backend), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_batched_gradients_are_those_of_the_reference(name: str) -> None:
    run, inputs = CASES[name]
    y = run("cpu")
    seeds = make(3, *y.shape, seed=7).detach()
    found = torch.autograd.grad(y, inputs, seeds, is_grads_batched=True, retain_graph=True)
    expected = torch.autograd.grad(run("reference"), inputs, seeds, is_grads_batched=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # And exactly those of one after the other.
    for i, seed in enumerate(seeds):
        alone = torch.autograd.grad(y, inputs, seed, retain_graph=True)
        assert all(torch.equal(a, b[i]) for a, b in zip(alone, found, strict=True))


def test_a_vectorised_jacobian() -> None:
    def run(x: Tensor, backend: str) -> Tensor:
        return masked_conv3d(x, WEIGHT, MASK, groups=2, backend=backend).mean((2, 3, 4))

    found: Any = torch.autograd.functional.jacobian(
        lambda x: run(x, "cpu"), X.detach(), vectorize=True
    )
    expected: Any = torch.autograd.functional.jacobian(lambda x: run(x, "reference"), X.detach())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_vmap_over_a_backward_pass_twice() -> None:
    y = masked_conv3d(X, WEIGHT, MASK, groups=2, backend="cpu")
    seeds = make(2, 3, *y.shape, seed=7).detach()

    def backward(seed: Tensor) -> Tensor:
        return torch.autograd.grad(y, X, seed, retain_graph=True)[0]

    found = torch.func.vmap(torch.func.vmap(backward))(seeds)
    for i, j in ((0, 2), (1, 1)):
        assert torch.equal(found[i, j], backward(seeds[i, j]))


def test_the_gradient_of_selected_weights() -> None:
    """What the dense path's weights go through."""
    kept = kept_weights(WEIGHT, MASK)
    seeds = make(3, *kept.shape, seed=7).detach()
    (found,) = torch.autograd.grad(kept, WEIGHT, seeds, is_grads_batched=True)
    assert torch.equal(found, torch.where(MASK, seeds, 0.0))
