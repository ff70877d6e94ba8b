"""Drivers of the CPU kernels: from tensors to jobs and back. float32 only."""

import numpy as np
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.masked_conv3d import cost, cpu, grouped, layout
from sparsekit.kernels.masked_conv3d.geometry import (
    CHANNELS_AT_ONCE,
    Geometry,
    Grid,
    Shape,
    block_channels,
    geometry,
)
from sparsekit.kernels.masked_conv3d.plan import Plan, PlanCache, build
from sparsekit.kernels.masked_conv3d.rows import row_table
from sparsekit.kernels.vector import LANES, REGISTERS, VECTOR_BYTES
from sparsekit.types import Size3

# Work below which a second thread costs more than it brings, in multiply-adds.
_WORK_PER_THREAD = 1 << 18
_BYTES_PER_THREAD = 1 << 18
# Results larger than this do not stay in a cache until they are read.
_STREAM_BYTES = 16 << 20
_PREFETCH_BYTES = 1 << 20


def shape_of(
    x: Tensor, weight: Tensor, stride: Size3, padding: Size3, dilation: Size3, groups: int
) -> Shape:
    """Sizes of a convolution of `x` (n, c_in, d, h, w) with `weight`."""
    d, h, w = x.shape[2:]
    kd, kh, kw = weight.shape[2:]
    return Shape(
        x.shape[1], weight.shape[0], (d, h, w), (kd, kh, kw), stride, padding, dilation, groups
    )


def plan_of(mask: Tensor, shape: Shape, gradient_bytes: int | None = None) -> Plan:
    """Plan of a mask, from its cache or new; see `geometry` for `gradient_bytes`."""
    cache = PlanCache.of(mask)

    def make() -> Plan:
        layout_ = geometry(shape, LANES, REGISTERS, gradient_bytes)
        sizes = [
            block_channels(layout_, cache.density, grid, tiling)
            for grid, tiling in (
                (layout_.source, layout_.forward),
                (layout_.gradient, layout_.backward),
            )
        ]
        return build(cache.mask, layout_, sizes[0], sizes[1])

    plan: Plan = cache.get((shape, gradient_bytes), make)
    return plan


def pack_source(x: Tensor, layout_: Geometry) -> Tensor:
    """Copy the input (n, c_in, d, h, w) into padded planes, or into its classes."""
    grid, shape = layout_.source, layout_.shape
    padded = buffers.empty((max(1, x.shape[0]) * grid.sample,))
    if layout_.classes != (1, 1, 1):
        _move_classes(x.contiguous(), padded, layout_, to_padded=True)
    else:
        _pack(x.contiguous(), padded, None, grid, layout_.pitch, shape.padding)
    return padded


def pack_gradient(grad: Tensor, layout_: Geometry) -> tuple[Tensor, Tensor]:
    """Copy the gradient of the output into padded planes; also return its sums (n, c_out)."""
    grid = layout_.gradient
    padded = buffers.empty((grad.shape[0] * grid.sample,))
    sums = buffers.empty(tuple(grad.shape[:2]))
    lead_d, rest = divmod(grid.interior, grid.plane)
    lead_h, lead_w = divmod(rest, layout_.pitch)
    _pack(grad.contiguous(), padded, sums, grid, layout_.pitch, (lead_d, lead_h, lead_w))
    return padded, sums


def _pack(
    x: Tensor, padded: Tensor, sums: Tensor | None, grid: Grid, pitch: int, before: Size3
) -> None:
    n, c, d, h, w = x.shape
    job = layout.pack.job(
        parts=n * c, source=x.data_ptr(), target=padded.data_ptr(),
        sums=0 if sums is None else sums.data_ptr(), channels=c, samples=n,
        source_voxels=d * h * w, depth=d, height=h, width=w,
        before_d=before[0], before_h=before[1], before_w=before[2],
        pitch=pitch, plane=grid.plane, channel=grid.channel, sample=grid.sample,
    )  # fmt: skip
    parallel.run(layout.pack.address, job, parallel.thread_count(4 * x.numel(), _BYTES_PER_THREAD))


def _move_classes(dense: Tensor, padded: Tensor, layout_: Geometry, *, to_padded: bool) -> None:
    grid, shape = layout_.source, layout_.shape
    n, c, d, h, w = dense.shape
    reach = [
        e * (k - 1) // s for e, k, s in zip(shape.dilation, shape.kernel, shape.stride, strict=True)
    ]
    if not to_padded:
        grid = layout_.source_gradient
    job = layout.move_classes.job(
        parts=n * c, dense=dense.data_ptr(), padded=padded.data_ptr(), channels=c, samples=n,
        to_padded=int(to_padded), depth=d, height=h, width=w,
        stride_d=shape.stride[0], stride_h=shape.stride[1], stride_w=shape.stride[2],
        pad_d=shape.padding[0], pad_h=shape.padding[1], pad_w=shape.padding[2],
        size_d=shape.out[0] + reach[0], size_h=shape.out[1] + reach[1],
        size_w=shape.out[2] + reach[2],
        pitch=layout_.pitch, plane=grid.plane, channel=grid.channel, sample=grid.sample,
    )  # fmt: skip
    parallel.run(layout.move_classes.address, job, 1)


def _gather(weight: Tensor, index: np.ndarray, threads: int) -> np.ndarray:
    values = np.empty(len(index), np.float32)
    job = layout.gather.job(
        parts=threads, weight=weight.data_ptr(), index=index.ctypes.data,
        values=values.ctypes.data, count=len(index),
    )  # fmt: skip
    parallel.run(layout.gather.address, job, threads)
    return values


def _threads(plan: Plan, samples: int) -> int:
    tiles = plan.geometry.forward
    vectors = samples * tiles.tiles * tiles.rows * tiles.columns
    return parallel.thread_count(plan.forward.entries * vectors * LANES, _WORK_PER_THREAD)


def _takes_grouped(plan: Plan, active: Tensor | None) -> bool:
    """Whether several output channels at a time, zeros included, are faster than a list."""
    return active is None and cost.grouped_pays(plan.geometry.shape, plan.density)


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
    layout_, shape, entries = plan.geometry, plan.geometry.shape, plan.forward
    tiling, source = layout_.forward, layout_.source
    out_d, out_h, out_w = shape.out
    if dense:
        y = buffers.empty((samples, shape.c_out, out_d, out_h, out_w))
        y_plane, y_channel = out_h * out_w, out_d * out_h * out_w
        y_sample = shape.c_out * y_channel
    else:
        target = layout_.target
        y = buffers.empty((samples * target.sample,))
        y_plane, y_channel, y_sample = target.plane, target.channel, target.sample
    if y.numel() == 0:
        return y
    threads = _threads(plan, samples)
    if _takes_grouped(plan, active):
        _forward_grouped(padded, weight, bias, plan, samples, y, dense, threads)
        return y
    values = _gather(weight, entries.index, threads)
    sequence = tiling.tiles
    tile_parts, channel_parts = _split(threads, sequence, samples, shape.c_out)
    tile_bytes = tiling.rows * tiling.columns * VECTOR_BYTES
    slab = -(-shape.c_out // channel_parts) if entries.blocks > 1 else 0
    parts = tile_parts * channel_parts * samples
    scratch_part = slab * tile_bytes + tiling.rows * (tiling.columns + 1) * VECTOR_BYTES
    table = row_table(tiling, layout_.pitch, out_h, out_w)
    scratch = buffers.empty((parts * scratch_part // 4,))
    kernel = cpu.forward(tiling.rows, tiling.columns)
    job = kernel.job(
        parts=parts, x=padded.data_ptr(), y=y.data_ptr(), starts=entries.starts.ctypes.data,
        offsets=entries.offsets.ctypes.data, values=values.ctypes.data,
        bias=0 if bias is None else bias.data_ptr(), scratch=scratch.data_ptr(),
        active=0 if active is None else active.data_ptr(), samples=samples, blocks=entries.blocks,
        c_in=source.channels, c_out=shape.c_out, channel_parts=channel_parts,
        tile_parts=tile_parts, steps=tiling.planes // tiling.rows, sequence=sequence,
        x_sample=4 * source.sample, x_channel=4 * source.channel, x_plane=4 * source.plane,
        ahead=_ahead(source, tiling.rows, max(layout_.source_taps), samples),
        y_sample=4 * y_sample, y_channel=4 * y_channel, y_plane=4 * y_plane,
        scratch_part=scratch_part, out_depth=out_d, out_height=out_h, out_width=out_w,
        pitch=layout_.pitch, dense=int(dense),
        stream=int(4 * y.numel() > _STREAM_BYTES),
        lanes=table.lanes.ctypes.data, firsts=table.firsts.ctypes.data,
    )  # fmt: skip
    parallel.run(kernel.address, job, threads)
    return y


def _forward_grouped(
    padded: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, samples: int, y: Tensor,
    dense: bool, threads: int,
) -> None:  # fmt: skip
    layout_, shape = plan.geometry, plan.geometry.shape
    tiling, source, target = layout_.grouped, layout_.source, layout_.target
    out_d, out_h, out_w = shape.out
    rows = -(-shape.c_out // CHANNELS_AT_ONCE)
    columns = weight[0].numel()
    packed = buffers.empty((rows * CHANNELS_AT_ONCE * columns,))
    parallel.run(
        grouped.pack_weights.address,
        grouped.pack_weights.job(
            parts=rows, weight=weight.data_ptr(), mask=plan.mask.data_ptr(),
            packed=packed.data_ptr(), c_out=shape.c_out, columns=columns,
        ),
        threads,
    )  # fmt: skip
    start = np.zeros(rows * CHANNELS_AT_ONCE, np.float32)
    if bias is not None:
        start[: shape.c_out] = bias.numpy()
    taps = np.array(layout_.source_taps, np.int32)
    plane, channel, sample = target.plane, target.channel, target.sample
    if dense:
        plane, channel = out_h * out_w, out_d * out_h * out_w
        sample = shape.c_out * channel
    # Small maps have few tiles: as many parts as there can be.
    tile_parts = min(tiling.tiles, -(-8 * threads // samples))
    tile_bytes = tiling.rows * tiling.columns * VECTOR_BYTES
    scratch_part = (CHANNELS_AT_ONCE + 1) * tile_bytes + tiling.rows * VECTOR_BYTES
    table = row_table(tiling, layout_.pitch, out_h, out_w)
    scratch = buffers.empty((tile_parts * samples * scratch_part // 4,))
    kernel = grouped.forward(tiling.rows, tiling.columns)
    job = kernel.job(
        parts=tile_parts * samples, x=padded.data_ptr(), y=y.data_ptr(),
        weights=packed.data_ptr(), bias=start.ctypes.data, taps=taps.ctypes.data,
        tap_count=len(taps), scratch=scratch.data_ptr(), c_in=shape.c_in, c_out=shape.c_out,
        tile_parts=tile_parts, steps=tiling.planes // tiling.rows, sequence=tiling.tiles,
        x_sample=4 * source.sample, x_channel=4 * source.channel, x_plane=4 * source.plane,
        y_sample=4 * sample, y_channel=4 * channel, y_plane=4 * plane,
        scratch_part=scratch_part, out_depth=out_d, dense=int(dense),
        stream=int(4 * y.numel() > _STREAM_BYTES), lanes=table.lanes.ctypes.data,
        firsts=table.firsts.ctypes.data,
    )  # fmt: skip
    parallel.run(kernel.address, job, threads)


def _ahead(grid: Grid, rows: int, furthest: int, samples: int) -> int:
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


class BackwardPass:
    """Both gradients of one convolution, computed over one range of planes after another.

    Parameters
    ----------
    padded : Tensor
        From `pack_source`.
    weight : Tensor, contiguous
    plan : Plan
    samples : int
    need_x : bool
        Whether to compute the gradient of the input.
    """

    def __init__(
        self, padded: Tensor, weight: Tensor, plan: Plan, samples: int, *, need_x: bool
    ) -> None:
        self.layout = layout_ = plan.geometry
        self.plan = plan
        shape, entries, tiling = layout_.shape, plan.backward, layout_.backward
        self.padded = padded
        self.samples = samples
        self.threads = _threads(plan, samples)
        d, h, w = shape.size
        self.x = buffers.empty((samples, shape.c_in, d, h, w)) if need_x else None
        self.strided = layout_.classes != (1, 1, 1)
        self.planes = self.x
        target = layout_.source_gradient
        plane, channel, sample = h * w, d * h * w, shape.c_in * d * h * w
        if self.strided:
            plane, channel, sample = target.plane, target.channel, target.sample
            if need_x:
                self.planes = buffers.empty((samples * sample,))
        self.weight = buffers.empty(tuple(weight.shape))
        self._values = _gather(weight, entries.index, self.threads)
        lists = entries.blocks * entries.rows
        self._sums_part = entries.entries + cpu.SUMS_AT_ONCE * (lists + 1)
        self._sums = np.zeros(self.threads * self._sums_part, np.float32)
        self._kernel = cpu.backward(tiling.rows, tiling.columns)
        self._table = row_table(tiling, layout_.pitch, h, w)
        self._job = self._kernel.job(
            starts=entries.starts.ctypes.data, offsets=entries.offsets.ctypes.data,
            values=self._values.ctypes.data, sums=self._sums.ctypes.data, blocks=entries.blocks,
            c_out=shape.c_out, rows=entries.rows, g_sample=4 * layout_.gradient.sample,
            g_channel=4 * layout_.gradient.channel, g_plane=4 * layout_.gradient.plane,
            ahead=_ahead(layout_.gradient, tiling.rows, max(layout_.gradient_taps), samples),
            x_sample=4 * layout_.source.sample, x_channel=4 * layout_.source.channel,
            x_plane=4 * layout_.source.plane, dx_sample=4 * sample, dx_channel=4 * channel,
            dx_plane=4 * plane, sums_part=4 * self._sums_part, dense=int(not self.strided),
            lanes=self._table.lanes.ctypes.data, firsts=self._table.firsts.ctypes.data,
        )  # fmt: skip

    def run(
        self, gradient: Tensor, sample: int, samples: int, begin: int, end: int,
        active: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add what planes begin..end of the input meet.

        Parameters
        ----------
        gradient : Tensor
            Padded planes of the output's gradient, of which the first is the first that plane
            `begin` meets.
        sample, samples : int
            The first sample and how many of them `gradient` holds.
        begin, end : int
            A multiple of the tiles' planes each, or the last plane.
        active : Tensor, (samples * tiles,), uint8, optional
            Tiles with a 0 meet zeros of the gradient only.
        """
        layout_, entries, tiling = self.layout, self.plan.backward, self.layout.backward
        job, threads = self._job, self.threads
        steps = (end - begin) // tiling.rows
        sequence = steps * tiling.per_plane
        tile_parts, row_parts = threads, 1
        if samples * sequence < 4 * threads:
            tile_parts, row_parts = 1, min(2 * threads if threads > 1 else 1, entries.rows)
        edges = entries.edges(row_parts)
        tile_bytes = tiling.rows * tiling.columns * VECTOR_BYTES
        slab = int((edges[1:] - edges[:-1]).max()) if entries.blocks > 1 else 0
        scratch_part = slab * tile_bytes + cpu.WAITING * VECTOR_BYTES
        scratch = buffers.empty((tile_parts * row_parts * scratch_part // 4,))
        job["parts"] = tile_parts * row_parts
        job["g"] = gradient.data_ptr()
        source = sample * layout_.source.sample + layout_.source.interior
        job["x"] = self.padded.data_ptr() + 4 * (source + begin * layout_.source.plane)
        job["dx"] = 0
        if self.planes is not None:
            place = sample * int(job["dx_sample"]) + begin * int(job["dx_plane"])
            job["dx"] = self.planes.data_ptr() + place
        job["scratch"] = scratch.data_ptr()
        job["scratch_part"] = scratch_part
        job["active"] = 0 if active is None else active.data_ptr()
        job["samples"] = samples
        job["edges"] = edges.ctypes.data
        job["tile_parts"] = tile_parts
        job["row_parts"] = row_parts
        job["steps"] = steps
        job["sequence"] = sequence
        job["depth"] = layout_.shape.size[0] - begin
        if self.strided:
            job["depth"] = tiling.planes
        parallel.run(self._kernel.address, job, threads)

    def finish(self) -> None:
        """Complete `x` and `weight`."""
        if self.x is not None and self.planes is not None and self.strided:
            _move_classes(self.x, self.planes, self.layout, to_padded=False)
        _scatter(self.weight, self.plan, self._sums, self._sums_part, self.threads, self.threads)


def backward(
    gradient: Tensor,
    padded: Tensor,
    weight: Tensor,
    plan: Plan,
    samples: int,
    *,
    need_x: bool = True,
    active: Tensor | None = None,
) -> BackwardPass:
    """Both gradients, in ``x`` and ``weight`` of the result, from all planes at once."""
    work = BackwardPass(padded, weight, plan, samples, need_x=need_x)
    work.run(gradient, 0, samples, 0, plan.geometry.backward.planes, active)
    work.finish()
    return work


def _scatter(
    grad: Tensor, plan: Plan, sums: np.ndarray, sums_part: int, tile_parts: int, threads: int
) -> None:
    entries = plan.backward
    grad.zero_()
    lists = entries.blocks * entries.rows
    job = layout.scatter.job(
        parts=threads, grad=grad.data_ptr(), index=entries.index.ctypes.data,
        starts=entries.starts.ctypes.data, sums=sums.ctypes.data, sums_part=4 * sums_part,
        tile_parts=tile_parts, rows=lists, spread=cpu.SUMS_AT_ONCE,
    )  # fmt: skip
    parallel.run(layout.scatter.address, job, threads)


__all__ = [
    "BackwardPass", "Kernel", "backward", "forward", "pack_gradient", "pack_source", "plan_of",
    "shape_of",
]  # fmt: skip
