"""Rice codes of masks, with NumPy: the oracle for every other backend.

`docs/wire-format.md` describes the bytes of a section.
"""

from collections.abc import Callable

import numpy as np

from sparsekit.kernels.bitmap.reference import Packed
from sparsekit.kernels.bitmap.reference import pack as pack_bits
from sparsekit.kernels.bitmap.reference import unpack as unpack_bits


def pack(packed: Packed, n: int, count: int, r: int, complement: bool) -> Packed:
    """Section of a mask of which `count` >= 1 entries are coded."""
    positions = np.flatnonzero(unpack_bits(packed, n) ^ complement)
    assert positions.size == count
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> r) + 1)
    unary = np.zeros(int(ends[-1]), np.bool_)
    unary[ends - 1] = True
    planes = [(gaps >> j & 1).astype(np.bool_) for j in range(r)]
    return pack_bits(np.concatenate([*planes, unary]))


def unpacker(
    section: Packed, n: int, count: int, r: int, complement: bool
) -> Callable[[int, int], Packed]:
    """Return a function that gives the mask's bits from one entry to another, in order.

    It raises `ValueError` for a section that is none of `count` gaps inside of `n` entries.
    """

    def read(start: int, stop: int) -> Packed:
        bits = unpack_bits(section, 8 * section.size)
        ends = np.flatnonzero(bits[r * count :])
        if ends.size != count:
            raise ValueError(f"it has {ends.size} gaps, its record needs {count}")
        if -(-(r * count + int(ends[-1]) + 1) // 8) != section.size:
            raise ValueError("it does not end with the last gap")
        gaps = np.diff(ends, prepend=-1) - 1 << r
        for j in range(r):
            gaps |= bits[j * count : (j + 1) * count].astype(np.int64) << j
        positions = np.cumsum(gaps + 1) - 1
        if positions[-1] >= n:
            raise ValueError(f"its gaps lead beyond the {n} elements")
        mask = np.zeros(n, np.bool_)
        mask[positions] = True
        return pack_bits((mask ^ complement)[start:stop])

    return read
