"""Mean and variance of a 3x3x3 convolution of one channel, without computing it.

Three kernels, run one after another: copy the input into a padded buffer; sum what all filters
share (products of voxels by their distance, and the faces, which the border makes special); put the
sums together into the Gram matrix of the 27 shifted inputs and take each channel's moments from it.
README.md has the formulas. Kernels are serial over numbered parts (`sparsekit.kernels.parallel`).
"""

import numpy as np

from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.conv_norm_pool_relu.window_tiles import (
    DOUBLE_LANES,
    add_lag_products,
    double_zeros,
    float32_at,
    float64_at,
    int64_at,
    stack_bytes,
    store_doubles,
)
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.parallel import take

_FIELDS = {
    "n": np.int64,
    "depth": np.int64,
    "height": np.int64,
    "width": np.int64,
    "pitch": np.int64,  # floats from row to row of the padded buffer
    "lead": np.int64,  # zeros before it
    "slack": np.int64,  # zeros behind it
    "channels": np.int64,
    "lag_planes": np.int64,  # bits 1 and 2: some filter has weights 1 and 2 planes apart
    "eps": np.float64,
    # Addresses.
    "x": np.uintp,  # float32 (n, depth, height, width)
    "padded": np.uintp,  # float32, lead + n * (depth + 2) * (height + 2) * pitch + slack
    "sides": np.uintp,  # float32 (n, 2, depth, height): the first and the last column
    "sums": np.uintp,  # float64 (n, depth + FACES, SUMS)
    "weights": np.uintp,  # float32 (taps): the unpruned weights
    "taps": np.uintp,  # int64 (taps): their positions, 0 to 26 in C order
    "first": np.uintp,  # int64 (channels + 1): where a channel's taps begin
    "bias": np.uintp,  # float32 (channels) or 0
    "gram": np.uintp,  # float64 (n, 27, 27)
    "boxes": np.uintp,  # float64 (n, 27)
    "moments": np.uintp,  # float64 (n, channels, 2): mean, 1 / spread
    "verdicts": np.uintp,  # int64 (n), one of the numbers below
}
JOB = np.dtype([("next", np.int64), *_FIELDS.items()], align=True)

# What the last kernel says of a sample, from good to bad.
FINE = 0
CANCELLED = 1
NOT_FINITE = 2

FACES = 4  # rows of sums behind those of the planes: first and last row, first and last column
# Sums of a plane: 75 products by (planes apart, rows apart, columns apart), then 9 sums of voxels.
_LAGS = 75
_VOXEL_SUMS = 9
SUMS = _LAGS + _VOXEL_SUMS
_LARGEST = 3e38
_LANES = DOUBLE_LANES
_STACK = 25 * 8 * DOUBLE_LANES  # bytes
_TOTALS = 8 * SUMS

_SUMS_MAY_BE_REORDERED = {"contract", "reassoc", "nsz"}


@inlined()
def _clear(address, count):  # pragma: no cover - compiled
    floats = float32_at(address)
    for i in range(count):
        floats[i] = np.float32(0.0)


@kernel(JOB)
def pad(job):  # pragma: no cover - compiled
    """Copy x between zeros. One part is one plane of the padded buffer."""
    depth, height, width, pitch = job.depth, job.height, job.width, job.pitch
    parts = job.n * (depth + 2)
    plane = (height + 2) * pitch
    lead, slack = job.lead, job.slack
    x, padded, sides = np.int64(job.x), np.int64(job.padded), float32_at(job.sides)
    part = take(job)
    while part < parts:
        target = padded + 4 * (lead + part * plane)
        if part == 0:
            _clear(padded, lead)
        if part == parts - 1:
            _clear(target + 4 * plane, slack)
        sample = part // (depth + 2)
        d = part % (depth + 2) - 1
        if d < 0 or d == depth:
            _clear(target, plane)
        else:
            _clear(target, pitch)
            _clear(target + 4 * (height + 1) * pitch, pitch)
            for h in range(height):
                # Views of single rows: LLVM then sees that no index is negative.
                source = float32_at(x + 4 * ((sample * depth + d) * height + h) * width)
                row = float32_at(target + 4 * (h + 1) * pitch)
                for w in range(width):
                    row[w] = source[w]
                for w in range(width, pitch):
                    row[w] = np.float32(0.0)
                sides[(sample * 2 * depth + d) * height + h] = source[0]
                sides[((sample * 2 + 1) * depth + d) * height + h] = source[width - 1]
        part = take(job)


@inlined()
def _add_up(stack, count, out, at):  # pragma: no cover - compiled
    """Sum the lanes of ``count`` vectors."""
    for i in range(count):
        total = 0.0
        for j in range(_LANES):
            total += stack[i * _LANES + j]
        out[at + i] = total


@inlined()
def _plane_lags(address, plane, row, height, width, planes, out, at):  # pragma: no cover
    """Products of the plane at ``address`` with itself and the next ``planes`` - 1 planes.

    The padding holds zeros, so every sum runs over whole vectors of whole rows.
    """
    place = stack_bytes(_STACK)
    stack = float64_at(place)
    tile = double_zeros(15)
    for h in range(height):
        start = address + h * row
        for w in range(0, width, _LANES):
            tile = add_lag_products(tile, start + 4 * w, start + 4 * w, row, 3)
    store_doubles(tile, place)
    _add_up(stack, 15, out, at)
    for d in range(1, 3):
        if planes >> d & 1:
            tile = double_zeros(25)
            for h in range(height):
                start = address + h * row
                partner = start + d * plane - 2 * row
                for w in range(0, width, _LANES):
                    tile = add_lag_products(tile, start + 4 * w, partner + 4 * w, row, 5)
            store_doubles(tile, place)
            _add_up(stack, 25, out, at + 25 * d)
        else:
            for i in range(25):
                out[at + 25 * d + i] = 0.0


@inlined()
def _line_sum(address, count):  # pragma: no cover - compiled
    line = float32_at(address)
    total = 0.0
    for i in range(count):
        total += np.float64(line[i])
    return total


@inlined()
def _voxel_sums(address, row, height, width, out, at):  # pragma: no cover - compiled
    """Sums over the plane, its first and last row, first and last column, and its 4 corners."""
    total, first_column, last_column = 0.0, 0.0, 0.0
    for h in range(height):
        line = float32_at(address + h * row)
        total += _line_sum(address + h * row, width)
        first_column += np.float64(line[0])
        last_column += np.float64(line[width - 1])
    first, last = float32_at(address), float32_at(address + (height - 1) * row)
    out[at] = total
    out[at + 1] = _line_sum(address, width)
    out[at + 2] = _line_sum(address + (height - 1) * row, width)
    out[at + 3] = first_column
    out[at + 6] = last_column
    out[at + 4] = np.float64(first[0])
    out[at + 5] = np.float64(last[0])
    out[at + 7] = np.float64(first[width - 1])
    out[at + 8] = np.float64(last[width - 1])


@inlined()
def _face_lags(address, row, rows, columns, out, at):  # pragma: no cover - compiled
    """Products of a face with itself, by rows (0 to 2) and columns (-2 to 2) apart."""
    for i in range(3):
        for j in range(-2, 3):
            total = 0.0
            for r in range(rows - i):
                start = address + r * row
                here = float32_at(start - 4 * j if j < 0 else start)
                there = float32_at(start + i * row + (4 * j if j > 0 else 0))
                for c in range(columns - abs(j)):
                    total += np.float64(here[c]) * np.float64(there[c])
            out[at + 5 * i + j + 2] = total


@kernel(JOB, fastmath=_SUMS_MAY_BE_REORDERED)
def sum_products(job):  # pragma: no cover - compiled
    """Fill `sums`. Parts are the planes and then the four faces that cut through them."""
    depth, height, width, pitch = job.depth, job.height, job.width, job.pitch
    rows = depth + FACES
    parts = job.n * rows
    row, plane = 4 * pitch, 4 * (height + 2) * pitch
    origin = np.int64(job.padded) + 4 * job.lead + plane + row
    planes, sides, sums = job.lag_planes, np.int64(job.sides), float64_at(job.sums)
    part = take(job)
    while part < parts:
        sample = part // rows
        # The faces come first: they are small and would keep one thread waiting at the end.
        d = (part % rows + depth) % rows
        at = (sample * rows + d) * SUMS
        start = origin + sample * (depth + 2) * plane
        if d < depth:
            start += d * plane
            present = planes if d + 2 < depth else planes & (3 if d + 1 < depth else 1)
            _plane_lags(start, plane, row, height, width, present, sums, at)
            _voxel_sums(start, row, height, width, sums, at + _LAGS)
        elif d < depth + 2:
            start += (d - depth) * (height - 1) * row
            _face_lags(start, plane, depth, width, sums, at)
        else:
            side = sides + 4 * (sample * 2 + d - depth - 2) * depth * height
            _face_lags(side, 4 * height, depth, height, sums, at)
        part = take(job)


@inlined()
def _lag(d, h, w):  # pragma: no cover - compiled
    """Where a plane's sums hold the products of voxels that lie (d, h, w) apart, either way."""
    if d < 0 or (d == 0 and h < 0):
        d, h, w = -d, -h, -w
    return 25 * d + 5 * (h if d == 0 else h + 2) + w + 2


@inlined()
def _face_lag(i, j):  # pragma: no cover - compiled
    if i < 0:
        i, j = -i, -j
    return 5 * i + j + 2


@inlined()
def _edge(x, start, stride, count, apart):  # pragma: no cover - compiled
    """Products of voxels of a line with those ``apart`` further on (either way)."""
    apart = abs(apart)
    total = 0.0
    for i in range(count - apart):
        total += np.float64(x[start + i * stride]) * np.float64(x[start + (i + apart) * stride])
    return total


@inlined()
def _excluded(a, b, size):  # pragma: no cover - compiled
    """Position along an axis that both taps miss (-1: none).

    Tap a reads voxel q + a - 1 of output q: tap 2 never reads voxel 0, tap 0 never the last one.
    Where the taps differ, the padding's zero in one factor does the same.
    """
    if a != b or a == 1:
        return -1
    return 0 if a == 2 else size - 1


@inlined()
def _box(sums, at, eh, ew):  # pragma: no cover - compiled
    """Sum of a plane's voxels without an excluded row and column (0, or 1 first, or 2 last)."""
    total = sums[at]
    if eh > 0:
        total -= sums[at + eh]
    if ew > 0:
        total -= sums[at + 3 * ew]
    if eh > 0 and ew > 0:
        total += sums[at + 3 * ew + eh]
    return total


@inlined()
def _products(x, origin, plane, pitch, shape, sums, row, totals, a, b):  # pragma: no cover
    """Entry (a, b) of the Gram matrix: all products of their distance less those they miss."""
    depth, height, width = shape
    ad, ah, aw = a // 9, a // 3 % 3, a % 3
    bd, bh, bw = b // 9, b // 3 % 3, b % 3
    d, h, w = bd - ad, bh - ah, bw - aw
    ed, eh, ew = _excluded(ad, bd, depth), _excluded(ah, bh, height), _excluded(aw, bw, width)
    value = totals[_lag(d, h, w)]
    if ed >= 0:
        value -= sums[row + ed * SUMS + _lag(0, h, w)]
    if eh >= 0:
        face = row + (depth + (eh > 0)) * SUMS
        value -= sums[face + _face_lag(d, w)]
    if ew >= 0:
        face = row + (depth + 2 + (ew > 0)) * SUMS
        value -= sums[face + _face_lag(d, h)]
    if ed >= 0 and eh >= 0:
        value += _edge(x, origin + ed * plane + eh * pitch, 1, width, w)
    if ed >= 0 and ew >= 0:
        value += _edge(x, origin + ed * plane + ew, pitch, height, h)
    if eh >= 0 and ew >= 0:
        value += _edge(x, origin + eh * pitch + ew, plane, depth, d)
    if ed >= 0 and eh >= 0 and ew >= 0:
        corner = np.float64(x[origin + ed * plane + eh * pitch + ew])
        value -= corner * corner
    return value


@kernel(JOB)
def moments(job):  # pragma: no cover - compiled
    """Fill `gram`, `boxes`, `moments` and `verdicts`. One part is one sample."""
    n, channels, pitch, eps = job.n, job.channels, job.pitch, job.eps
    shape = job.depth, job.height, job.width
    depth, height, width = shape
    voxels = np.float64(depth * height * width)
    plane = (height + 2) * pitch
    sample_size = (depth + 2) * plane
    x = float32_at(job.padded)
    sums = float64_at(job.sums)
    first = int64_at(job.first)
    taps = int64_at(job.taps)
    weights = float32_at(job.weights)
    has_bias = job.bias != 0
    bias = float32_at(job.bias)
    gram = float64_at(job.gram)
    boxes = float64_at(job.boxes)
    found = float64_at(job.moments)
    verdicts = int64_at(job.verdicts)
    totals = float64_at(stack_bytes(_TOTALS))
    lead = job.lead
    sample = take(job)
    while sample < n:
        row = sample * (depth + FACES) * SUMS
        for i in range(SUMS):
            totals[i] = 0.0
        for d in range(depth):
            for i in range(SUMS):
                totals[i] += sums[row + d * SUMS + i]
        origin = lead + sample * sample_size + plane + pitch
        for a in range(27):
            ed = _excluded(a // 9, a // 9, depth)
            # Tap 0 misses the last row or column (2 of `_box`), tap 2 the first (1).
            eh = (2, 0, 1)[a // 3 % 3]
            ew = (2, 0, 1)[a % 3]
            total = _box(totals, _LAGS, eh, ew)
            if ed >= 0:
                total -= _box(sums, row + ed * SUMS + _LAGS, eh, ew)
            boxes[sample * 27 + a] = total
            for b in range(a, 27):
                value = _products(x, origin, plane, pitch, shape, sums, row, totals, a, b)
                gram[(sample * 27 + a) * 27 + b] = value
                gram[(sample * 27 + b) * 27 + a] = value
        # Bounds every voxel, and is not finite if one of them is not.
        largest = np.sqrt(totals[2])
        verdict = FINE
        for c in range(channels):
            mean, square, reach = 0.0, 0.0, 0.0
            for i in range(first[c], first[c + 1]):
                inner = 0.0
                for j in range(first[c], first[c + 1]):
                    place = (sample * 27 + taps[i]) * 27 + taps[j]
                    inner += np.float64(weights[j]) * gram[place]
                weight = np.float64(weights[i])
                square += weight * inner
                mean += weight * boxes[sample * 27 + taps[i]]
                reach += abs(weight)
            mean /= voxels
            square /= voxels
            variance = square - mean * mean
            variance = variance if variance > 0.0 else 0.0
            reach *= largest
            if has_bias:
                reach += abs(np.float64(bias[c]))
            if not (reach <= _LARGEST and variance + eps > 0.0):
                verdict = NOT_FINITE
            elif verdict == FINE and (
                mean * mean > 256.0 * (variance + eps) or variance < 1e-9 * square
            ):
                verdict = CANCELLED
            found[(sample * channels + c) * 2] = mean
            found[(sample * channels + c) * 2 + 1] = 1.0 / np.sqrt(variance + eps)
        verdicts[sample] = verdict
        sample = take(job)
