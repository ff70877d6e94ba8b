"""Launches of the Triton kernels: one for the output, two or more for the gradients."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit.kernels.masked_conv3d import padded, triton_passes
from sparsekit.kernels.masked_conv3d.gpu_plan import Pass, Plan, Tile
from sparsekit.kernels.masked_conv3d.strips import Strips, live_tiles, places
from sparsekit.types import Size3

_PACK_BLOCK = 64
# Type checkers see the kernels' bodies, not what a launch takes.
_passes: Any = triton_passes


@dataclass(frozen=True, slots=True)
class Gradients:
    """What the backward pass found."""

    x: Tensor | None
    weight: Tensor | None


def pack_source(x: Tensor, plan: Plan) -> Tensor:
    """Copy the input as the kernels read it."""
    return padded.pack(x, plan.source)


def forward(
    source: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    plan: Plan,
    out: Tensor,
    *,
    precision: str,
    voxel_mask: Tensor | None = None,
) -> None:
    """Write the convolution of a packed input.

    Parameters
    ----------
    source : Tensor
        From `pack_source`.
    weight, mask, bias : Tensor
        Of the convolution, contiguous.
    plan : Plan
    out : Tensor, (n, c_out, d, h, w)
        Any strides; every element is written. What is outside `voxel_mask` is the caller's.
    precision : str
        Triton's ``input_precision``.
    voxel_mask : Tensor, (n, d, h, w), bool, optional
        Tiles without a voxel of it are not computed.
    """
    shape = plan.shape
    live = None
    if voxel_mask is not None:
        zeros = (0, 0, 0)
        live = live_tiles(voxel_mask, plan.forward.strips, zeros, zeros)
    row_step = weight.shape[1] * math.prod(shape.kernel)
    product(
        source, plan.source.axes, plan.source.sample, (0, 0, 0),
        weight, mask, bias, plan.forward, plan.settings.forward,
        out, shape.c_out // shape.groups, row_step, precision,
        contiguous=_hint(plan.settings.width), live=live,
    )  # fmt: skip


def backward(
    gradient: Tensor,
    source: Tensor,
    weight: Tensor,
    mask: Tensor,
    plan: Plan,
    *,
    precision: str,
    need_x: bool,
    need_weight: bool,
    voxel_mask: Tensor | None = None,
) -> Gradients:
    """Gradients of the input and of the kept weights.

    Parameters
    ----------
    gradient : Tensor, (n, c_out, d, h, w)
        Of the output; zero outside `voxel_mask`.
    source : Tensor
        From `pack_source`.
    weight, mask : Tensor
        Contiguous.
    plan, precision
        As in `forward`.
    need_x, need_weight : bool
        Which to compute.
    voxel_mask : Tensor, (n, d, h, w), bool, optional
        Tiles that reach no voxel of it are not computed.
    """
    packed = padded.pack(gradient, plan.gradient)
    dx = _input_gradient(packed, weight, mask, plan, precision, voxel_mask) if need_x else None
    dw = None
    if need_weight:
        dw = _weight_gradient(packed, source, weight, mask, plan, precision, voxel_mask)
    return Gradients(dx, dw)


def _input_gradient(
    packed: Tensor, weight: Tensor, mask: Tensor, plan: Plan, precision: str,
    voxel_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    shape = plan.shape
    out = torch.empty(
        (packed.shape[0], shape.c_in, *shape.size), dtype=weight.dtype, device=weight.device
    )
    for launch in plan.backward:
        live = None
        if voxel_mask is not None:
            live = live_tiles(voxel_mask, launch.strips, *launch.reach)
        product(
            packed, plan.gradient.axes, plan.gradient.sample, plan.gradient.front,
            weight, mask, None, launch, plan.settings.input_gradient,
            out, shape.c_in // shape.groups, math.prod(shape.kernel), precision,
            contiguous=_hint(plan.settings.gradient_width), live=live,
        )  # fmt: skip
    return out


def product(
    source: Tensor, axes: Size3, sample: int, front: Size3,
    weight: Tensor, mask: Tensor, bias: Tensor | None, launch: Pass, tile: Tile,
    out: Tensor, rows: int, row_step: int, precision: str, *, contiguous: int,
    live: Tensor | None,
) -> None:  # fmt: skip
    """Pack the weights and launch the product; `front` is where the voxels' own places begin."""
    lists, strips, n = launch.lists, launch.strips, out.shape[0]
    tiles, length = lists.offsets.shape
    packed = torch.empty((tiles, tile.rows, length), dtype=weight.dtype, device=weight.device)
    _passes.pack_weights[(tiles * -(-length // _PACK_BLOCK),)](
        weight, mask.view(torch.uint8), lists.sources, packed,
        rows, row_step, lists.tiles_per_group, length,
        BN=tile.rows, BLOCK=_PACK_BLOCK,
    )  # fmt: skip
    if n * strips.per_sample == 0:
        return
    y_n, y_c, *y = out.stride()
    first = sum(i * s for i, s in zip(launch.first, y, strict=True))
    begin = sum(i * s for i, s in zip(front, axes, strict=True))
    _passes.gather_product[(strips.tiles(n) * tiles,)](
        source.view(-1)[begin:], packed, lists.offsets, launch.steps, bias,
        None if live is None else live.to(torch.int32),
        _from(out, first),
        launch.places, _targets(launch, out),
        n * strips.per_sample, strips.per_sample, sample, y_n, y_c,
        tiles, rows, lists.tiles_per_group, length,
        VOXELS=strips.voxels, BN=tile.rows, BK=tile.entries, CONTIGUOUS=contiguous,
        HAS_BIAS=bias is not None, HAS_LIVE=live is not None, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _hint(width: int) -> int:
    """Neighbouring numbers that the kernels are told of; more would change nothing in the code."""
    return min(width, 16)


def _from(out: Tensor, first: int) -> Tensor:
    """Flat view of the memory of `out` from its element `first` on."""
    if out.numel() == 0:
        return out
    span = sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) + 1
    return out.as_strided((span - first,), (1,), out.storage_offset() + first)


def _weight_gradient(
    packed: Tensor, source: Tensor, weight: Tensor, mask: Tensor, plan: Plan, precision: str,
    voxel_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    shape, tile, lists = plan.shape, plan.settings.weight_gradient, plan.forward.lists
    strips, n = plan.gradient_strips, source.shape[0]
    tiles, length = lists.offsets.shape
    most = strips.tiles(n)
    listed, count = _list_tiles(voxel_mask, strips, most, source.device)
    splits = splits_of(tiles * (length // tile.entries), most)
    partial = torch.empty(
        (splits, tiles, length, tile.rows), dtype=torch.float32, device=source.device
    )
    begin = sum(i * s for i, s in zip(plan.gradient.front, plan.gradient.axes, strict=True))
    _passes.weight_gradient[(splits * tiles * (length // tile.entries),)](
        source.view(-1), packed.view(-1)[begin:], lists.offsets, plan.gradient_steps,
        listed, count, partial, plan.x_places, plan.g_places,
        n * strips.per_sample, strips.per_sample,
        plan.source.sample, plan.gradient.sample, plan.gradient.channel,
        tiles, length // tile.entries, lists.tiles_per_group, plan.gradient.stored, length,
        -(-most // splits),
        VOXELS=strips.voxels, BN=tile.rows, BK=tile.entries,
        CONTIGUOUS=_hint(plan.settings.width),
        G_CONTIGUOUS=_hint(plan.settings.gradient_width),
        HAS_LISTED=listed is not None, PRECISION=precision,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    out = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    _passes.sum_splits[(tiles * (length // tile.entries),)](
        partial, mask.view(torch.uint8), lists.sources, plan.gradient_steps, out,
        splits, tiles, shape.c_out // shape.groups, weight.shape[1] * math.prod(shape.kernel),
        lists.tiles_per_group, length,
        BN=tile.rows, BK=tile.entries, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _targets(launch: Pass, out: Tensor) -> Tensor:
    """Where the voxels of a launch stand in the output, from its first one on."""
    n, _, *axes = out.stride()
    found = launch.targets.get((n, *axes))
    if found is None:
        d, h, w = (a * s for a, s in zip(axes, launch.every, strict=True))
        found = places(launch.strips, (d, h, w), n, out.device, outside=False)
        launch.targets[(n, *axes)] = found
    return found


def _list_tiles(
    voxel_mask: Tensor | None, strips: Strips, most: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Numbers of the live tiles, those first, and how many there are."""
    if voxel_mask is None:
        return None, torch.full((1,), most, dtype=torch.int32, device=device)
    zeros = (0, 0, 0)
    live = live_tiles(voxel_mask, strips, zeros, zeros)
    order = torch.argsort(live.to(torch.int8), descending=True, stable=True)
    return order.to(torch.int32), live.sum(dtype=torch.int32).reshape(1)


# Programs to aim for, several for each processor of a large GPU. Not tuned: every split writes sums
# of its own.
_PROGRAMS = 1024


def splits_of(programs: int, parts: int) -> int:
    """Over how many splits the weight gradient's voxels are shared; the same on every machine."""
    return max(1, min(parts, -(-_PROGRAMS // max(1, programs))))
