"""float32 values as differences to the base's, without loss: what a round did not change is free.

Floats of one sign are ordered like their bit patterns, so that the difference of two patterns,
taken as sign and magnitude, is a whole number m. Its bit length, less that of the base value's
step, says how large the difference is: a number with few common values. With the three bits after
the leading one it makes a byte, and a plane of such bytes goes through zstd. What is below is
noise and stays as it is.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparsekit.codec import frames, half
from sparsekit.codec.based_codes import BLOCK, DeltaCode
from sparsekit.codec.codes import LAYOUTS
from sparsekit.codec.elements import Bits
from sparsekit.errors import FormatError

_Ints = npt.NDArray[np.signedinteger]

_TOP_BITS = 3
_LARGEST = 31
_MOST_LENGTH = 33
_LEAST_VALUES = 32


def pack(
    bits: Bits, kind: str, base: Bits, counts: _Ints
) -> tuple[DeltaCode, memoryview, int] | None:
    """Parameters, section and expected bits of values; None where they are too few.

    `bits` are of that kind already, `base` of float32; `counts` are the numbers of values in each
    block of elements.
    """
    if not _LEAST_VALUES <= bits.size < 2**32:
        return None
    base = _of_kind(base, kind)
    difference = _ordered(bits) - _ordered(base)
    m = np.abs(difference)
    # Exact: numbers of up to 33 bits are doubles.
    length = np.frexp(m.astype(np.float64))[1].astype(np.int64)
    weight = _weight(base, kind)
    changed = m > 0
    most = int((length + weight)[changed].max()) if changed.any() else 0
    smallest = most - _LARGEST
    size_class = np.where(changed, np.maximum(length + weight - smallest, 1), 0)
    below, width = _widths(size_class, weight, smallest)
    top = np.where(below >= _TOP_BITS, m >> np.maximum(below - _TOP_BITS, 0),
                   m << np.maximum(_TOP_BITS - below, 0)) & 7  # fmt: skip
    first = (size_class << _TOP_BITS | np.where(changed, top, 0)).astype(np.uint8)
    low_width = np.maximum(width - 1, 0)
    low = (m & (np.int64(1) << low_width) - 1) | (difference < 0).astype(np.int64) << low_width
    low = np.where(changed, low, 0)
    ends = np.cumsum(counts)
    parts = [
        _pack_low(low[end - count : end], width[end - count : end])
        for count, end in zip(counts, ends, strict=True)
    ]
    plane = frames.compress(first)
    section = b"".join([plane, *parts])
    expected = frames.expected_bits(first) + 8 * sum(map(len, parts))
    return DeltaCode(kind, smallest, len(plane)), memoryview(section), expected


def reader(section: memoryview, code: DeltaCode, k: int) -> Callable[[int, int, Bits | None], Bits]:
    """Return a function that gives the values from one index to another, each once, in order.

    They must be the values of one block after another; its third argument is what the base holds
    in their places.
    """
    plane = frames.plane_reader(section[: code.first_len], k)
    packed = np.frombuffer(section[code.first_len :], np.uint8)
    at = 0

    def read(start: int, stop: int, base: Bits | None) -> Bits:
        nonlocal at
        assert base is not None
        base = _of_kind(base, code.kind)
        first = plane(stop - start, stop == k).astype(np.int32)
        size_class, top = first >> _TOP_BITS, (first & 7).astype(np.int64)
        below, width = _widths(size_class, _weight(base, code.kind), code.smallest)
        low, used = _read_low(packed[at:], width)
        at += used
        if stop == k and at != packed.size:
            raise FormatError("it does not end with the last difference")
        # In place, because a block's numbers are all the memory that decoding needs.
        found = low & (np.int64(1) << np.maximum(width - 1, 0)) - 1
        low >>= np.maximum(width - 1, 0)
        top <<= np.maximum(below - _TOP_BITS, 0)
        top >>= np.maximum(_TOP_BITS - below, 0)
        found |= top
        top[:] = size_class >= 2
        top <<= np.maximum(below, 0)
        found |= top
        found *= size_class > 0
        np.negative(found, out=found, where=(low & 1).astype(np.bool_))
        found += _ordered(base)
        sign = 1 << 8 * base.itemsize - 1
        if found.size and np.abs(found).max() >= sign:
            raise FormatError("a difference leads beyond all numbers")
        bits: Bits = np.where(found < 0, sign - found, found).astype(base.dtype)
        return bits if code.kind == "float32" else half.widen(bits, code.kind)

    return read


def block_counts(keep: npt.NDArray[np.bool_]) -> _Ints:
    """Kept elements of each block."""
    starts = range(0, keep.size, BLOCK)
    return np.array([np.count_nonzero(keep[i : i + BLOCK]) for i in starts], np.int64)


def _of_kind(base: Bits, kind: str) -> Bits:
    return base if kind == "float32" else half.rounded(base, kind)


def _ordered(bits: Bits) -> _Ints:
    sign = 1 << 8 * bits.itemsize - 1
    numbers = bits.astype(np.int64)
    return np.where(numbers >= sign, sign - numbers, numbers)


def _weight(base: Bits, kind: str) -> _Ints:
    """Exponents of the base's steps."""
    layout = LAYOUTS[kind]
    exponents = base >> base.dtype.type(layout.mantissa_bits)
    return exponents.astype(np.int32) & np.int32((1 << layout.exponent_bits) - 1)


def _widths(size_class: _Ints, weight: _Ints, smallest: int) -> tuple[_Ints, _Ints]:
    """Bits of m below an implied leading one, and stored bits of a difference with its sign."""
    length = np.clip(size_class + smallest - weight, 1, _MOST_LENGTH)
    # Small numbers in small types: there are as many as a block has elements.
    below = (length - (size_class >= 2)).astype(np.int8)
    width = np.maximum(below - np.int8(_TOP_BITS), 0) + np.int8(1)
    return below, np.where(size_class > 0, width, np.int8(0))


def _pack_low(low: _Ints, width: _Ints) -> bytes:
    """Low bits of one block: bytes of all that have one, the second bytes, ..., then bits."""
    parts = []
    for j in range(4):
        fitting = np.flatnonzero(width >= 8 * (j + 1))
        parts.append((low[fitting] >> 8 * j).astype(np.uint8).tobytes())
    bits = []
    for j in range(7):
        fitting = np.flatnonzero(width % 8 > j)
        bits.append((low[fitting] >> 8 * (width[fitting] // 8) + j & 1).astype(np.bool_))
    parts.append(np.packbits(np.concatenate(bits), bitorder="little").tobytes())
    return b"".join(parts)


def _read_low(packed: npt.NDArray[np.uint8], width: _Ints) -> tuple[_Ints, int]:
    """Low bits of one block, and how many bytes it takes."""
    low = np.zeros(width.size, np.int64)
    whole, rest = width // 8, width % 8
    at = int(whole.sum())
    size = at + -(-int(rest.sum()) // 8)
    if size > packed.size:
        raise FormatError("it ends before the last difference")
    first = 0
    for j in range(4):
        fitting = np.flatnonzero(whole > j)
        low[fitting] |= packed[first : first + fitting.size].astype(np.int64) << 8 * j
        first += fitting.size
    bits = np.unpackbits(packed[at:size], bitorder="little")
    first = 0
    for j in range(7):
        fitting = np.flatnonzero(rest > j)
        found = bits[first : first + fitting.size].astype(np.int64)
        low[fitting] |= found << 8 * whole[fitting] + j
        first += fitting.size
    if bits[first:].any():
        raise FormatError("the unused bits of a block are not zero")
    return low, size
