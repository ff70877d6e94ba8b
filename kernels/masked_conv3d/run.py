"""Driver of the CPU kernels' forward pass: from tensors to jobs and back. float32 only."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.masked_conv3d import cost, cpu, grouped, packing
from sparsekit.kernels.masked_conv3d.geometry import (
    CHANNELS_AT_ONCE,
    Geometry,
    Grid,
    Shape,
    block_channels,
    geometry,
)
from sparsekit.kernels.masked_conv3d.plan import Plan, build, build_rows
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache
from sparsekit.kernels.masked_conv3d.rows import row_table
from sparsekit.kernels.parallel import Prepared
from sparsekit.kernels.vector import LANES, REGISTERS, VECTOR_BYTES

# Work below which a second thread costs more than it brings, in multiply-adds.
_WORK_PER_THREAD = 1 << 18
# Results larger than this do not stay in a cache until they are read.
_STREAM_BYTES = 16 << 20
_PREFETCH_BYTES = 1 << 20


def plan_of(mask: Tensor, shape: Shape, gradient_bytes: int | None = None) -> Plan:
    """Plan of a mask, from its cache or new; see `geometry` for `gradient_bytes`."""
    cache = PlanCache.of(mask)

    def make() -> Plan:
        return build(cache.mask, *_cut(shape, cache.density, gradient_bytes))

    plan: Plan = cache.get((shape, gradient_bytes), make)
    return plan


def plan_of_rows(
    counts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    shape: Shape,
    gradient_bytes: int | None = None,
) -> Plan:
    """Plan of a mask in rows, as `plan_of` makes it of the mask; see `plan.build_rows`."""
    weights = shape.c_out * (shape.c_in // shape.groups) * math.prod(shape.kernel)
    density = columns.size / max(1, weights)
    return build_rows(counts, columns, *_cut(shape, density, gradient_bytes))


def _cut(shape: Shape, density: float, gradient_bytes: int | None) -> tuple[Geometry, int, int]:
    """Geometry, and channels per block of the forward and the backward pass."""
    layout_ = geometry(shape, LANES, REGISTERS, gradient_bytes)
    sizes = [
        block_channels(layout_, density, grid, tiling)
        for grid, tiling in (
            (layout_.source, layout_.forward),
            (layout_.gradient, layout_.backward),
        )
    ]
    return layout_, sizes[0], sizes[1]


def threads_for(plan: Plan, samples: int) -> int:
    """Threads for one pass by a plan's lists."""
    tiles = plan.geometry.forward
    vectors = samples * tiles.tiles * tiles.rows * tiles.columns
    return parallel.thread_count(plan.forward.entries * vectors * LANES, _WORK_PER_THREAD)


def forward(
    padded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    samples: int,
    *,
    dense: bool = True,
    active: Tensor | None = None,
) -> Tensor:
    """Convolve padded planes.

    Parameters
    ----------
    padded : Tensor
        From `pack_source`.
    weight : Tensor, contiguous
    bias : Tensor, (c_out,), contiguous, optional
    plan : Plan
    samples : int
    dense : bool
        Return (n, c_out, d, h, w) in torch's layout; else the planes of ``geometry.target``.
    active : Tensor, (n * tiles,), uint8, optional
        Tiles with a 0 are not computed; their voxels get 0.
    """
    threads = torch.get_num_threads()
    # Several output channels at a time, zeros included, may be faster than lists.
    by_groups = active is None and cost.grouped_pays(plan.geometry.shape, plan.density)
    work = plan.once(
        (forward, samples, dense, by_groups, threads),
        lambda: (_prepare_groups if by_groups else _prepare_lists)(plan, samples, dense),
    )
    y = buffers.empty(work.y_shape)
    if y.numel() == 0:
        return y
    scratch = buffers.empty(work.scratch_shape)
    addresses = {"x": padded.data_ptr(), "y": y.data_ptr(), "scratch": scratch.data_ptr()}
    if by_groups:
        packed = _pack_weights(weight, plan, work.kernel.threads)
        # Of whole groups; the last may be of fewer channels than it has places.
        start = torch.zeros(work.starts, dtype=torch.float32, device="cpu")
        if bias is not None:
            start[: bias.numel()] = bias
        work.kernel.run(weights=packed.data_ptr(), bias=start.data_ptr(), **addresses)
        return y
    values = packing.gather(weight, plan, plan.forward, work.kernel.threads)
    work.kernel.run(
        values=values.data_ptr(), bias=0 if bias is None else bias.data_ptr(),
        active=0 if active is None else active.data_ptr(), **addresses,
    )  # fmt: skip
    return y


@dataclass(frozen=True, slots=True)
class _Forward:
    """A forward pass of which only the tensors are unknown."""

    kernel: Prepared
    y_shape: tuple[int, ...]
    scratch_shape: tuple[int]
    starts: int = 0
    """Sums' starts that a grouped kernel reads."""


def _target(plan: Plan, samples: int, dense: bool) -> tuple[tuple[int, ...], dict[str, int]]:
    """Shape of the output, and the fields that say where its planes stand."""
    shape, target = plan.geometry.shape, plan.geometry.target
    d, h, w = shape.out
    if dense:
        y_shape: tuple[int, ...] = (samples, shape.c_out, d, h, w)
        plane, channel, sample = h * w, d * h * w, shape.c_out * d * h * w
    else:
        y_shape = (samples * target.sample,)
        plane, channel, sample = target.plane, target.channel, target.sample
    return y_shape, {
        "y_plane": 4 * plane, "y_channel": 4 * channel, "y_sample": 4 * sample,
        "dense": int(dense), "stream": int(4 * math.prod(y_shape) > _STREAM_BYTES),
    }  # fmt: skip


def _prepare_lists(plan: Plan, samples: int, dense: bool) -> _Forward:
    layout_, entries = plan.geometry, plan.forward
    shape, tiling, source = layout_.shape, layout_.forward, layout_.source
    out_d, out_h, out_w = shape.out
    y_shape, where = _target(plan, samples, dense)
    threads = threads_for(plan, samples)
    tile_parts, channel_parts = _split(threads, tiling.tiles, samples, shape.c_out)
    tile_bytes = tiling.rows * tiling.columns * VECTOR_BYTES
    slab = -(-shape.c_out // channel_parts) if entries.blocks > 1 else 0
    parts = tile_parts * channel_parts * samples
    scratch_part = slab * tile_bytes + tiling.rows * (tiling.columns + 1) * VECTOR_BYTES
    table = row_table(tiling, layout_.pitch, out_h, out_w)
    kernel = cpu.forward(tiling.rows, tiling.columns)
    job = kernel.job(
        parts=parts, starts=entries.starts.ctypes.data, offsets=entries.offsets.ctypes.data,
        samples=samples, blocks=entries.blocks, c_in=source.channels, c_out=shape.c_out,
        channel_parts=channel_parts, tile_parts=tile_parts, steps=tiling.planes // tiling.rows,
        sequence=tiling.tiles, x_sample=4 * source.sample, x_channel=4 * source.channel,
        x_plane=4 * source.plane,
        ahead=ahead(source, tiling.rows, max(layout_.source_taps), samples),
        scratch_part=scratch_part, out_depth=out_d, out_height=out_h, out_width=out_w,
        pitch=layout_.pitch, lanes=table.lanes.ctypes.data, firsts=table.firsts.ctypes.data,
        **where,
    )  # fmt: skip
    prepared = Prepared(kernel.address, job, threads, keeps=table)
    return _Forward(prepared, y_shape, (parts * scratch_part // 4,))


def _prepare_groups(plan: Plan, samples: int, dense: bool) -> _Forward:
    layout_ = plan.geometry
    shape, tiling, source = layout_.shape, layout_.grouped, layout_.source
    out_d, out_h, out_w = shape.out
    y_shape, where = _target(plan, samples, dense)
    threads = threads_for(plan, samples)
    # Small maps have few tiles: as many parts as there can be.
    tile_parts = min(tiling.tiles, -(-8 * threads // samples)) if samples else 1
    tile_bytes = tiling.rows * tiling.columns * VECTOR_BYTES
    scratch_part = (CHANNELS_AT_ONCE + 1) * tile_bytes + tiling.rows * VECTOR_BYTES
    table = row_table(tiling, layout_.pitch, out_h, out_w)
    taps = np.array(layout_.source_taps, np.int32)
    kernel = grouped.forward(tiling.rows, tiling.columns)
    job = kernel.job(
        parts=tile_parts * samples, taps=taps.ctypes.data, tap_count=len(taps), c_in=shape.c_in,
        c_out=shape.c_out, tile_parts=tile_parts, steps=tiling.planes // tiling.rows,
        sequence=tiling.tiles, x_sample=4 * source.sample, x_channel=4 * source.channel,
        x_plane=4 * source.plane, scratch_part=scratch_part, out_depth=out_d,
        lanes=table.lanes.ctypes.data, firsts=table.firsts.ctypes.data, **where,
    )  # fmt: skip
    prepared = Prepared(kernel.address, job, threads, keeps=(table, taps))
    scratch_shape = (tile_parts * samples * scratch_part // 4,)
    starts = -(-shape.c_out // CHANNELS_AT_ONCE) * CHANNELS_AT_ONCE
    return _Forward(prepared, y_shape, scratch_shape, starts)


def _pack_weights(weight: Tensor, plan: Plan, threads: int) -> Tensor:
    rows = -(-len(weight) // CHANNELS_AT_ONCE)
    columns = weight[0].numel()
    packed = buffers.empty((rows * CHANNELS_AT_ONCE * columns,))
    pack = plan.once(
        (_pack_weights, threads),
        lambda: Prepared(
            grouped.pack_weights.address,
            grouped.pack_weights.job(
                parts=rows, mask=plan.mask.data_ptr(), c_out=len(weight), columns=columns
            ),
            threads,
        ),
    )
    pack.run(weight=weight.data_ptr(), packed=packed.data_ptr())
    return packed


def ahead(grid: Grid, rows: int, furthest: int, samples: int) -> int:
    """Bytes to the plane that the next step along the depth is the first to read.

    0 for a buffer that a cache can hold: to ask for its lines costs more than to wait for them.
    """
    if 4 * samples * grid.sample < _PREFETCH_BYTES:
        return 0
    return 4 * (furthest // grid.plane + rows) * grid.plane


def _split(threads: int, sequence: int, samples: int, channels: int) -> tuple[int, int]:
    """Parts of the tiles of a sample, and of its channels."""
    if threads == 1:
        return 1, 1
    if samples * sequence >= 8 * threads:
        return -(-4 * threads // samples) if samples < 4 * threads else 1, 1
    return 1, min(channels, -(-2 * threads // samples))
