"""The Numba kernels as a differentiable function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekit.kernels.batched import for_each
from sparsekit.kernels.norm_pool_relu import run


class _NormPoolReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        pooled = run.forward(x, run.dense_planes(x), x.shape[0], x.shape[1], eps)
        ctx.save_for_backward(x, pooled.y, pooled.winner, pooled.statistics)
        return pooled.y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *pooled = ctx.saved_tensors
        found = for_each(
            lambda one: (run.backward(x, run.Pooled(*pooled), one.contiguous()),), grad_y, (True,)
        )
        return *found, None


def norm_pool_relu(x: Tensor, *, eps: float) -> Tensor:
    """Run the Numba kernels; arguments are those that `sparsekit.ops` checked, float32 on a CPU."""
    y: Tensor = _NormPoolReLU.apply(x, float(eps))  # type: ignore[no-untyped-call]
    return y
