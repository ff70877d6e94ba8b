"""Instance norm, 2x2x2 max pooling and ReLU behind a convolution, on its planes, with Numba.

The forward pass reads the convolution's planes once: sums and window maxima together, and then the
pooled map alone is normalised. The backward pass writes the gradient of the convolution's output
straight into the padded planes that its backward kernel reads.
`sparsekit.kernels.masked_conv3d.geometry` has the layout, kernels/norm_pool_relu/README.md the
formulas.
"""
# numba.carray is documented, but not in the form that type checkers ask for.
# pyright: reportPrivateImportUsage=false

from typing import Any

import numba
import numpy as np

from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.memory import (
    clear_bytes,
    copy_bytes,
    floats,
    load_float,
    store_float,
)
from sparsekit.kernels.norm_pool_relu.windows import pool_windows, unpool_windows
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import LANES, VECTOR_BYTES

# Only in sums may the compiler reorder, to use vector registers. None of these flags assumes
# finite numbers, so NaN and infinity go through as in torch.
_SUMS = {"contract", "reassoc", "nsz"}
_REST = {"contract", "nsz"}
# Steps after which sums in float32 are handed on: they hold few numbers well.
_MOST_PENDING = 64


@inlined()
def _taken(sums_place):  # pragma: no cover - compiled
    """Sums over the lanes of the two vectors of `pool_windows`, in float64; clears them."""
    total = 0.0
    squares = 0.0
    for lane in range(LANES):
        total += np.float64(load_float(sums_place + 4 * lane))
        squares += np.float64(load_float(sums_place + VECTOR_BYTES + 4 * lane))
    clear_bytes(sums_place, 2 * VECTOR_BYTES)
    return total, squares


@inlined(fastmath=_SUMS)
def _row_sums(place, width, pivot):  # pragma: no cover - compiled
    row = numba.carray(floats(place), width)
    total = np.float32(0.0)
    squares = np.float32(0.0)
    for w in range(width):
        value = row[w] - pivot
        total += value
        squares += value * value
    return total, squares


@inlined(fastmath=_SUMS)
def _exact_moments(x, depth, height, width, pitch, plane):  # pragma: no cover - compiled
    """Mean and variance in two passes, in float64."""
    count = depth * height * width
    total = 0.0
    for d in range(depth):
        for h in range(height):
            row = numba.carray(floats(x + d * plane + h * pitch), width)
            for w in range(width):
                total += np.float64(row[w])
    mean = total / count
    squares = 0.0
    for d in range(depth):
        for h in range(height):
            row = numba.carray(floats(x + d * plane + h * pitch), width)
            for w in range(width):
                value = np.float64(row[w]) - mean
                squares += value * value
    return mean, squares / count


FORWARD = record(
    "x", "y", "winner", "statistics", "scratch", "channels",
    "depth", "height", "width", "pitch", "plane", "channel", "sample",
)  # fmt: skip


def make_forward(eps: float) -> Any:
    """Kernel of the forward pass for one ``eps``."""

    @kernel(FORWARD, fastmath=_REST)
    def norm_pool_relu_forward(job: Any) -> None:  # pragma: no cover - compiled
        depth, height, width = job.depth, job.height, job.width
        pitch, plane = job.pitch, job.plane
        half_d, half_h, half_w = depth // 2, height // 2, width // 2
        count = depth * height * width
        pooled = half_d * half_h * half_w
        part = take(job)
        while part < job.parts:
            x = job.x + part // job.channels * job.sample + part % job.channels * job.channel
            sums_place = job.scratch + 2 * VECTOR_BYTES * part
            clear_bytes(sums_place, 2 * VECTOR_BYTES)
            y = numba.carray(floats(job.y + 4 * part * pooled), pooled)  # type: ignore[attr-defined]
            y_place = job.y + 4 * part * pooled
            winner_place = job.winner + part * pooled
            pending = 0
            # Sums of differences to one voxel: little cancels as long as it lies near the mean.
            pivot = load_float(x)
            total = 0.0
            squares = 0.0
            for d in range(half_d):
                for h in range(half_h):
                    p = x + 2 * d * plane + 2 * h * pitch
                    left = width
                    while left > 0:
                        pool_windows(
                            p, pitch, plane, left, pivot, y_place, winner_place, sums_place
                        )
                        pooled_here = min(left // 2, LANES)
                        y_place += 4 * pooled_here
                        winner_place += pooled_here
                        p += 2 * VECTOR_BYTES
                        left -= 2 * LANES
                        pending += 1
                        if pending == _MOST_PENDING:
                            sums = _taken(sums_place)
                            total += sums[0]
                            squares += sums[1]
                            pending = 0
                if height % 2 == 1:
                    for k in range(2):
                        sums = _row_sums(
                            x + (2 * d + k) * plane + (height - 1) * pitch, width, pivot
                        )
                        total += sums[0]
                        squares += sums[1]
            if depth % 2 == 1:
                for h in range(height):
                    sums = _row_sums(x + (depth - 1) * plane + h * pitch, width, pivot)
                    total += sums[0]
                    squares += sums[1]
            sums = _taken(sums_place)
            total += sums[0]
            squares += sums[1]
            mean = total / count
            variance = squares / count - mean * mean
            if mean * mean <= 16 * variance:
                mean += pivot
            else:
                # The pivot is an outlier, or a square overflowed, or something is not finite.
                mean, variance = _exact_moments(x, depth, height, width, pitch, plane)
            # One float32 number cannot hold a mean that is large beside the spread.
            high = np.float32(mean)
            low = np.float32(mean - high)
            rstd = np.float32(1.0 / np.sqrt(variance + eps))
            store_float(job.statistics + 12 * part, high)
            store_float(job.statistics + 12 * part + 4, low)
            store_float(job.statistics + 12 * part + 8, rstd)
            for i in range(pooled):
                value = ((y[i] - high) - low) * rstd
                # Written so that NaN stays NaN.
                y[i] = np.float32(0.0) if value <= 0 else value
            part = take(job)

    return norm_pool_relu_forward


@inlined(fastmath=_SUMS)
def _gradient_sums(y, grad, count):  # pragma: no cover - compiled
    """Sums of the gradient behind the ReLU and of its product with y, in runs of float32."""
    total = 0.0
    product = 0.0
    while count > 0:
        run = min(count, 1024)
        # Arrays of their own: the compiler knows then that no index is negative.
        values = numba.carray(floats(y), run)
        grads = numba.carray(floats(grad), run)
        run_total = np.float32(0.0)
        run_product = np.float32(0.0)
        for i in range(run):
            g = np.float32(0.0) if values[i] <= 0 else grads[i]
            run_total += g
            run_product += g * values[i]
        total += run_total
        product += run_product
        y += 4 * run
        grad += 4 * run
        count -= run
    return total, product


SLOPES = record("y", "grad", "statistics", "slopes", "bias_grad", "pooled", "voxels")


@kernel(SLOPES, fastmath=_REST)
def slopes(job: Any) -> None:  # pragma: no cover - compiled
    """Per channel, the gradient of the norm as a line: slope and offset, and the bias's gradient.

    The gradient is ``slope * (x - mean) + offset``, and more at the windows' winners.
    """
    pooled = job.pooled
    part = take(job)
    while part < job.parts:
        rstd = load_float(job.statistics + 12 * part + 8)
        place = 4 * part * pooled
        total, product = _gradient_sums(job.y + place, job.grad + place, pooled)
        slope = np.float32(-rstd * rstd * (product / job.voxels))
        offset = np.float32(-rstd * (total / job.voxels))
        store_float(job.slopes + 8 * part, slope)
        store_float(job.slopes + 8 * part + 4, offset)
        # The mean takes the bias out: its gradient is 0, or NaN with the rest of the channel.
        store_float(job.bias_grad + 4 * part, (offset + slope) * np.float32(0.0))
        part = take(job)


@inlined(fastmath=_REST)
def _line(source, target, width, high, low, slope, offset):  # pragma: no cover - compiled
    x = numba.carray(floats(source), width)
    y = numba.carray(floats(target), width)
    for w in range(width):
        y[w] = slope * ((x[w] - high) - low) + offset


BACKWARD = record(
    "x", "y", "winner", "statistics", "slopes", "grad", "g", "scratch", "scratch_part",
    "channels", "first", "last", "begin", "end", "at", "carried", "carried_from", "clear_to",
    "depth", "height", "width", "pitch", "plane", "channel", "sample",
    "g_plane", "g_channel", "g_sample", "g_inner",
)  # fmt: skip


@kernel(BACKWARD, fastmath=_REST)
def backward(job: Any) -> None:  # pragma: no cover - compiled
    """Fill planes of the padded gradient of the convolution's output, for samples first..last.

    Each channel first keeps ``carried`` planes from ``carried_from`` on, at its start, then clears
    what lies before plane ``at``, writes the gradients of planes begin..end from there on, and
    clears the rest up to ``clear_to``. Two planes at a time are made in scratch memory.
    """
    height, width = job.height, job.width
    pitch, plane, g_plane = job.pitch, job.plane, job.g_plane
    half_h, half_w = height // 2, width // 2
    pooled = job.depth // 2 * half_h * half_w
    inner = job.g_inner
    count = (job.last - job.first) * job.channels
    part = take(job)
    while part < job.parts:
        scratch = job.scratch + part * job.scratch_part
        clear_bytes(scratch, 2 * g_plane)
        for k in range(count * part // job.parts, count * (part + 1) // job.parts):
            sample, c = job.first + k // job.channels, k % job.channels
            n = sample * job.channels + c
            x = job.x + sample * job.sample + c * job.channel
            start = job.g + (sample - job.first) * job.g_sample + c * job.g_channel
            window = n * pooled + job.begin // 2 * half_h * half_w
            pooled_place = job.y + 4 * window
            winner_place = job.winner + window
            grad_place = job.grad + 4 * window
            high = load_float(job.statistics + 12 * n)
            low = load_float(job.statistics + 12 * n + 4)
            rstd = load_float(job.statistics + 12 * n + 8)
            slope = load_float(job.slopes + 8 * n)
            offset = load_float(job.slopes + 8 * n + 4)
            if job.carried > 0:
                # Not more planes than lie between: the two ranges do not overlap.
                copy_bytes(start, start + job.carried_from * g_plane, job.carried * g_plane)
            clear_bytes(start + job.carried * g_plane, (job.at - job.carried) * g_plane)
            place = start + job.at * g_plane
            for d in range(job.begin, job.end, 2):
                planes = min(2, job.end - d)
                source = x + d * plane
                if planes == 2:
                    for h in range(half_h):
                        left = width
                        here = source + 2 * h * pitch
                        there = scratch + inner + 2 * h * pitch
                        while left > 0:
                            unpool_windows(
                                here, pitch, plane, there, g_plane, left,
                                pooled_place, winner_place, grad_place,
                                high, low, slope, offset, rstd,
                            )  # fmt: skip
                            windows = min(left // 2, LANES)
                            pooled_place += 4 * windows
                            winner_place += windows
                            grad_place += 4 * windows
                            here += 2 * VECTOR_BYTES
                            there += 2 * VECTOR_BYTES
                            left -= 2 * LANES
                for z in range(planes):
                    # Rows in no window.
                    begin_h = 2 * half_h if planes == 2 else 0
                    for h in range(begin_h, height):
                        _line(
                            source + z * plane + h * pitch,
                            scratch + z * g_plane + inner + h * pitch,
                            width, high, low, slope, offset,
                        )  # fmt: skip
                copy_bytes(place, scratch, planes * g_plane)
                place += planes * g_plane
            end = start + job.clear_to * g_plane
            if c == job.channels - 1:
                end = job.g + (sample - job.first + 1) * job.g_sample
            clear_bytes(place, end - place)
        part = take(job)
