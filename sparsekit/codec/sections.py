"""Mask and value sections in NumPy: what stands between two records' offsets.

Elements travel as unsigned integers of their own width, so that no floating-point unit ever
touches them: NaN payloads survive, and flush-to-zero modes cannot change a mask.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.codec.wire import BOOL, DType, MaskCode, csr_grid, csr_width
from sparsekit.errors import FormatError

Bits: TypeAlias = npt.NDArray[np.unsignedinteger]
Bools: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]

# Masks are unpacked this many elements at a time: temporaries stay in the level-2 cache, and
# decoding needs less than 1 MiB beside its result.
CHUNK = 2**15

# From this many elements on the compiled bitmap kernels are faster than NumPy, and worth loading.
KERNEL_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class Elements:
    """A tensor without its framework: element type, shape and flat little-endian bit patterns."""

    dtype: DType
    shape: tuple[int, ...]
    bits: Bits


def unsigned(dtype: DType) -> np.dtype[np.unsignedinteger]:
    """NumPy type that carries the bit patterns of an element type."""
    return np.dtype(f"<u{dtype.itemsize}")


def nonzero(bits: Bits, dtype: DType) -> Bools:
    """True where an element is not zero; -0.0 is zero, NaN is not."""
    keep = np.empty(bits.size, np.bool_)
    # Chunk by chunk, because the masked copy of a whole tensor would not stay in the cache.
    for start in range(0, bits.size, CHUNK):
        chunk = bits[start : start + CHUNK]
        if dtype.sign_bit:
            chunk = chunk & bits.dtype.type(dtype.sign_bit - 1)
        np.not_equal(chunk, 0, out=keep[start : start + CHUNK])
    return keep


def canonical(bits: Bits, dtype: DType) -> Bits:
    """The same elements with +0.0 for -0.0; a copy only where one occurs."""
    if not dtype.sign_bit:
        return bits
    other = bits != bits.dtype.type(dtype.sign_bit)
    return bits if other.all() else bits * other


def positions_in(keep: Bools) -> Positions:
    """Positions of True in one chunk of a mask: `np.flatnonzero` without its slow range."""
    n = keep.size
    count = np.count_nonzero(keep)
    # Up to a density of 0.1 NumPy jumps from one True to the next, which is the slower way from
    # about 0.02 on. True elements after the end make it take the other, branch-free way.
    if not 0.02 * n < count <= 0.1 * n:
        return np.flatnonzero(keep)
    extended = np.ones(n + n // 8 + 1, np.bool_)
    extended[:n] = keep
    return np.flatnonzero(extended)[:count]


def _positions_of(keep: Bools) -> Positions:
    chunks = [
        positions_in(keep[start : start + CHUNK]) + start for start in range(0, keep.size, CHUNK)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, np.intp)


def kernels_pay_off(n: int) -> bool:
    """Whether masks of so many elements are for the compiled kernels.

    They run on torch's threads, so that a process that decodes without torch stays with NumPy.
    """
    return n >= KERNEL_ELEMENTS and sys.modules.get("torch") is not None


def _bitmap(function: str) -> Callable[..., Any]:
    from sparsekit.kernels import dispatch

    return dispatch.resolve(f"bitmap_{function}", "cpu").implementation.load()


def compact(bits: Bits, keep: Bools, k: int) -> Bits:
    """Collect the `k` kept elements in order."""
    if kernels_pay_off(bits.size):
        kept_bits: Bits = _bitmap("compact")(bits, _bitmap("pack")(keep))
        return kept_bits
    kept = np.empty(k, bits.dtype)
    done = 0
    for start in range(0, bits.size, CHUNK):
        positions = positions_in(keep[start : start + CHUNK])
        kept[done : done + positions.size] = bits[start : start + CHUNK].take(positions)
        done += positions.size
    return kept


def pack_mask(code: MaskCode, keep: Bools, shape: tuple[int, ...]) -> memoryview:
    """Mask section of the flat mask `keep`."""
    match code:
        case MaskCode.BITMAP:
            return np.packbits(keep, bitorder="little").data
        case MaskCode.CSR:
            rows, columns = csr_grid(shape)
            width = csr_width(columns)
            assert width is not None
            positions = _positions_of(keep)
            row_starts = np.arange(rows) * columns
            counts = np.diff(np.searchsorted(positions, row_starts), append=positions.size)
            places = positions - np.repeat(row_starts, counts)
            numbers = np.concatenate([counts, places]).astype(f"<u{width}")
            return numbers.view(np.uint8).data
        case MaskCode.DENSE | MaskCode.ALL_ZERO | MaskCode.SAME:
            return memoryview(b"")


def pack_values(bits: Bits, dtype: DType) -> memoryview:
    """Raw value section of the kept elements; it may share the memory of `bits`."""
    if dtype is BOOL:
        return np.packbits(bits.view(np.uint8), bitorder="little").data
    return bits.astype(unsigned(dtype), copy=False).view(np.uint8).data


def read_values(section: memoryview, dtype: DType, k: int) -> Bits:
    """All `k` kept elements of a raw value section, in an array of their own."""
    if dtype is BOOL:
        check_tail(section, k)
        packed = np.frombuffer(section, np.uint8)
        return np.unpackbits(packed, count=k, bitorder="little")
    return np.frombuffer(section, unsigned(dtype)).copy()


def value_reader(section: memoryview, dtype: DType, k: int) -> Callable[[int, int], Bits]:
    """Return a function that gives the kept elements from one index to another, uncopied."""
    if dtype is not BOOL:
        values = np.frombuffer(section, unsigned(dtype))
        return lambda start, stop: values[start:stop]
    check_tail(section, k)
    packed = np.frombuffer(section, np.uint8)

    def read(start: int, stop: int) -> Bits:
        first = start // 8
        bits = np.unpackbits(packed[first : -(-stop // 8)], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first]

    return read


def check_tail(section: memoryview, n_bits: int) -> None:
    """Refuse packed bits whose last byte holds more than they fill."""
    if n_bits % 8 and section[-1] >> (n_bits % 8):
        raise FormatError("the unused bits of the last byte are not zero")


def bitmap_positions(section: memoryview, n: int) -> Iterator[tuple[int, Positions]]:
    """Kept positions chunk by chunk: where the chunk starts, and positions counted from there."""
    check_tail(section, n)
    packed = np.frombuffer(section, np.uint8)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        bits = np.unpackbits(
            packed[start // 8 : -(-stop // 8)], count=stop - start, bitorder="little"
        )
        yield start, positions_in(bits.view(np.bool_))


def expand_bitmap(section: memoryview, values: memoryview, dtype: DType, n: int, k: int) -> Bits:
    """All `n` elements from a bitmap section and the raw section of its `k` kept elements."""
    check_tail(section, n)
    packed = np.frombuffer(section, np.uint8)
    kept = np.frombuffer(values, unsigned(dtype))
    found = _bitmap("count")(packed, n)
    if found != k:
        raise FormatError(f"its mask keeps {found} elements, its record says {k}")
    bits: Bits = _bitmap("expand")(kept, packed, n)
    return bits


def pattern_positions(base: Elements) -> Iterator[tuple[int, Positions]]:
    """Positions of the non-zero elements of a base tensor, in the form of `bitmap_positions`."""
    for start in range(0, base.bits.size, CHUNK):
        yield start, positions_in(nonzero(base.bits[start : start + CHUNK], base.dtype))


def csr_positions(
    section: memoryview, shape: tuple[int, ...], k: int
) -> Iterator[tuple[int, Positions]]:
    """Kept positions of a CSR section, checked; each chunk is counted from a row's start.

    The section holds one count per row and then `k` columns, all of the same width. Rows and
    entries are taken in chunks, because either may be the long side of a hostile payload.
    """
    rows, columns = csr_grid(shape)
    width = csr_width(columns)
    assert width is not None
    numbers = np.frombuffer(section, f"<u{width}")
    counts, places = numbers[:rows], numbers[rows:]
    seen = 0
    for first_row in range(0, rows, CHUNK // 8):
        ends = seen + np.cumsum(counts[first_row : first_row + CHUNK // 8], dtype=np.int64)
        stop_entry = int(ends[-1])
        if stop_entry > k:
            raise FormatError(f"the row counts exceed the {k} kept elements")
        last = -1
        for start in range(seen, stop_entry, CHUNK // 4):
            stop = min(start + CHUNK // 4, stop_entry)
            in_chunk = np.diff(ends.clip(start, stop), prepend=start)
            place = places[start:stop].astype(np.intp)
            flat = np.repeat(np.arange(ends.size) * columns, in_chunk) + place
            if place.max() >= columns or flat[0] <= last or (flat[1:] <= flat[:-1]).any():
                raise FormatError("the columns of a row are not increasing inside the row")
            last = int(flat[-1])
            yield first_row * columns, flat
        seen = stop_entry
    if seen != k:
        raise FormatError(f"the row counts give {seen} of the {k} kept elements")
