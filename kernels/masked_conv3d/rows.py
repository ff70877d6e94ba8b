"""From tiles, which run over the gaps between padded rows, to rows without gaps."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.masked_conv3d.geometry import Tiling
from sparsekit.kernels.memory import clear_bytes
from sparsekit.kernels.vector import (
    LANES,
    VECTOR_BYTES,
    copy_first,
    stream_vector,
)


@dataclass(frozen=True, slots=True)
class RowTable:
    """What of each tile of a plane are voxels."""

    lanes: npt.NDArray[np.uint16]
    """For each vector of each tile, a bit per lane; (tiles * columns,)."""
    firsts: npt.NDArray[np.int32]
    """Voxels of the plane before each tile, and all of them; (tiles + 1,)."""


@lru_cache(maxsize=256)
def row_table(tiling: Tiling, pitch: int, height: int, width: int) -> RowTable:
    """Tell voxels from gaps for rows of `width` voxels that lie `pitch` apart."""
    flat = np.arange(tiling.per_plane * tiling.columns * LANES)
    voxel = (flat // pitch < height) & (flat % pitch < width)
    bits = voxel.reshape(-1, LANES) @ (1 << np.arange(LANES))
    per_tile = voxel.reshape(tiling.per_plane, -1).sum(axis=1)
    firsts = np.concatenate([[0], np.cumsum(per_tile)])
    return RowTable(bits.astype(np.uint16), firsts.astype(np.int32))


@inlined()
def stream_numbers(target, source, count):  # pragma: no cover - compiled
    """Copy float32 numbers past the caches; whole vectors are read."""
    left = 4 * count
    head = min(left, (VECTOR_BYTES - target % VECTOR_BYTES) % VECTOR_BYTES)
    copy_first(target, source, head // 4)
    target += head
    source += head
    left -= head
    while left >= VECTOR_BYTES:
        stream_vector(target, source)
        target += VECTOR_BYTES
        source += VECTOR_BYTES
        left -= VECTOR_BYTES
    copy_first(target, source, left // 4)


@inlined()
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
