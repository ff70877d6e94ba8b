"""Masked 3D convolution on the CPU as a differentiable function and as a registered operator.

Eager code takes `_MaskedConv3d`; code that torch compiles takes the operator
``sparsekit::masked_conv3d``, which has a fake implementation and the same kernels.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsekit.kernels.batched import for_each
from sparsekit.kernels.kept_weights.cpu import select_kept
from sparsekit.kernels.masked_conv3d import backward as backward_pass
from sparsekit.kernels.masked_conv3d import packing, plan_cache, run, selector, voxels
from sparsekit.kernels.masked_conv3d.cost import Gradients
from sparsekit.kernels.masked_conv3d.geometry import Shape, shape_of
from sparsekit.kernels.masked_conv3d.plan import Plan


def _forward(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, shape: Shape,
    voxel_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Plan]:  # fmt: skip
    """Return the output, the padded input and the plan."""
    plan = run.plan_of(mask, shape)
    padded = packing.pack_source(x, plan)
    active = None
    if voxel_mask is not None:
        active = voxels.forward_tiles(voxel_mask, plan.geometry, x.shape[0])
    y = run.forward(
        padded,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        plan,
        x.shape[0],
        active=active,
    )
    if voxel_mask is not None:
        y.masked_fill_(~voxel_mask, 0.0)
    return y, padded, plan


def _backward(
    grad: Tensor, padded: Tensor, weight: Tensor, plan: Plan, voxel_mask: Tensor | None,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input (or None), the weight and the bias."""
    active = None
    if voxel_mask is not None:
        grad = torch.where(voxel_mask, grad, 0.0)
        active = voxels.backward_tiles(voxel_mask, plan.geometry, grad.shape[0])
    packed, sums = packing.pack_gradient(grad, plan)
    found = backward_pass.backward(
        packed, padded, weight.contiguous(), plan, grad.shape[0],
        need_x=need_x, active=active,
    )  # fmt: skip
    return found.x, found.weight, sums.sum(dim=0)


class _MaskedConv3d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, shape: Shape,
        voxel_mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, padded, ctx.plan = _forward(x, weight, mask, bias, shape, voxel_mask)
        ctx.save_for_backward(padded, weight, plan_cache.watched(mask), voxel_mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        padded, weight, _, voxel_mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = for_each(
            lambda one: _backward(one, padded, weight, ctx.plan, voxel_mask, needs[0]), grad, needs
        )
        return *found, None, None, None


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    voxel_mask: Tensor | None,
    precision: str,
) -> Tensor:
    """Run the Numba kernels; arguments are those that `sparsekit.ops` checked, float32 on a CPU."""
    del precision  # float32 products throughout, more than any mode asks for
    y: Tensor
    if torch.compiler.is_compiling():
        y = torch.ops.sparsekit.masked_conv3d(
            x, weight, mask, bias, shape.stride, shape.padding, shape.dilation, shape.groups,
            voxel_mask,
        )  # fmt: skip
        return y
    y = _MaskedConv3d.apply(x, weight, bias, mask, shape, voxel_mask)  # type: ignore[no-untyped-call]
    return y


def masked_conv3d_choosing(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    shape: Shape,
    *,
    voxel_mask: Tensor | None,
    precision: str,
) -> Tensor:
    """Let the operator choose between the kernels and torch's dense convolution when it runs.

    For code that torch compiles: the mask has no values yet, but it is known what needs a gradient.
    """
    del precision
    y: Tensor = torch.ops.sparsekit.masked_conv3d(
        x, weight, mask, bias, shape.stride, shape.padding, shape.dilation, shape.groups,
        voxel_mask, selector.gradients_of(x, weight, bias),
    )  # fmt: skip
    return y


@torch.library.custom_op("sparsekit::masked_conv3d", mutates_args=(), device_types="cpu")
def masked_conv3d_op(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, voxel_mask: Tensor | None,
    choose_for: str = "",
) -> Tensor:  # fmt: skip
    """Convolve with the unpruned weights; arguments as in `masked_conv3d`.

    With gradients in `choose_for` (`cost.Gradients`), torch's dense convolution may run instead of
    the kernels. The backward operator gets the same text and so decides alike.
    """
    shape = shape_of(x, weight, stride, padding, dilation, groups)
    if _takes_dense(choose_for, shape, x, mask):
        y = functional.conv3d(x, select_kept(weight, mask), bias, stride, padding, dilation, groups)
        return (y if voxel_mask is None else torch.where(voxel_mask, y, 0.0)).contiguous()
    return _forward(x, weight, mask, bias, shape, voxel_mask)[0]


def _takes_dense(choose_for: str, shape: Shape, x: Tensor, mask: Tensor) -> bool:
    if not choose_for:
        return False
    gradients = cast(Gradients, choose_for)
    dense = selector.decide_for(
        "masked_conv3d", shape, x.shape[0], selector.density_of(mask), gradients
    ).dense
    if dense:
        selector.take_no_plan()
    return dense


@masked_conv3d_op.register_fake
def _(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, voxel_mask: Tensor | None,
    choose_for: str = "",
) -> Tensor:  # fmt: skip
    del mask, bias, voxel_mask, choose_for
    out = shape_of(x, weight, stride, padding, dilation, groups).out
    return x.new_empty(x.shape[0], weight.shape[0], *out)


@torch.library.custom_op("sparsekit::masked_conv3d_backward", mutates_args=(), device_types="cpu")
def masked_conv3d_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, voxel_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, choose_for: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input (empty unless `need_x`), the weight and the bias."""
    shape = shape_of(x, weight, stride, padding, dilation, groups)
    if _takes_dense(choose_for, shape, x, mask):
        return _dense_backward(
            grad, x, weight, mask, voxel_mask, stride, padding, dilation, groups, need_x
        )
    plan = run.plan_of(mask, shape)
    padded = packing.pack_source(x, plan)
    dx, dw, db = _backward(grad, padded, weight, plan, voxel_mask, need_x)
    return x.new_empty(0) if dx is None else dx, dw, db


def _dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, voxel_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if voxel_mask is not None:
        grad = torch.where(voxel_mask, grad, 0.0)
    dx, dw, db = torch.ops.aten.convolution_backward(
        grad, x, select_kept(weight, mask), [len(weight)], stride, padding, dilation, False,
        [0, 0, 0], groups, [need_x, True, True],
    )  # fmt: skip
    dx = dx.contiguous() if need_x else x.new_empty(0)
    return dx, select_kept(dw, mask), db


@masked_conv3d_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, voxel_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, choose_for: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del mask, voxel_mask, stride, padding, dilation, groups, choose_for
    dx = x.new_empty(x.shape if need_x else 0)
    return dx, weight.new_empty(weight.shape), grad.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, mask, _, stride, padding, dilation, groups, voxel_mask, choose_for = inputs
    ctx.save_for_backward(x, weight, mask, voxel_mask)
    ctx.arguments = (stride, padding, dilation, groups, choose_for)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, voxel_mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, dw, db = torch.ops.sparsekit.masked_conv3d_backward(
        grad, x, weight, mask, voxel_mask, *ctx.arguments, needs[0]
    )
    return (
        dx if needs[0] else None, dw if needs[1] else None, None, db if needs[3] else None,
        None, None, None, None, None, None,
    )  # fmt: skip


masked_conv3d_op.register_autograd(_op_backward, setup_context=_setup_context)
