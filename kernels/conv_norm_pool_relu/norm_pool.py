"""Instance norm, 2x2x2 max pooling and ReLU behind a convolution, on its planes, with Numba.

The forward pass reads the convolution's planes once: sums and window maxima together, and then the
pooled map alone is normalised. The backward pass writes the gradient of the convolution's output
straight into the padded planes that its backward kernel reads.
`sparsekit.kernels.masked_conv3d.geometry` has the layout, kernels/norm_pool_relu/README.md the
formulas.
"""

from typing import Any

import numba
import numpy as np

from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.masked_conv3d.record import record
from sparsekit.kernels.memory import (
    clear_bytes,
    copy_bytes,
    floats,
    load_float,
    octets,
    store_float,
)
from sparsekit.kernels.parallel import take
from sparsekit.kernels.vector import LANES, VECTOR_BYTES, pool_windows, stream_vector

# Only in sums may the compiler reorder, to use vector registers. None of these flags assumes
# finite numbers, so NaN and infinity go through as in torch.
_SUMS = {"contract", "reassoc", "nsz"}
_REST = {"contract", "nsz"}


@numba.njit(fastmath=_SUMS)
def _row_sums(place, width, pivot):  # pragma: no cover - compiled
    row = numba.carray(floats(place), width)
    total = np.float32(0.0)
    squares = np.float32(0.0)
    for w in range(width):
        value = row[w] - pivot
        total += value
        squares += value * value
    return total, squares


@numba.njit(fastmath=_SUMS)
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
            y = numba.carray(floats(job.y + 4 * part * pooled), pooled)
            y_place = job.y + 4 * part * pooled
            winner_place = job.winner + part * pooled
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
            for lane in range(LANES):
                total += np.float64(load_float(sums_place + 4 * lane))
                squares += np.float64(load_float(sums_place + VECTOR_BYTES + 4 * lane))
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


BACKWARD = record(
    "x", "y", "winner", "statistics", "grad", "g", "bias_grad", "scratch", "scratch_part",
    "channels", "samples", "depth", "height", "width", "pitch", "plane", "channel", "sample",
    "g_plane", "g_channel", "g_sample", "g_interior", "stream",
)  # fmt: skip


@numba.njit(fastmath=_SUMS)
def _gradient_sums(y, grad, count):  # pragma: no cover - compiled
    """Sums of the gradient behind the ReLU and of its product with y, in runs of float32."""
    total = 0.0
    product = 0.0
    begin = 0
    while begin < count:
        end = min(count, begin + 256)
        run_total = np.float32(0.0)
        run_product = np.float32(0.0)
        for i in range(begin, end):
            value = y[i]
            g = np.float32(0.0) if value <= 0 else grad[i]
            run_total += g
            run_product += g * value
        total += run_total
        product += run_product
        begin = end
    return total, product


@numba.njit
def _move(target, source, count, stream):  # pragma: no cover - compiled
    """Copy whole vectors, past the caches if ``stream`` is not 0."""
    if stream == 0:
        copy_bytes(target, source, count)
        return
    end = target + count
    while target < end:
        stream_vector(target, source)
        target += VECTOR_BYTES
        source += VECTOR_BYTES


@numba.njit
def _clear(target, count, zeros, plane, stream):  # pragma: no cover - compiled
    """Clear whole vectors, from a plane of zeros if ``stream`` is not 0."""
    if stream == 0:
        clear_bytes(target, count)
        return
    while count > 0:
        here = min(count, plane)
        _move(target, zeros, here, stream)
        target += here
        count -= here


@kernel(BACKWARD, fastmath=_REST)
def backward(job: Any) -> None:  # pragma: no cover - compiled
    """Fill the padded gradient of the convolution's output, zeros around it included.

    Two planes at a time are made in scratch memory, which stays in a cache, and then moved.
    """
    depth, height, width = job.depth, job.height, job.width
    pitch, plane, g_plane, stream = job.pitch, job.plane, job.g_plane, job.stream
    half_d, half_h, half_w = depth // 2, height // 2, width // 2
    pooled = half_d * half_h * half_w
    count = depth * height * width
    # The interior of a channel begins whole planes, and some rows and columns, behind its start.
    lead = job.g_interior // g_plane * g_plane
    inner = job.g_interior - lead
    part = take(job)
    while part < job.parts:
        scratch = job.scratch + part * job.scratch_part
        zeros = scratch + 2 * g_plane
        clear_bytes(scratch, 3 * g_plane)
        for n in range(
            job.samples * job.channels * part // job.parts,
            job.samples * job.channels * (part + 1) // job.parts,
        ):
            sample, c = n // job.channels, n % job.channels
            x = job.x + sample * job.sample + c * job.channel
            place = job.g + sample * job.g_sample + c * job.g_channel
            end = place + job.g_channel
            if c == job.channels - 1:
                end = job.g + (sample + 1) * job.g_sample
            y = numba.carray(floats(job.y + 4 * n * pooled), pooled)
            grad = numba.carray(floats(job.grad + 4 * n * pooled), pooled)
            winner = numba.carray(octets(job.winner + n * pooled), pooled)
            high = load_float(job.statistics + 12 * n)
            low = load_float(job.statistics + 12 * n + 4)
            rstd = load_float(job.statistics + 12 * n + 8)
            total, product = _gradient_sums(y, grad, pooled)
            slope = np.float32(-rstd * rstd * (product / count))
            offset = np.float32(-rstd * (total / count))
            # The mean takes the bias out: its gradient is 0, or NaN with the rest of the channel.
            store_float(job.bias_grad + 4 * n, (offset + slope) * np.float32(0.0))
            _clear(place, lead, zeros, g_plane, stream)
            place += lead
            i = 0
            for d in range(0, depth, 2):
                planes = min(2, depth - d)
                for k in range(planes):
                    for h in range(height):
                        source = numba.carray(floats(x + (d + k) * plane + h * pitch), width)
                        target = numba.carray(
                            floats(scratch + k * g_plane + inner + h * pitch), width
                        )
                        for w in range(width):
                            target[w] = slope * ((source[w] - high) - low) + offset
                if planes == 2:
                    for h in range(half_h):
                        for w in range(half_w):
                            if not (y[i + w] <= 0):
                                k = np.int64(winner[i + w])
                                at = (
                                    scratch + inner + (k >> 2) * g_plane
                                    + (2 * h + ((k >> 1) & 1)) * pitch + 4 * (2 * w + (k & 1))
                                )  # fmt: skip
                                store_float(at, load_float(at) + rstd * grad[i + w])
                        i += half_w
                _move(place, scratch, planes * g_plane, stream)
                place += planes * g_plane
            _clear(place, end - place, zeros, g_plane, stream)
        part = take(job)
