"""Driver of the CPU kernels on tensors in torch's layout. float32 only."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.norm_pool_relu import cpu
from sparsekit.kernels.vector import LANES
from sparsekit.types import Size3

_BYTES_PER_THREAD = 1 << 18


@cache
def forward_kernel(eps: float) -> Kernel:
    """Kernel of the forward pass for one ``eps``."""
    made: Kernel = cpu.make_forward(eps)
    return made


def threads_for(values: int) -> int:
    """Threads for a pass over so many float32 numbers."""
    return parallel.thread_count(4 * values, _BYTES_PER_THREAD)


@dataclass(frozen=True, slots=True)
class Planes:
    """Where the maps of a tensor stand; all in float32 numbers."""

    size: Size3
    pitch: int
    plane: int
    channel: int
    sample: int


@dataclass(frozen=True, slots=True)
class Pooled:
    """Result of the forward pass and what the backward pass needs of it."""

    y: Tensor
    """(n, c, d // 2, h // 2, w // 2)."""
    winner: Tensor
    """Which voxel of each window was the largest, 0 to 7 in C order; uint8, and a vector or more
    behind them."""
    statistics: Tensor
    """Mean as a sum of two numbers, and 1 / spread; (n * c, 3)."""


def dense_planes(x: Tensor) -> Planes:
    """Planes of a contiguous tensor (n, c, d, h, w)."""
    _, c, d, h, w = x.shape
    return Planes((d, h, w), w, h * w, d * h * w, c * d * h * w)


def forward(x: Tensor, planes: Planes, samples: int, channels: int, eps: float) -> Pooled:
    """Normalise, pool and cut off the maps in `x`."""
    d, h, w = planes.size
    y = buffers.empty((samples, channels, d // 2, h // 2, w // 2))
    # Readers of the last window take a whole vector.
    winner = buffers.empty((-(-(y.numel() + LANES) // 4),)).view(torch.uint8)
    statistics = buffers.empty((samples * channels, 3))
    scratch = buffers.empty((samples * channels * 2 * LANES,))
    kernel = forward_kernel(eps)
    job = kernel.job(
        parts=samples * channels, x=x.data_ptr(), y=y.data_ptr(), winner=winner.data_ptr(),
        statistics=statistics.data_ptr(), scratch=scratch.data_ptr(), channels=channels,
        depth=d, height=h, width=w, pitch=4 * planes.pitch, plane=4 * planes.plane,
        channel=4 * planes.channel, sample=4 * planes.sample,
    )  # fmt: skip
    parallel.run(kernel.address, job, threads_for(samples * channels * d * h * w))
    return Pooled(y, winner, statistics)


def slopes(pooled: Pooled, grad: Tensor, size: Size3) -> tuple[Tensor, Tensor]:
    """Slope and offset of each channel's gradient (n * c, 2), and gradient of a bias (n, c)."""
    samples, channels = grad.shape[:2]
    found = buffers.empty((samples * channels, 2))
    bias_grad = buffers.empty((samples, channels))
    d, h, w = size
    job = cpu.slopes.job(
        parts=samples * channels, y=pooled.y.data_ptr(), grad=grad.data_ptr(),
        statistics=pooled.statistics.data_ptr(), slopes=found.data_ptr(),
        bias_grad=bias_grad.data_ptr(), pooled=(d // 2) * (h // 2) * (w // 2), voxels=d * h * w,
    )  # fmt: skip
    parallel.run(cpu.slopes.address, job, threads_for(2 * grad.numel()))
    return found, bias_grad


def backward(x: Tensor, pooled: Pooled, grad: Tensor) -> Tensor:
    """Gradient of a contiguous `x` (n, c, d, h, w)."""
    planes = dense_planes(x)
    samples, channels = grad.shape[:2]
    d, h, w = planes.size
    lines, _ = slopes(pooled, grad, planes.size)
    dx = buffers.empty(tuple(x.shape))
    threads = threads_for(x.numel())
    parts = min(samples * channels, 2 * threads)
    scratch = buffers.empty((parts * 2 * planes.plane,))
    job = cpu.backward.job(
        parts=parts, scratch=scratch.data_ptr(), scratch_part=8 * planes.plane, x=x.data_ptr(),
        y=pooled.y.data_ptr(), winner=pooled.winner.data_ptr(),
        statistics=pooled.statistics.data_ptr(), slopes=lines.data_ptr(), grad=grad.data_ptr(),
        g=dx.data_ptr(), channels=channels, last=samples, end=d, clear_to=d,
        depth=d, height=h, width=w, pitch=4 * w, plane=4 * planes.plane,
        channel=4 * planes.channel, sample=4 * planes.sample, g_plane=4 * planes.plane,
        g_channel=4 * planes.channel, g_sample=4 * planes.sample,
    )  # fmt: skip
    parallel.run(cpu.backward.address, job, threads)
    return dx
