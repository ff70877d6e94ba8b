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

from sparsekit.codec import frames, half, rice, split
from sparsekit.codec.codes import choose_rice
from sparsekit.codec.positions import (
    CHUNK,
    Bools,
    Positions,
    check_tail,
    flat_positions,
    positions_in,
)
from sparsekit.codec.records import BOOL, DType, MaskCode, Record, ValueCode, csr_grid, csr_width
from sparsekit.errors import FormatError

Bits: TypeAlias = npt.NDArray[np.unsignedinteger]
Section: TypeAlias = memoryview

# From this many elements on the compiled bitmap kernels are faster than NumPy, and worth loading.
KERNEL_ELEMENTS = 2**17


# Masks of fewer elements are not worth a frame, between the densities where both others are more
# than 2 % above the entropy (in thousandths), and elsewhere.
_LEAST_BETWEEN = 2**15
_BETWEEN = (345, 410)
_LEAST_FRAMED = 2**11
# Words that may be empty by chance although twice as many as expected are allowed.
_CHANCE_WORDS = 8


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


def pack_mask(code: MaskCode, keep: Bools, k: int, shape: tuple[int, ...]) -> tuple[bytes, Section]:
    """Parameters and mask section of the flat mask `keep`, which keeps `k`."""
    match code:
        case MaskCode.BITMAP:
            return b"", np.packbits(keep, bitorder="little").data
        case MaskCode.RICE:
            parameters, _ = choose_rice(keep.size, k)
            return bytes([parameters.parameter]), rice.pack(keep, parameters)
        case MaskCode.CSR:
            rows, columns = csr_grid(shape)
            width = csr_width(columns)
            assert width is not None
            positions = flat_positions(keep)
            row_starts = np.arange(rows) * columns
            counts = np.diff(np.searchsorted(positions, row_starts), append=positions.size)
            places = positions - np.repeat(row_starts, counts)
            numbers = np.concatenate([counts, places]).astype(f"<u{width}")
            return b"", numbers.view(np.uint8).data
        case MaskCode.BITMAP_ZSTD:
            raise AssertionError("pack_frame says whether there is one")
        case MaskCode.DENSE | MaskCode.ALL_ZERO | MaskCode.SAME:
            return b"", memoryview(b"")


def pack_frame(keep: Bools, k: int) -> Section | None:
    """Compressed bitmap of a flat mask, where it may be smaller than what the counts promise.

    That is where neither a bitmap nor gaps come close to the entropy, and where whole words are
    empty or full more often than by chance: where filters or channels were pruned.
    """
    n = keep.size
    c = min(k, n - k)
    if n < _LEAST_FRAMED:
        return None
    packed = np.packbits(keep, bitorder="little")
    between = n >= _LEAST_BETWEEN and _BETWEEN[0] * n <= 1000 * c <= _BETWEEN[1] * n
    if not between:
        words = packed[: packed.size // 8 * 8].view("<u8")
        alike = max(np.count_nonzero(words == 0), np.count_nonzero(words == 2**64 - 1))
        by_chance = 1.0 - c / n
        for _ in range(6):
            by_chance *= by_chance
        if alike <= 2 * by_chance * words.size + _CHANCE_WORDS:
            return None
    frame = frames.compress(packed)
    return memoryview(frame) if len(frame) < packed.size else None


def pack_values(
    bits: Bits, dtype: DType, coded: bool, kind: str | None
) -> tuple[ValueCode, bytes, Section]:
    """Code, parameters and section of the kept elements, which may share the memory of `bits`.

    `kind` is the type of 16 bits to which float32 numbers are rounded, if any.
    """
    if kind is not None and dtype.name == "float32" and bits.size:
        halves = half.pack(bits, kind, coded)
        return ValueCode.HALF, halves[0].parameters, halves[1]
    packed = split.pack(bits, dtype) if coded else None
    if packed is not None:
        return ValueCode.SPLIT, packed[0].parameters, packed[1]
    if dtype is BOOL:
        return ValueCode.RAW, b"", np.packbits(bits.view(np.uint8), bitorder="little").data
    return ValueCode.RAW, b"", bits.astype(unsigned(dtype), copy=False).view(np.uint8).data


def read_values(section: Section, dtype: DType, k: int) -> Bits:
    """All `k` kept elements of a raw value section, in an array of their own."""
    if dtype is BOOL:
        check_tail(section, k)
        packed = np.frombuffer(section, np.uint8)
        return np.unpackbits(packed, count=k, bitorder="little")
    return np.frombuffer(section, unsigned(dtype)).copy()


def value_reader(section: Section, record: Record, dtype: DType) -> Callable[[int, int], Bits]:
    """Return a function that gives the kept elements from one index to another, in order."""
    k = record.k
    if record.value_code == ValueCode.SPLIT:
        return split.reader(section, record.split, dtype, k)
    if record.value_code == ValueCode.HALF:
        return half.reader(section, record.half, k)
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


def expand_bitmap(section: Section, values: Section, dtype: DType, n: int, k: int) -> Bits:
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
