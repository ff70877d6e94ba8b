"""Driver of the fused block on the CPU: from tensors to jobs and back. float32 only."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.masked_conv3d import packing
from sparsekit.kernels.masked_conv3d import run as conv
from sparsekit.kernels.masked_conv3d.backward import BackwardPass
from sparsekit.kernels.masked_conv3d.geometry import BLOCK_GRADIENT_BYTES, Geometry, Shape
from sparsekit.kernels.masked_conv3d.plan import Plan
from sparsekit.kernels.norm_pool_relu import cpu as norm_pool
from sparsekit.kernels.norm_pool_relu import run as norm


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward pass needs."""

    padded: Tensor
    """The input as padded planes."""
    planes: Tensor
    """The convolution's output as its tiles wrote it."""
    pooled: Tensor
    """The block's output."""
    winner: Tensor
    """Which voxel of each window was the largest, 0 to 7 in C order; uint8."""
    statistics: Tensor
    """Mean as a sum of two numbers, and 1 / spread; (n * c_out, 3)."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, *, eps: float) -> Saved:
    """Run the block on `x` (n, c_in, d, h, w); the result is ``pooled``."""
    layout_ = plan.geometry
    samples, channels = x.shape[0], weight.shape[0]
    padded = packing.pack_source(x, plan)
    planes = conv.forward(padded, weight, bias, plan, samples, dense=False)
    target = layout_.target
    where = norm.Planes(
        layout_.shape.out, layout_.pitch, target.plane, target.channel, target.sample
    )
    pooled = norm.forward(planes, where, samples, channels, eps)
    return Saved(padded, planes, pooled.y, pooled.winner, pooled.statistics)


def plan_of(mask: Tensor, shape: Shape) -> Plan:
    """Plan of a mask whose gradient goes through a cache a few planes at a time."""
    return conv.plan_of(mask, shape, BLOCK_GRADIENT_BYTES)


def backward(
    saved: Saved, grad: Tensor, weight: Tensor, plan: Plan, *, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input (or None), the weight and the bias."""
    layout_ = plan.geometry
    grid, target = layout_.gradient, layout_.target
    samples, channels = grad.shape[:2]
    d, h, w = layout_.shape.out
    grad = grad.contiguous()
    pooled = norm.Pooled(saved.pooled, saved.winner, saved.statistics)
    slopes, bias_grad = norm.slopes(pooled, grad, layout_.shape.out)
    threads = norm.threads_for(saved.planes.numel())
    at_once = 1 if layout_.resident else samples
    g = buffers.empty((at_once * grid.sample,))
    parts = min(at_once * channels, 2 * threads)
    scratch = buffers.empty((parts * 2 * grid.plane,))
    lead = grid.interior // grid.plane
    job = norm_pool.backward.job(
        parts=parts, scratch=scratch.data_ptr(), scratch_part=8 * grid.plane,
        x=saved.planes.data_ptr(), y=saved.pooled.data_ptr(), winner=saved.winner.data_ptr(),
        statistics=saved.statistics.data_ptr(), slopes=slopes.data_ptr(), grad=grad.data_ptr(),
        g=g.data_ptr(), channels=channels, depth=d, height=h, width=w, pitch=4 * layout_.pitch,
        plane=4 * target.plane, channel=4 * target.channel, sample=4 * target.sample,
        g_plane=4 * grid.plane, g_channel=4 * grid.channel, g_sample=4 * grid.sample,
        g_inner=4 * (grid.interior - lead * grid.plane),
    )  # fmt: skip
    steps = list(_steps(layout_, samples))
    work = BackwardPass(saved.padded, weight, plan, samples, steps[0].end, at_once, need_x=need_x)
    for step in steps:
        job.set(step.fields)
        parallel.run(norm_pool.backward.address, job, threads)
        work.run(g, step.sample, at_once, step.begin, step.end)
    work.finish()
    return work.x, work.weight, bias_grad.sum(dim=0)


@dataclass(frozen=True, slots=True)
class _Step:
    """One range of planes of the backward pass."""

    fields: dict[str, int]
    """Of the job that fills the padded gradient."""
    sample: int
    begin: int
    end: int
    """Planes of the input whose gradient can be computed then."""


def _steps(layout_: Geometry, samples: int) -> Iterator[_Step]:
    depth = layout_.shape.out[0]
    lead = layout_.gradient.interior // layout_.gradient.plane
    planes = layout_.gradient.channel // layout_.gradient.plane
    if not layout_.resident:
        fields = {
            "first": 0, "last": samples, "begin": 0, "end": depth, "at": lead, "clear_to": planes
        }  # fmt: skip
        yield _Step(fields, 0, 0, layout_.backward.planes)
        return
    size, reach = layout_.shape.size[0], layout_.reach
    for sample in range(samples):
        # Padded planes are numbered from the start of the lead; `origin` is the first in memory.
        done = filled = origin = carried = carried_from = 0
        at = lead
        while done < size:
            room = planes - at
            count = min(depth - filled, room - room % 2)
            after = at + count
            filled += count
            if filled == depth:
                # Zeros follow, as many as fit.
                after = planes
            fields = {
                "first": sample, "last": sample + 1, "begin": filled - count, "end": filled,
                "at": at, "carried": carried, "carried_from": carried_from,
                # The zeros that end a plane's last row are the first of the next plane.
                "clear_to": min(planes, after + 1),
            }  # fmt: skip
            ready = min(size, origin + after - reach)
            yield _Step(fields, sample, done, ready)
            done = ready
            carried_from, carried = done - origin, after - (done - origin)
            origin, at = done, carried
