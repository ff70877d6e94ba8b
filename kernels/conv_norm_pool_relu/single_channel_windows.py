"""Convolution of one channel, pooled, normalised and cut off in registers; and its gradient.

Runs after `single_channel_gram`, which knows each channel's mean and spread beforehand, so that no
number of the full resolution is ever stored. Kernels are serial over numbered parts
(`sparsekit.kernels.parallel`); a part is the slab of two planes that one plane of the output pools.
"""

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
from sparsekit.kernels.intrinsics import inlined
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
    "moments": np.uintp,  # float64 (n, channels, 2): mean, 1 / spread
    "y": np.uintp,  # float32 (n, channels, depth // 2, height // 2, width // 2), or its gradient
    "winners": np.uintp,  # bytes (n, channels, depth // 2, height // 2, winner_pitch), or 0
    # Groups of channels, see single_channel.Plan.
    "groups": np.int64,
    "members": np.uintp,  # int64 (groups, 2): channels; the second may be -1
    "group_first": np.uintp,  # int64 (groups + 1): where a group's taps begin
    "offsets": np.uintp,  # int64 (group taps): bytes from the first tap's voxel to this one's
    "group_weights": np.uintp,  # float32 (group taps, 2)
    "sums": np.uintp,  # float64 (n * (depth // 2), groups + group taps, 2)
    # Channels one by one, for the last kernel.
    "first": np.uintp,  # int64 (channels + 1): where a channel's taps begin
    "taps": np.uintp,  # int64 (taps): their positions, 0 to 26 in C order
    "weights": np.uintp,  # float32 (taps)
    "own_column": np.uintp,  # int64 (channels): where a part's sums hold that of the gradient
    "tap_column": np.uintp,  # int64 (taps): where they hold that of gradient times voxel
    "gram": np.uintp,  # float64 (n, 27, 27)
    "boxes": np.uintp,  # float64 (n, 27)
    "grad_weight": np.uintp,  # float32 (channels, 27), zeros
}
JOB = np.dtype([("next", np.int64), *_FIELDS.items()], align=True)

# Vectors for 2 channels' gradients and their 27 taps, in whole groups for `add_lane_sums`.
_SUM_VECTORS = -(-2 * 28 // LANES) * LANES
_SUM_BYTES = _SUM_VECTORS * VECTOR_BYTES
_LANE_SUM_BYTES = _SUM_VECTORS * 4
_GATHERED = 28 * 8


@kernel(JOB, fastmath={"contract"})
def forward(job):  # pragma: no cover - compiled
    """Fill y and the winners."""
    n, channels, groups, pitch, band = job.n, job.channels, job.groups, job.pitch, job.band
    depth, height, width = job.depth // 2, job.height // 2, job.width // 2
    plane = (job.height + 2) * pitch * 4
    row = pitch * 4
    sample_bytes = (job.depth + 2) * plane
    origin = np.int64(job.padded) + (job.lead - 1) * 4
    y, winners, winner_pitch = np.int64(job.y), np.int64(job.winners), job.winner_pitch
    members, first = int64_at(job.members), int64_at(job.group_first)
    offsets_at, weights_at = np.int64(job.offsets), np.int64(job.group_weights)
    moments = float64_at(job.moments)
    channel_rows = depth * height
    parts = n * depth
    part = take(job)
    while part < parts:
        sample, d = part // depth, part % depth
        slab = origin + sample * sample_bytes + 2 * d * plane
        for b in range((height + band - 1) // band):
            band_start = b * band
            band_end = band_start + band if band_start + band < height else height
            for group in range(groups):
                begin, end = first[group], first[group + 1]
                one, two = members[2 * group], members[2 * group + 1]
                out = (sample * channels + one) * channel_rows + d * height
                if begin == end:
                    # A constant: the norm makes it 0, and the backward pass leaves it out.
                    rows = float32_at(y + (out + band_start) * width * 4)
                    for i in range((band_end - band_start) * width):
                        rows[i] = np.float32(0.0)
                    continue
                weights = float32_at(weights_at + 8 * begin)
                at = sample * channels + one
                # A mean far beyond the spread would need more digits: such calls do not come here.
                mean, rstd = np.float32(moments[2 * at]), np.float32(moments[2 * at + 1])
                # Rows of the output from the first channel to the second and to the next group's.
                offsets = int64_at(offsets_at + 8 * begin)
                ahead, ahead_two = _next(members, group, groups, channel_rows)
                apart = (two - one) * channel_rows if two >= 0 else 0
                at += two - one if two >= 0 else 0
                mean_two, rstd_two = np.float32(moments[2 * at]), np.float32(moments[2 * at + 1])
                for h in range(band_start, band_end):
                    source = slab + 2 * h * row
                    for w in range(0, width, LANES):
                        target = y + ((out + h) * width + w) * 4
                        winner = winners + (out + h) * winner_pitch + w if winners != 0 else 0
                        # What the next group will write.
                        prefetch(target + ahead * width * 4, 1, 1)
                        prefetch(winner + ahead * winner_pitch, 1, 1)
                        if ahead_two != ahead:
                            prefetch(target + ahead_two * width * 4, 1, 1)
                            prefetch(winner + ahead_two * winner_pitch, 1, 1)
                        upper = filled(4, np.float32(0.0))
                        lower = filled(4, np.float32(0.0))
                        if two >= 0:
                            upper_two = filled(4, np.float32(0.0))
                            lower_two = filled(4, np.float32(0.0))
                            for k in range(end - begin):
                                # Every voxel is loaded once for both channels.
                                address = source + offsets[k] + 8 * w
                                weight, weight_two = weights[2 * k], weights[2 * k + 1]
                                upper = add_product(upper, weight, address, row, 2, 2)
                                upper_two = add_product(upper_two, weight_two, address, row, 2, 2)
                                address += plane
                                lower = add_product(lower, weight, address, row, 2, 2)
                                lower_two = add_product(lower_two, weight_two, address, row, 2, 2)
                            store_window_maxima(
                                upper_two,
                                lower_two,
                                mean_two,
                                rstd_two,
                                target + apart * width * 4,
                                winner + apart * winner_pitch if winner != 0 else 0,
                                width - w,
                            )
                        else:
                            for k in range(end - begin):
                                address = source + offsets[k] + 8 * w
                                weight = weights[2 * k]
                                upper = add_product(upper, weight, address, row, 2, 2)
                                lower = add_product(lower, weight, address + plane, row, 2, 2)
                        store_window_maxima(upper, lower, mean, rstd, target, winner, width - w)
        part = take(job)


@inlined()
def _next(members, group, groups, channel_rows):  # pragma: no cover - compiled
    """Rows from a group's first channel to the channels of the next group."""
    if group + 1 == groups:
        return 0, 0
    one, two = members[2 * group + 2], members[2 * group + 3]
    first = (one - members[2 * group]) * channel_rows
    return first, first + (two - one) * channel_rows if two >= 0 else first


@kernel(JOB, fastmath={"contract"})
def sum_gradients(job):  # pragma: no cover - compiled
    """Fill `sums`: per part, each channel's sum of gradients and sums of gradient times voxel."""
    n, channels, groups, pitch, band = job.n, job.channels, job.groups, job.pitch, job.band
    depth, height, width = job.depth // 2, job.height // 2, job.width // 2
    plane = (job.height + 2) * pitch * 4
    row = pitch * 4
    sample_bytes = (job.depth + 2) * plane
    origin = np.int64(job.padded) + (job.lead - 1) * 4
    y, winners, winner_pitch = np.int64(job.y), np.int64(job.winners), job.winner_pitch
    members, first = int64_at(job.members), int64_at(job.group_first)
    offsets_at = np.int64(job.offsets)
    channel_rows = depth * height
    parts = n * depth
    columns = 2 * (groups + first[groups])
    vectors_at = stack_bytes(_SUM_BYTES)
    vectors = float32_at(vectors_at)
    lane_sums_at = stack_bytes(_LANE_SUM_BYTES)
    lane_sums = float32_at(lane_sums_at)
    part = take(job)
    while part < parts:
        sample, d = part // depth, part % depth
        slab = origin + sample * sample_bytes + 2 * d * plane
        sums = float64_at(np.int64(job.sums) + 8 * part * columns)
        for i in range(columns):
            sums[i] = 0.0
        for b in range((height + band - 1) // band):
            band_start = b * band
            band_end = band_start + band if band_start + band < height else height
            for group in range(groups):
                begin, end = first[group], first[group + 1]
                if begin == end:
                    continue
                one, two = members[2 * group], members[2 * group + 1]
                count = 2 * (end - begin + 1)
                blocks = (count + LANES - 1) // LANES
                for i in range(blocks * LANES * LANES):
                    vectors[i] = np.float32(0.0)
                for i in range(blocks * LANES):
                    lane_sums[i] = np.float32(0.0)
                out = (sample * channels + one) * channel_rows + d * height
                offsets = int64_at(offsets_at + 8 * begin)
                ahead, ahead_two = _next(members, group, groups, channel_rows)
                apart = (two - one) * channel_rows if two >= 0 else 0
                nothing = filled(1, np.float32(0.0))
                for h in range(band_start, band_end):
                    source = slab + 2 * h * row
                    for w in range(0, width, LANES):
                        target = y + ((out + h) * width + w) * 4
                        winner = winners + (out + h) * winner_pitch + w
                        # What the next group will read.
                        prefetch(target + ahead * width * 4, 1, 0)
                        prefetch(winner + ahead * winner_pitch, 1, 0)
                        if ahead_two != ahead:
                            prefetch(target + ahead_two * width * 4, 1, 0)
                            prefetch(winner + ahead_two * winner_pitch, 1, 0)
                        upper, lower, total = gradient_at_winners(target, winner, width - w)
                        add_to_memory(vectors_at, total, nothing)
                        place = vectors_at + 2 * VECTOR_BYTES
                        if two >= 0:
                            upper_two, lower_two, total_two = gradient_at_winners(
                                target + apart * width * 4, winner + apart * winner_pitch, width - w
                            )
                            add_to_memory(vectors_at + VECTOR_BYTES, total_two, nothing)
                            for k in range(end - begin):
                                # Loads come before stores, so that both channels share them.
                                address = source + offsets[k] + 8 * w
                                above = dot(upper, address, row, 2, 2)
                                above_two = dot(upper_two, address, row, 2, 2)
                                below = dot(lower, address + plane, row, 2, 2)
                                below_two = dot(lower_two, address + plane, row, 2, 2)
                                add_to_memory(place, above, below)
                                add_to_memory(place + VECTOR_BYTES, above_two, below_two)
                                place += 2 * VECTOR_BYTES
                        else:
                            for k in range(end - begin):
                                address = source + offsets[k] + 8 * w
                                above = dot(upper, address, row, 2, 2)
                                below = dot(lower, address + plane, row, 2, 2)
                                add_to_memory(place, above, below)
                                place += 2 * VECTOR_BYTES
                for i in range(blocks):
                    add_lane_sums(
                        vectors_at + i * LANES * VECTOR_BYTES,
                        lane_sums_at + i * VECTOR_BYTES,
                        LANES,
                    )
                at = 2 * (group + begin)
                for i in range(count):
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
    own_column, tap_column = int64_at(job.own_column), int64_at(job.tap_column)
    columns = 2 * (job.groups + int64_at(job.group_first)[job.groups])
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
                gathered[0] += sums[part * columns + own_column[c]]
                for i in range(count):
                    gathered[i + 1] += sums[part * columns + tap_column[begin + i]]
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
