"""Driver of the CPU kernels' backward pass: from tensors to jobs and back. float32 only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.kernels import buffers
from sparsekit.kernels.masked_conv3d import cpu, packing
from sparsekit.kernels.masked_conv3d.plan import Plan
from sparsekit.kernels.masked_conv3d.rows import row_table
from sparsekit.kernels.masked_conv3d.run import ahead, threads_for
from sparsekit.kernels.parallel import Prepared
from sparsekit.kernels.vector import VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class _Backward:
    """A backward pass of which only the tensors are unknown."""

    kernel: Prepared
    x_sample: int
    """Bytes from one sample of the input's gradient to the next, as the tiles write it."""
    x_plane: int
    tile_parts: int
    """Parts of the tiles, each with sums of its own."""
    sums_part: int
    scratch_part: int
    parts: int


class BackwardPass:
    """Both gradients of one convolution, computed over one range of planes after another.

    Parameters
    ----------
    padded : Tensor
        From `packing.pack_source`.
    weight : Tensor, contiguous
    plan : Plan
    samples : int
    planes : int
        Of the input, in the first range.
    at_once : int
        Samples in each range.
    need_x : bool
        Whether to compute the gradient of the input.
    """

    def __init__(
        self, padded: Tensor, weight: Tensor, plan: Plan, samples: int, planes: int, at_once: int,
        *, need_x: bool,
    ) -> None:  # fmt: skip
        self._layout = layout_ = plan.geometry
        self._plan = plan
        shape = layout_.shape
        self._work = work = plan.once(
            (BackwardPass, samples, planes, at_once, torch.get_num_threads()),
            lambda: _prepare(plan, samples, planes, at_once),
        )
        self._padded = padded
        self.x = buffers.empty((samples, shape.c_in, *shape.size)) if need_x else None
        self._strided = layout_.classes != (1, 1, 1)
        self._target = self.x
        if self._strided and need_x:
            self._target = buffers.empty((samples * layout_.source_gradient.sample,))
        self.weight = buffers.empty(tuple(weight.shape))
        self._values = packing.gather(weight, plan, plan.backward, work.kernel.threads)
        self._sums = buffers.empty((work.tile_parts * work.sums_part,))
        self._begun = False

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
        layout_, work = self._layout, self._work
        tiling, source = layout_.backward, layout_.source
        steps = (end - begin) // tiling.rows
        scratch = buffers.empty((work.parts * work.scratch_part // 4,))
        x = sample * source.sample + source.interior + begin * source.plane
        dx = 0
        if self._target is not None:
            dx = self._target.data_ptr() + sample * work.x_sample + begin * work.x_plane
        depth = tiling.planes if self._strided else layout_.shape.size[0] - begin
        work.kernel.run(
            g=gradient.data_ptr(), x=self._padded.data_ptr() + 4 * x, dx=dx,
            values=self._values.data_ptr(), sums=self._sums.data_ptr(),
            scratch=scratch.data_ptr(), active=0 if active is None else active.data_ptr(),
            samples=samples, steps=steps, sequence=steps * tiling.per_plane, depth=depth,
            fresh=int(not self._begun),
        )  # fmt: skip
        self._begun = True

    def finish(self) -> None:
        """Complete `x` and `weight`."""
        if self.x is not None and self._target is not None and self._strided:
            packing.move_classes(self.x, self._target, self._plan, to_padded=False)
        work = self._work
        packing.scatter(
            self.weight, self._plan, self._sums, work.sums_part, work.tile_parts,
            work.kernel.threads,
        )  # fmt: skip


def _prepare(plan: Plan, samples: int, planes: int, at_once: int) -> _Backward:
    layout_, entries = plan.geometry, plan.backward
    shape, tiling = layout_.shape, layout_.backward
    source, gradient = layout_.source, layout_.gradient
    d, h, w = shape.size
    strided = layout_.classes != (1, 1, 1)
    plane, channel, sample = h * w, d * h * w, shape.c_in * d * h * w
    if strided:
        target = layout_.source_gradient
        plane, channel, sample = target.plane, target.channel, target.sample
    threads = threads_for(plan, samples)
    tile_parts, row_parts = threads, 1
    if at_once * (planes // tiling.rows) * tiling.per_plane < 4 * threads:
        tile_parts, row_parts = 1, min(2 * threads if threads > 1 else 1, entries.rows)
    edges = entries.edges(row_parts)
    # Sums are taken in groups, of which the last of a row is cut short by the next row's first.
    sums_part = entries.entries + cpu.SUMS_AT_ONCE * (entries.blocks * entries.rows + 1)
    slab = int((edges[1:] - edges[:-1]).max()) if entries.blocks > 1 else 0
    scratch_part = (slab * tiling.rows * tiling.columns + cpu.WAITING) * VECTOR_BYTES
    table = row_table(tiling, layout_.pitch, h, w)
    kernel = cpu.backward(tiling.rows, tiling.columns)
    parts = tile_parts * row_parts
    job = kernel.job(
        parts=parts, starts=entries.starts.ctypes.data, offsets=entries.offsets.ctypes.data,
        blocks=entries.blocks, c_out=shape.c_out, rows=entries.rows, edges=edges.ctypes.data,
        tile_parts=tile_parts, row_parts=row_parts, g_sample=4 * gradient.sample,
        g_channel=4 * gradient.channel, g_plane=4 * gradient.plane,
        ahead=ahead(gradient, tiling.rows, max(layout_.gradient_taps), samples),
        x_sample=4 * source.sample, x_channel=4 * source.channel, x_plane=4 * source.plane,
        dx_sample=4 * sample, dx_channel=4 * channel, dx_plane=4 * plane,
        sums_part=4 * sums_part, scratch_part=scratch_part, dense=int(not strided),
        lanes=table.lanes.ctypes.data, firsts=table.firsts.ctypes.data,
    )  # fmt: skip
    prepared = Prepared(kernel.address, job, threads, keeps=(table, edges))
    return _Backward(prepared, 4 * sample, 4 * plane, tile_parts, sums_part, scratch_part, parts)


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
    planes = plan.geometry.backward.planes
    work = BackwardPass(padded, weight, plan, samples, planes, samples, need_x=need_x)
    work.run(gradient, 0, samples, 0, planes, active)
    work.finish()
    return work
