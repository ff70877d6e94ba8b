"""Masked 3D convolution in Triton as a differentiable function and as registered operators.

Eager code takes `_MaskedConv3d`, code that torch compiles ``sparsekit::triton_masked_conv3d``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsekit.kernels.batched import for_each
from sparsekit.kernels.masked_conv3d import launches
from sparsekit.kernels.masked_conv3d.geometry import Shape, shape_of
from sparsekit.kernels.masked_conv3d.gpu_cost import Decision
from sparsekit.kernels.masked_conv3d.gpu_plan import Plan
from sparsekit.kernels.masked_conv3d.gpu_plans import GpuPlans, kind_of
from sparsekit.kernels.masked_conv3d.tiles import Precision
from sparsekit.kernels.triton_device import on_device_of


def decide(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, shape: Shape, precision: str
) -> Decision:
    """Choose between the kernels and torch's dense convolution.

    Where the kernels are chosen, the same call does not compare the mask again.
    """
    kind = kind_of(x, precision)
    plans = GpuPlans.compare(mask)
    decision = plans.decide(shape, x.shape[0], kind, train=_trains(x, weight, bias))
    if decision.dense:
        GpuPlans.forget()
    return decision


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, plan: Plan,
    voxel_mask: Tensor | None, precision: Precision,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output and the packed input."""
    with on_device_of(x):
        return _launch_forward(x, weight, mask, bias, plan, voxel_mask, precision)


def _launch_forward(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, plan: Plan,
    voxel_mask: Tensor | None, precision: Precision,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    source = launches.pack_source(x, plan)
    y = torch.empty(
        (x.shape[0], plan.shape.c_out, *plan.shape.out),
        dtype=x.dtype, device=x.device, memory_format=_memory_format(x),
    )  # fmt: skip
    launches.forward(
        source, weight.contiguous(), mask.contiguous(),
        None if bias is None else bias.contiguous(), plan, y,
        precision=precision, voxel_mask=_voxels(voxel_mask, x.shape[0]),
    )  # fmt: skip
    if voxel_mask is not None:
        y.masked_fill_(~voxel_mask, 0.0)
    return y, source


def _backward(
    grad: Tensor, source: Tensor, weight: Tensor, mask: Tensor, plan: Plan,
    voxel_mask: Tensor | None, precision: Precision, need_x: bool, need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of the input, the weight and the bias."""
    if voxel_mask is not None:
        grad = torch.where(voxel_mask, grad, 0.0)
    with on_device_of(grad):
        found = launches.backward(
            grad, source, weight.contiguous(), mask.contiguous(), plan,
            precision=precision, need_x=need_x, need_weight=need_weight,
            voxel_mask=_voxels(voxel_mask, grad.shape[0]),
        )  # fmt: skip
    return found.x, found.weight, grad.sum(dim=(0, 2, 3, 4))


def _voxels(voxel_mask: Tensor | None, samples: int) -> Tensor | None:
    return None if voxel_mask is None else voxel_mask[:, 0].expand(samples, -1, -1, -1)


def _memory_format(x: Tensor) -> torch.memory_format:
    last = torch.channels_last_3d
    taken = x.is_contiguous(memory_format=last) and not x.is_contiguous()
    return last if taken else torch.contiguous_format


class _MaskedConv3d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, plan: Plan,
        voxel_mask: Tensor | None, precision: Precision,
    ) -> Tensor:  # fmt: skip
        y, source = _forward(x, weight, mask, bias, plan, voxel_mask, precision)
        ctx.plan, ctx.precision = plan, precision
        # The mask also so that torch refuses a backward pass after it has changed.
        ctx.save_for_backward(source, weight, mask, voxel_mask)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        source, weight, mask, voxel_mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = for_each(
            lambda one: _backward(
                one, source, weight, mask, ctx.plan, voxel_mask, ctx.precision, *needs[:2]
            ),
            grad,
            needs,
        )
        return *found, None, None, None, None


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
    """Run the Triton kernels; arguments are those that `sparsekit.ops` checked."""
    if torch.is_autocast_enabled(x.device.type):
        lower = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
    train = _trains(x, weight, bias)
    y: Tensor
    if torch.compiler.is_compiling():
        y = torch.ops.sparsekit.triton_masked_conv3d(
            x, weight, mask, bias, shape.stride, shape.padding, shape.dilation, shape.groups,
            voxel_mask, precision, train, False,
        )  # fmt: skip
        return y
    kind = kind_of(x, precision)
    plan = GpuPlans.of(mask).plan(shape, x.shape[0], kind, train=train)
    y = _MaskedConv3d.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, mask, plan, voxel_mask, kind.precision
    )
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

    For code that torch compiles: the mask has no values yet.
    """
    y: Tensor = torch.ops.sparsekit.triton_masked_conv3d(
        x, weight, mask, bias, shape.stride, shape.padding, shape.dilation, shape.groups,
        voxel_mask, precision, _trains(x, weight, bias), True,
    )  # fmt: skip
    return y


def _planned(
    x: Tensor, weight: Tensor, mask: Tensor, stride: list[int], padding: list[int],
    dilation: list[int], groups: int, precision: str, train: bool, choose: bool,
) -> tuple[Plan | None, Precision]:  # fmt: skip
    """Return the plan, or None where the choice is left open and the dense path is better."""
    shape = shape_of(x, weight, stride, padding, dilation, groups)
    kind, plans = kind_of(x, precision), GpuPlans.of(mask)
    if choose and plans.decide(shape, x.shape[0], kind, train=train).dense:
        return None, kind.precision
    return plans.plan(shape, x.shape[0], kind, train=train), kind.precision


@torch.library.custom_op("sparsekit::triton_masked_conv3d", mutates_args=())
def masked_conv3d_op(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, voxel_mask: Tensor | None,
    precision: str, train: bool, choose: bool,
) -> Tensor:  # fmt: skip
    """Convolve with the unpruned weights; arguments as in `masked_conv3d`.

    `train` says whether the tiles are chosen for the gradients as well, so that the backward
    operator finds the plan that the forward pass made; `choose` lets the dense convolution run.
    """
    plan, mode = _planned(
        x, weight, mask, stride, padding, dilation, groups, precision, train, choose
    )
    if plan is None:
        kept = torch.where(mask, weight, 0.0)
        y = functional.conv3d(x, kept, bias, stride, padding, dilation, groups)
        y = y if voxel_mask is None else torch.where(voxel_mask, y, 0.0)
        return y.contiguous(memory_format=_memory_format(x))
    return _forward(x, weight, mask, bias, plan, voxel_mask, mode)[0]


@masked_conv3d_op.register_fake
def _(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, voxel_mask: Tensor | None,
    precision: str, train: bool, choose: bool,
) -> Tensor:  # fmt: skip
    del mask, bias, voxel_mask, precision, train, choose
    out = shape_of(x, weight, stride, padding, dilation, groups).out
    sizes = (x.shape[0], weight.shape[0], *out)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))


@torch.library.custom_op("sparsekit::triton_masked_conv3d_backward", mutates_args=())
def masked_conv3d_backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, voxel_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str,
    train: bool, choose: bool, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the input (empty unless `need_x`), the weight and the bias."""
    plan, mode = _planned(
        x, weight, mask, stride, padding, dilation, groups, precision, train, choose
    )
    if plan is None:
        if voxel_mask is not None:
            grad = torch.where(voxel_mask, grad, 0.0)
        dx, dw, db = torch.ops.aten.convolution_backward(
            grad, x, torch.where(mask, weight, 0.0), [len(weight)], stride, padding, dilation,
            False, [0, 0, 0], groups, [need_x, True, True],
        )  # fmt: skip
        dx = dx.contiguous() if need_x else x.new_empty(0)
        return dx, torch.where(mask, dw, 0.0).contiguous(), db
    source = launches.pack_source(x, plan)
    dx, dw, db = _backward(grad, source, weight, mask, plan, voxel_mask, mode, need_x, True)
    assert dw is not None
    return x.new_empty(0) if dx is None else dx, dw, db


@masked_conv3d_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, voxel_mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], groups: int, precision: str,
    train: bool, choose: bool, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    del mask, voxel_mask, stride, padding, dilation, groups, precision, train, choose
    dx = x.new_empty(x.shape if need_x else 0)
    return dx, weight.new_empty(weight.shape), grad.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, mask, _, stride, padding, dilation, groups, voxel_mask, *rest = inputs
    ctx.save_for_backward(x, weight, mask, voxel_mask)
    ctx.arguments = (stride, padding, dilation, groups, *rest)


def _op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, voxel_mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, dw, db = torch.ops.sparsekit.triton_masked_conv3d_backward(
        grad, x, weight, mask, voxel_mask, *ctx.arguments, needs[0]
    )
    return (
        dx if needs[0] else None, dw if needs[1] else None, None, db if needs[3] else None,
        None, None, None, None, None, None, None, None,
    )  # fmt: skip


masked_conv3d_op.register_autograd(_op_backward, setup_context=_setup_context)
