"""Convolution of one channel, pooled, normalised and cut off in registers; and its gradient.

Runs after `single_channel_gram`, which knows each channel's mean and spread beforehand, so that no
number of the full resolution is ever stored. Kernels are serial over numbered parts
(`sparsekit.kernels.parallel`); a part is the slab of two planes that one plane of the output pools.
"""
# The type checkers count the typing context among an intrinsic's arguments.
# pyright: reportCallIssue=false

import numpy as np

from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.conv_norm_pool_relu.window_tiles import (
    add_to_memory,
    dot,
    float32_at,
    float64_at,
    gradient_at_winners,
    int64_at,
    stack_bytes,
    store_window_maxima,
)
from sparsekit.kernels.parallel import take
from sparsekit.kernels.vector import (
    LANES,
    VECTOR_BYTES,
    add_lane_sums,
    add_product,
    filled,
    prefetch,
)

_FIELDS = {
    "n": np.int64,
    "channels": np.int64,
    "depth": np.int64,
    "height": np.int64,
    "width": np.int64,
    "pitch": np.int64,  # floats from row to row of the padded input
    "lead": np.int64,  # floats before it
    "winner_pitch": np.int64,  # bytes from row to row of the winners
    "band": np.int64,  # rows of the output that a thread works on at a time
    # Addresses.
    "padded": np.uintp,  # float32, see single_channel_gram
    "first": np.uintp,  # int64 (channels + 1): where a channel's taps begin
    "offsets": np.uintp,  # int64 (taps): bytes from the first tap's voxel to this one's
    "weights": np.uintp,  # float32 (taps)
    "moments": np.uintp,  # float64 (n, channels, 2): mean, 1 / spread
    "y": np.uintp,  # float32 (n, channels, depth // 2, height // 2, width // 2), or its gradient
    "winners": np.uintp,  # bytes (n, channels, depth // 2, height // 2, winner_pitch), or 0
    "sums": np.uintp,  # float64 (n * (depth // 2), channels + taps)
    "taps": np.uintp,  # int64 (taps): their positions, 0 to 26 in C order
    "gram": np.uintp,  # float64 (n, 27, 27)
    "boxes": np.uintp,  # float64 (n, 27)
    "grad_weight": np.uintp,  # float32 (channels, 27), zeros
}
JOB = np.dtype([("next", np.int64), *_FIELDS.items()], align=True)

# Vectors for the gradient's own sum and 27 taps, in whole groups for `add_lane_sums`.
_SUM_VECTORS = -(-28 // LANES) * LANES
_SUM_BYTES = _SUM_VECTORS * VECTOR_BYTES
_LANE_SUM_BYTES = _SUM_VECTORS * 4
_GATHERED = 28 * 8


@kernel(JOB, fastmath={"contract"})
def forward(job):  # pragma: no cover - compiled
    """Fill y and the winners."""
    n, channels, pitch, band = job.n, job.channels, job.pitch, job.band
    depth, height, width = job.depth // 2, job.height // 2, job.width // 2
    plane = (job.height + 2) * pitch * 4
    row = pitch * 4
    sample_bytes = (job.depth + 2) * plane
    origin = np.int64(job.padded) + (job.lead - 1) * 4
    y, winners, winner_pitch = np.int64(job.y), np.int64(job.winners), job.winner_pitch
    first = int64_at(job.first)
    offsets = int64_at(job.offsets)
    weights = float32_at(job.weights)
    moments = float64_at(job.moments)
    parts = n * depth
    part = take(job)
    while part < parts:
        sample, d = part // depth, part % depth
        slab = origin + sample * sample_bytes + 2 * d * plane
        for b in range((height + band - 1) // band):
            band_start = b * band
            band_end = band_start + band if band_start + band < height else height
            for c in range(channels):
                out = ((sample * channels + c) * depth + d) * height
                begin, end = first[c], first[c + 1]
                if begin == end:
                    # A constant: the norm makes it 0, and the backward pass leaves it out.
                    rows = float32_at(y + (out + band_start) * width * 4)
                    for i in range((band_end - band_start) * width):
                        rows[i] = np.float32(0.0)
                    continue
                mean64 = moments[(sample * channels + c) * 2]
                mean = np.float32(mean64)
                mean_rest = np.float32(mean64 - np.float64(mean))
                rstd = np.float32(moments[(sample * channels + c) * 2 + 1])
                following = depth * height if c + 1 < channels else 0
                for h in range(band_start, band_end):
                    source = slab + 2 * h * row
                    target = y + (out + h) * width * 4
                    winner = winners + (out + h) * winner_pitch if winners != 0 else 0
                    for w in range(0, width, LANES):
                        prefetch(target + (following * width + w) * 4, 1, 1)
                        if winner != 0:
                            prefetch(winner + following * winner_pitch + w, 1, 1)
                        upper = filled(4, np.float32(0.0))
                        lower = filled(4, np.float32(0.0))
                        for k in range(begin, end):
                            weight = weights[k]
                            address = source + offsets[k] + 8 * w
                            upper = add_product(upper, weight, address, row, 2, 2)
                            lower = add_product(lower, weight, address + plane, row, 2, 2)
                        store_window_maxima(
                            upper,
                            lower,
                            mean,
                            mean_rest,
                            rstd,
                            target + 4 * w,
                            winner + w if winner != 0 else 0,
                            width - w,
                        )
        part = take(job)


@kernel(JOB, fastmath={"contract"})
def sum_gradients(job):  # pragma: no cover - compiled
    """Fill `sums`: per part, each channel's sum of gradients and sums of gradient times voxel."""
    n, channels, pitch, band = job.n, job.channels, job.pitch, job.band
    depth, height, width = job.depth // 2, job.height // 2, job.width // 2
    plane = (job.height + 2) * pitch * 4
    row = pitch * 4
    sample_bytes = (job.depth + 2) * plane
    origin = np.int64(job.padded) + (job.lead - 1) * 4
    y, winners, winner_pitch = np.int64(job.y), np.int64(job.winners), job.winner_pitch
    first = int64_at(job.first)
    offsets = int64_at(job.offsets)
    parts = n * depth
    columns = channels + first[channels]
    sums = float64_at(job.sums)
    vectors_at = stack_bytes(_SUM_BYTES)
    vectors = float32_at(vectors_at)
    lane_sums_at = stack_bytes(_LANE_SUM_BYTES)
    lane_sums = float32_at(lane_sums_at)
    part = take(job)
    while part < parts:
        sample, d = part // depth, part % depth
        slab = origin + sample * sample_bytes + 2 * d * plane
        for i in range(part * columns, (part + 1) * columns):
            sums[i] = 0.0
        for b in range((height + band - 1) // band):
            band_start = b * band
            band_end = band_start + band if band_start + band < height else height
            for c in range(channels):
                begin, end = first[c], first[c + 1]
                if begin == end:
                    continue
                groups = (end - begin + LANES) // LANES
                for i in range(groups * LANES * LANES):
                    vectors[i] = np.float32(0.0)
                for i in range(groups * LANES):
                    lane_sums[i] = np.float32(0.0)
                out = ((sample * channels + c) * depth + d) * height
                following = depth * height if c + 1 < channels else 0
                nothing = filled(1, np.float32(0.0))
                for h in range(band_start, band_end):
                    source = slab + 2 * h * row
                    for w in range(0, width, LANES):
                        ahead = out + following + h
                        prefetch(y + (ahead * width + w) * 4, 1, 0)
                        prefetch(winners + ahead * winner_pitch + w, 1, 0)
                        upper, lower, total = gradient_at_winners(
                            y + ((out + h) * width + w) * 4,
                            winners + (out + h) * winner_pitch + w,
                            width - w,
                        )
                        add_to_memory(vectors_at, total, nothing)
                        for k in range(begin, end):
                            address = source + offsets[k] + 8 * w
                            add_to_memory(
                                vectors_at + (k - begin + 1) * VECTOR_BYTES,
                                dot(upper, address, row, 2, 2),
                                dot(lower, address + plane, row, 2, 2),
                            )
                for i in range(groups):
                    add_lane_sums(
                        vectors_at + i * LANES * VECTOR_BYTES,
                        lane_sums_at + i * VECTOR_BYTES,
                        LANES,
                    )
                at = part * columns + c + begin
                for i in range(end - begin + 1):
                    sums[at + i] += np.float64(lane_sums[i])
        part = take(job)


@kernel(JOB)
def weight_gradients(job):  # pragma: no cover - compiled
    """Fill `grad_weight` at the taps. One part is one channel."""
    n, channels = job.n, job.channels
    depth = job.depth // 2
    voxels = np.float64(job.depth * job.height * job.width)
    first = int64_at(job.first)
    taps = int64_at(job.taps)
    weights = float32_at(job.weights)
    moments = float64_at(job.moments)
    columns = channels + first[channels]
    sums = float64_at(job.sums)
    gram = float64_at(job.gram)
    boxes = float64_at(job.boxes)
    grad_weight = float32_at(job.grad_weight)
    gathered = float64_at(stack_bytes(_GATHERED))
    result = float64_at(stack_bytes(_GATHERED))
    c = take(job)
    while c < channels:
        begin, count = first[c], first[c + 1] - first[c]
        for i in range(count):
            result[i] = 0.0
        for sample in range(n):
            for i in range(count + 1):
                gathered[i] = 0.0
            for part in range(sample * depth, (sample + 1) * depth):
                for i in range(count + 1):
                    gathered[i] += sums[part * columns + c + begin + i]
            mean = moments[(sample * channels + c) * 2]
            rstd = moments[(sample * channels + c) * 2 + 1]
            grad_mean = gathered[0] / voxels
            # Sum of gradient times normalised output.
            product = -mean * gathered[0]
            for i in range(count):
                product += np.float64(weights[begin + i]) * gathered[i + 1]
            slope = product * rstd * rstd / voxels
            for i in range(count):
                tap = taps[begin + i]
                box = boxes[sample * 27 + tap]
                deviation = -mean * box
                for j in range(count):
                    place = (sample * 27 + tap) * 27 + taps[begin + j]
                    deviation += np.float64(weights[begin + j]) * gram[place]
                result[i] += rstd * (gathered[i + 1] - grad_mean * box - slope * deviation)
            if not np.isfinite(gathered[0]):
                # The mean of such a gradient reaches every voxel.
                for i in range(count):
                    result[i] = np.nan
        for i in range(count):
            grad_weight[c * 27 + taps[begin + i]] = np.float32(result[i])
        c = take(job)
