"""Drivers that bring tensors to padded planes and lists, and back. float32 only."""

import torch
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.masked_conv3d import cpu, layout
from sparsekit.kernels.masked_conv3d.geometry import Geometry, Grid
from sparsekit.kernels.masked_conv3d.plan import Plan, WeightList
from sparsekit.kernels.parallel import Prepared
from sparsekit.types import Size3

_BYTES_PER_THREAD = 1 << 18


def pack_source(x: Tensor, plan: Plan) -> Tensor:
    """Copy the input (n, c_in, d, h, w) into padded planes, or into its classes."""
    samples, layout_ = x.shape[0], plan.geometry
    x = x.contiguous()
    padded = buffers.empty((max(1, samples) * layout_.source.sample,))
    if layout_.classes != (1, 1, 1):
        move_classes(x, padded, plan, to_padded=True)
        return padded
    pack = plan.once(
        (pack_source, samples, torch.get_num_threads()),
        lambda: _prepare_pack(
            samples, layout_.shape.c_in, layout_.shape.size, layout_.source, layout_.pitch,
            layout_.shape.padding,
        ),
    )  # fmt: skip
    pack.run(source=x.data_ptr(), target=padded.data_ptr())
    return padded


def pack_gradient(grad: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Copy the gradient of the output into padded planes; also return its sums (n, c_out)."""
    samples, layout_ = grad.shape[0], plan.geometry
    grad = grad.contiguous()
    padded = buffers.empty((samples * layout_.gradient.sample,))
    sums = buffers.empty((samples, layout_.shape.c_out))
    pack = plan.once(
        (pack_gradient, samples, torch.get_num_threads()),
        lambda: _prepare_pack(
            samples, layout_.shape.c_out, layout_.shape.out, layout_.gradient, layout_.pitch,
            _lead(layout_),
        ),
    )  # fmt: skip
    pack.run(source=grad.data_ptr(), target=padded.data_ptr(), sums=sums.data_ptr())
    return padded, sums


def _lead(layout_: Geometry) -> Size3:
    planes, rest = divmod(layout_.gradient.interior, layout_.gradient.plane)
    rows, columns = divmod(rest, layout_.pitch)
    return planes, rows, columns


def _prepare_pack(
    samples: int, channels: int, size: Size3, grid: Grid, pitch: int, before: Size3
) -> Prepared:
    d, h, w = size
    job = layout.pack.job(
        parts=samples * channels, channels=channels, samples=samples, source_voxels=d * h * w,
        depth=d, height=h, width=w, before_d=before[0], before_h=before[1], before_w=before[2],
        pitch=pitch, plane=grid.plane, channel=grid.channel, sample=grid.sample,
    )  # fmt: skip
    count = 4 * samples * channels * d * h * w
    return Prepared(layout.pack.address, job, parallel.thread_count(count, _BYTES_PER_THREAD))


def move_classes(dense: Tensor, padded: Tensor, plan: Plan, *, to_padded: bool) -> None:
    """Move between the input's grid and its classes of a strided convolution, either way."""
    layout_, samples = plan.geometry, dense.shape[0]
    shape = layout_.shape
    grid = layout_.source if to_padded else layout_.source_gradient

    def prepare() -> Prepared:
        reach = [
            e * (k - 1) // s
            for e, k, s in zip(shape.dilation, shape.kernel, shape.stride, strict=True)
        ]
        d, h, w = shape.size
        job = layout.move_classes.job(
            parts=samples * shape.c_in, channels=shape.c_in, samples=samples,
            to_padded=int(to_padded), depth=d, height=h, width=w,
            stride_d=shape.stride[0], stride_h=shape.stride[1], stride_w=shape.stride[2],
            pad_d=shape.padding[0], pad_h=shape.padding[1], pad_w=shape.padding[2],
            size_d=shape.out[0] + reach[0], size_h=shape.out[1] + reach[1],
            size_w=shape.out[2] + reach[2],
            pitch=layout_.pitch, plane=grid.plane, channel=grid.channel, sample=grid.sample,
        )  # fmt: skip
        return Prepared(layout.move_classes.address, job, 1)

    move = plan.once((move_classes, samples, to_padded), prepare)
    move.run(dense=dense.data_ptr(), padded=padded.data_ptr())


def gather(weight: Tensor, plan: Plan, entries: WeightList, threads: int) -> Tensor:
    """Values of a contiguous weight in the order of one of the plan's lists."""
    values = buffers.empty((entries.entries,))

    def prepare() -> Prepared:
        job = layout.gather.job(
            parts=threads, index=entries.index.ctypes.data, count=entries.entries
        )
        return Prepared(layout.gather.address, job, threads)

    collect = plan.once((gather, entries is plan.forward, threads), prepare)
    collect.run(weight=weight.data_ptr(), values=values.data_ptr())
    return values


def scatter(
    grad: Tensor, plan: Plan, sums: Tensor, sums_part: int, tile_parts: int, threads: int
) -> None:
    """Add the partial sums of each weight's gradient and put them in their places."""
    grad.zero_()
    entries = plan.backward

    def prepare() -> Prepared:
        job = layout.scatter.job(
            parts=threads, index=entries.index.ctypes.data, starts=entries.starts.ctypes.data,
            sums_part=4 * sums_part, tile_parts=tile_parts, rows=entries.blocks * entries.rows,
            spread=cpu.SUMS_AT_ONCE,
        )  # fmt: skip
        return Prepared(layout.scatter.address, job, threads)

    spread = plan.once((scatter, tile_parts, threads), prepare)
    spread.run(grad=grad.data_ptr(), sums=sums.data_ptr())
