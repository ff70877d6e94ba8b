"""Convolution, instance norm, max pooling and ReLU on the CPU as one differentiable function."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekit.kernels.batched import for_each
from sparsekit.kernels.conv_norm_pool_relu import run, single_channel
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache, watched


class _ConvNormPoolReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, shape: Shape,
        eps: float,
    ) -> Tensor:  # fmt: skip
        plan = run.plan_of(mask, shape)
        saved = run.forward(x, weight.contiguous(), _contiguous(bias), plan, eps=eps)
        # All of it through torch, which frees it after the backward pass and lets checkpoints in.
        ctx.save_for_backward(
            weight, watched(mask), saved.padded, saved.planes, saved.pooled, saved.winner,
            saved.statistics,
        )  # fmt: skip
        ctx.plan = plan
        return saved.pooled

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, _, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = for_each(
            lambda one: run.backward(
                run.Saved(*saved), one, weight.contiguous(), ctx.plan, need_x=needs[0]
            ),
            grad,
            needs,
        )
        return *found, None, None, None


class _SingleChannel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        eps: float,
        keep: bool,
    ) -> Tensor:
        cache = PlanCache.of(mask)
        plan = cache.get(_SingleChannel, lambda: single_channel.Plan(cache.mask))
        y, saved = single_channel.forward(
            x.contiguous(), weight.contiguous(), plan, _contiguous(bias), eps=eps,
            threads=torch.get_num_threads(), save=keep and any(ctx.needs_input_grad),
        )  # fmt: skip
        if saved is not None:
            # Those of a plan that was made in inference mode cannot be saved so, and need not.
            tensors = {
                name: t
                for name, t in vars(saved).items()
                if isinstance(t, Tensor) and not t.is_inference()
            }
            ctx.save_for_backward(watched(mask), *tensors.values())
            ctx.names = tuple(tensors)
            emptied: dict[str, Any] = dict.fromkeys(tensors)
            ctx.rest = replace(saved, **emptied)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = replace(ctx.rest, **dict(zip(ctx.names, ctx.saved_tensors[1:], strict=True)))
        found = for_each(
            lambda one: single_channel.backward(
                saved, one.contiguous(), threads=torch.get_num_threads()
            ),
            grad,
            ctx.needs_input_grad[1:3],
        )
        return None, *found, None, None, None


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def conv_norm_pool_relu(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    eps: float,
) -> Tensor:
    """Run the Numba kernels; arguments are those that `sparsekit.ops` checked, float32 on a CPU."""
    needs_no_grad = not (x.requires_grad and torch.is_grad_enabled())
    y: Tensor
    if needs_no_grad and is_single_channel(shape):
        # Inside the function torch says that gradients are off.
        keep = torch.is_grad_enabled()
        y = _SingleChannel.apply(x, weight, bias, mask, float(eps), keep)  # type: ignore[no-untyped-call]
    else:
        y = _ConvNormPoolReLU.apply(x, weight, bias, mask, shape, float(eps))  # type: ignore[no-untyped-call]
    return y


def is_single_channel(shape: Shape) -> bool:
    """Whether the kernels for one input channel fit."""
    ones = (1, 1, 1)
    return (
        shape.c_in == 1
        and shape.kernel == (3, 3, 3)
        and shape.padding == ones
        and shape.stride == ones
        and shape.dilation == ones
    )
