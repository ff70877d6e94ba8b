"""From tiles, which run over the gaps between padded rows, to rows without gaps."""

import numba

from sparsekit.kernels.memory import clear_bytes
from sparsekit.kernels.vector import (
    LANES,
    VECTOR_BYTES,
    copy_first,
    copy_vector,
    stream_vector,
)


@numba.njit
def copy_rows(target, source, first, count, pitch, height, width):  # pragma: no cover - compiled
    """Copy what of a plane's flat numbers first..first+count are voxels to rows without gaps.

    Whole vectors are read from ``source``, also at its end. Returns how many numbers were copied;
    they stand one after another, from voxel ``voxels_before(first, ...)`` of the plane on.
    """
    row = first // pitch
    begin = row * pitch
    copied = 0
    while begin < first + count and row < height:
        low = max(begin, first)
        left = min(begin + width, first + count) - low
        place = source + 4 * (low - first)
        while left >= LANES:
            copy_vector(target, place)
            target += VECTOR_BYTES
            place += VECTOR_BYTES
            left -= LANES
            copied += LANES
        if left > 0:
            copy_first(target, place, left)
            target += 4 * left
            copied += left
        row += 1
        begin += pitch
    return copied


@numba.njit
def voxels_before(first, pitch, height, width):  # pragma: no cover - compiled
    """How many voxels of a plane have a flat number below ``first``."""
    row = min(first // pitch, height)
    return row * width + min(first - row * pitch, width) if row < height else height * width


@numba.njit
def stream_rows(
    target, source, first, count, pitch, height, width, line
):  # pragma: no cover - compiled
    """Do as `copy_rows`, past the caches; ``line`` is scratch memory, aligned to vectors."""
    shift = target % VECTOR_BYTES
    copied = 4 * copy_rows(line + shift, source, first, count, pitch, height, width)
    place = line + shift
    head = min(copied, (VECTOR_BYTES - shift) % VECTOR_BYTES)
    copy_first(target, place, head // 4)
    target += head
    place += head
    copied -= head
    while copied >= VECTOR_BYTES:
        stream_vector(target, place)
        target += VECTOR_BYTES
        place += VECTOR_BYTES
        copied -= VECTOR_BYTES
    copy_first(target, place, copied // 4)


@numba.njit
def clear_rows(target, first, count, pitch, height, width):  # pragma: no cover - compiled
    """Set what of a plane's flat numbers first..first+count are voxels to 0."""
    row = first // pitch
    begin = row * pitch
    while begin < first + count and row < height:
        low = max(begin, first)
        high = min(begin + width, first + count)
        if high > low:
            clear_bytes(target + 4 * (row * width + low - begin), 4 * (high - low))
        row += 1
        begin += pitch
