"""Driver of the fused block on the CPU: from tensors to jobs and back. float32 only."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.conv_norm_pool_relu import norm_pool
from sparsekit.kernels.masked_conv3d import run as conv
from sparsekit.kernels.masked_conv3d.plan import Plan
from sparsekit.kernels.vector import LANES

_BYTES_PER_THREAD = 1 << 18
# Results larger than this do not stay in a cache until they are read.
_STREAM_BYTES = 16 << 20


@cache
def _forward_kernel(eps: float) -> Kernel:
    made: Kernel = norm_pool.make_forward(eps)
    return made


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
    padded = conv.pack_source(x, layout_)
    planes = conv.forward(padded, weight, bias, plan, samples, dense=False)
    d, h, w = layout_.shape.out
    pooled = buffers.empty((samples, channels, d // 2, h // 2, w // 2))
    winner = torch.empty(pooled.shape, dtype=torch.uint8, device="cpu")
    statistics = buffers.empty((samples * channels, 3))
    scratch = buffers.empty((samples * channels * 2 * LANES,))
    target = layout_.target
    kernel = _forward_kernel(eps)
    job = kernel.job(
        parts=samples * channels, x=planes.data_ptr(), y=pooled.data_ptr(),
        winner=winner.data_ptr(), statistics=statistics.data_ptr(), scratch=scratch.data_ptr(),
        channels=channels, depth=d, height=h, width=w, pitch=4 * layout_.pitch,
        plane=4 * target.plane, channel=4 * target.channel, sample=4 * target.sample,
    )  # fmt: skip
    parallel.run(kernel.address, job, parallel.thread_count(4 * planes.numel(), _BYTES_PER_THREAD))
    return Saved(padded, planes, pooled, winner, statistics)


def backward(
    saved: Saved, grad: Tensor, weight: Tensor, plan: Plan, *, need_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the input (or None), the weight and the bias."""
    layout_ = plan.geometry
    grid, target = layout_.gradient, layout_.target
    samples, channels = grad.shape[:2]
    d, h, w = layout_.shape.out
    g = buffers.empty((samples * grid.sample,))
    bias_grad = buffers.empty((samples, channels))
    grad = grad.contiguous()
    threads = parallel.thread_count(4 * g.numel(), _BYTES_PER_THREAD)
    parts = min(samples * channels, 2 * threads)
    scratch = buffers.empty((parts * 3 * grid.plane,))
    job = norm_pool.backward.job(
        parts=parts, scratch=scratch.data_ptr(), scratch_part=12 * grid.plane, samples=samples,
        stream=int(4 * g.numel() > _STREAM_BYTES), x=saved.planes.data_ptr(), y=saved.pooled.data_ptr(),
        winner=saved.winner.data_ptr(), statistics=saved.statistics.data_ptr(),
        grad=grad.data_ptr(), g=g.data_ptr(), bias_grad=bias_grad.data_ptr(), channels=channels,
        depth=d, height=h, width=w, pitch=4 * layout_.pitch, plane=4 * target.plane,
        channel=4 * target.channel, sample=4 * target.sample, g_plane=4 * grid.plane,
        g_channel=4 * grid.channel, g_sample=4 * grid.sample, g_interior=4 * grid.interior,
    )  # fmt: skip
    parallel.run(norm_pool.backward.address, job, threads)
    found = conv.backward(g, saved.padded, weight, plan, samples, need_x=need_x)
    return found.x, found.weight, bias_grad.sum(dim=0)
