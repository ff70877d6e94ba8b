"""Masks as Golomb-Rice coded gaps: near the entropy of a mask that is sparse, or dense, at random.

The section holds the gaps between the coded positions, cut into planes: one of bits for each of
the ``r`` low bits, then all quotients in unary. Planes need no bit-by-bit loop, so that NumPy
writes and reads them.
"""

from collections.abc import Iterator

import numpy as np

from sparsekit.codec.codes import RiceCode
from sparsekit.codec.positions import (
    CHUNK,
    Bools,
    Positions,
    flat_positions,
    positions_in,
    taking,
)
from sparsekit.errors import FormatError


def pack(keep: Bools, code: RiceCode) -> memoryview:
    """Section of a flat mask with at least one coded position."""
    positions = flat_positions(~keep if code.complement else keep)
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> code.r) + 1)
    unary = np.zeros(int(ends[-1]), np.bool_)
    unary[ends - 1] = True
    planes = [(gaps >> j & 1).astype(np.bool_) for j in range(code.r)]
    return np.packbits(np.concatenate([*planes, unary]), bitorder="little").data


def positions(
    section: memoryview, code: RiceCode, n: int, k: int, *, chunk: int = CHUNK
) -> Iterator[tuple[int, Positions]]:
    """Kept positions chunk by chunk, checked, in the form of `positions.bitmap_positions`."""
    coded = _coded(section, code, n, code.coded(n, k), chunk // 4)
    return _others(coded, n, chunk // 2) if code.complement else ((0, found) for found in coded)


def _coded(section: memoryview, code: RiceCode, n: int, c: int, chunk: int) -> Iterator[Positions]:
    """The `c` >= 1 coded positions, as many at a time as a chunk of the unary plane ends."""
    r = code.r
    packed = np.frombuffer(section, np.uint8)

    def bits(first: int, last: int) -> Bools:
        unpacked = np.unpackbits(packed[first // 8 : -(-last // 8)], bitorder="little")
        return unpacked.view(np.bool_)[first % 8 :][: last - first]

    done = lows = end = 0
    unary_bits = 8 * len(section) - r * c
    for first in range(0, unary_bits, chunk):
        ends = positions_in(bits(r * c + first, r * c + min(first + chunk, unary_bits))) + first
        count = ends.size
        if done + count > c:
            raise FormatError(f"its gaps are more than the {c} of its record")
        if not count:
            continue
        low = np.zeros(count, np.int64)
        for j in range(r):
            low |= bits(j * c + done, j * c + done + count).astype(np.int64) << j
        total = np.cumsum(low) + lows
        index = np.arange(done, done + count)
        # The unary bits before an end, less the ends among them, are the sum of the quotients.
        found = (ends - index << r) + total + index
        if found[-1] >= n:
            raise FormatError(f"its gaps lead beyond the {n} elements")
        yield found
        done += count
        lows, end = int(total[-1]), int(ends[-1])
    if done != c:
        raise FormatError(f"it has {done} gaps, its record needs {c}")
    if (r * c + end) // 8 != len(section) - 1:
        raise FormatError("it does not end with the last gap")


def _others(coded: Iterator[Positions], n: int, chunk: int) -> Iterator[tuple[int, Positions]]:
    """Positions that are not among the coded ones."""
    take = taking(coded)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        keep = np.ones(stop - start, np.bool_)
        # The last call also looks at what stands after the last position.
        keep[take(stop) - start] = False
        yield start, positions_in(keep)
