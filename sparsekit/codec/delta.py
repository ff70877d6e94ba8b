"""float32 values as differences to the base's, without loss: what a round did not change is free.

Floats of one sign are ordered like their bit patterns, so that the difference of two patterns,
taken as sign and magnitude, is a whole number m. Its bit length, less that of the base value's
step, says how large the difference is: a number with few common values. With the three bits after
the leading one it makes a byte, and a plane of such bytes goes through zstd. What is below is
noise and stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsekit.codec import frames, half
from sparsekit.codec.based_codes import DeltaCode
from sparsekit.codec.codes import LAYOUTS
from sparsekit.codec.elements import Bits
from sparsekit.codec.kept import Chunk, Kept
from sparsekit.errors import FormatError

_Ints = npt.NDArray[np.signedinteger]

_TOP_BITS = 3
_LARGEST = 31
_MOST_LENGTH = 33
_LEAST_VALUES = 32


@dataclass(frozen=True, slots=True)
class Packed:
    """Differences, all but compressed."""

    kind: str
    smallest: int
    plane: npt.NDArray[np.uint8]
    parts: list[bytes]
    expected_bits: int

    def section(self) -> tuple[DeltaCode, list[bytes]]:
        """Parameters, and the section in pieces."""
        plane = frames.compress(self.plane)
        return DeltaCode(self.kind, self.smallest, len(plane)), [plane, *self.parts]


def pack(kept: Kept, kind: str) -> Packed | None:
    """Differences of values to those of a float32 base; None where they are too few.

    The values are of that kind already.
    """
    if not _LEAST_VALUES <= kept.bits.size < 2**32:
        return None
    most = 0
    for chunk in kept.chunks():
        difference, base = _differences(chunk, kind)
        changed = difference != 0
        if changed.any():
            most = max(most, int((_lengths(difference) + _weight(base, kind))[changed].max()))
    smallest = most - _LARGEST
    plane = np.empty(kept.bits.size, np.uint8)
    parts: list[bytes] = []
    counts = np.zeros(256, np.int64)
    done = 0
    for chunk in kept.chunks():
        first, low, width = _fields(*_differences(chunk, kind), kind, smallest)
        counts += frames.byte_counts(first)
        plane[done : done + first.size] = first
        done += first.size
        end = 0
        for count in chunk.counts:
            start, end = end, end + count
            parts.append(_pack_low(low[start:end], width[start:end]))
    expected = frames.expected_bits(counts) + 8 * sum(map(len, parts))
    return Packed(kind, smallest, plane, parts, expected)


def _differences(chunk: Chunk, kind: str) -> tuple[_Ints, Bits]:
    """Differences of ordered patterns, and the base's patterns."""
    assert chunk.held is not None
    base = _of_kind(chunk.held, kind)
    return _ordered(chunk.bits) - _ordered(base), base


def _lengths(difference: _Ints) -> _Ints:
    # Exact: numbers of up to 33 bits are doubles.
    return np.frexp(difference.astype(np.float64))[1].astype(np.int64)


def _fields(
    difference: _Ints, base: Bits, kind: str, smallest: int
) -> tuple[npt.NDArray[np.uint8], _Ints, _Ints]:
    """Bytes of the plane, stored bits, and how many these are."""
    m = np.abs(difference)
    weight = _weight(base, kind)
    changed = m > 0
    size_class = np.where(changed, np.maximum(_lengths(m) + weight - smallest, 1), 0)
    below, width = _widths(size_class, weight, smallest)
    top = np.where(below >= _TOP_BITS, m >> np.maximum(below - _TOP_BITS, 0),
                   m << np.maximum(_TOP_BITS - below, 0)) & 7  # fmt: skip
    first = (size_class << _TOP_BITS | np.where(changed, top, 0)).astype(np.uint8)
    low_width = np.maximum(width - 1, 0)
    low = (m & (np.int64(1) << low_width) - 1) | (difference < 0).astype(np.int64) << low_width
    return first, np.where(changed, low, 0), width


def reader(
    section: memoryview, code: DeltaCode, k: int, scratch: npt.NDArray[np.uint8] | None = None
) -> Callable[[int, int, Bits | None], Bits]:
    """Return a function that gives the values from one index to another, each once, in order.

    They must be the values of one block after another; its third argument is what the base holds
    in their places. `scratch` is as for `frames.plane_reader`.
    """
    plane = frames.plane_reader(section[: code.first_len], k, scratch)
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
