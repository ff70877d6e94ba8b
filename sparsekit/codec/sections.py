"""Mask and value sections in NumPy: what stands between two records' offsets."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.codec import compiled, delta, frames, half, levels, split
from sparsekit.codec.codes import choose_rice
from sparsekit.codec.elements import Bits, unsigned
from sparsekit.codec.flags import Flags, bitmap_kernel
from sparsekit.codec.kept import Kept
from sparsekit.codec.positions import CHUNK, check_tail, positions_in
from sparsekit.codec.records import (
    BOOL,
    DTYPE_BY_NAME,
    DType,
    MaskCode,
    Record,
    ValueCode,
    csr_grid,
    csr_width,
)
from sparsekit.codec.wire import Buffer
from sparsekit.errors import FormatError

Section: TypeAlias = memoryview

# Masks of fewer elements are not worth a frame, between the densities where both others are more
# than 2 % above the entropy (in thousandths), and elsewhere.
_LEAST_BETWEEN = 2**15
_BETWEEN = (345, 410)
_LEAST_FRAMED = 2**11
# Words that may be empty by chance although twice as many as expected are allowed.
_CHANCE_WORDS = 8


Kind: TypeAlias = str | int | None
"""Name of a type of 16 bits, or number of bits of a level."""


def pack_mask(code: MaskCode, keep: Flags, shape: tuple[int, ...]) -> tuple[bytes, Section]:
    """Parameters and mask section of a flat mask."""
    match code:
        case MaskCode.BITMAP:
            return b"", keep.packed.data
        case MaskCode.RICE:
            parameters, _ = choose_rice(keep.n, keep.count)
            return bytes([parameters.parameter]), compiled.pack_rice(keep, parameters)
        case MaskCode.CSR:
            rows, columns = csr_grid(shape)
            width = csr_width(columns)
            assert width is not None
            numbers = np.empty(rows + keep.count, f"<u{width}")
            numbers[:rows] = np.count_nonzero(keep.bools.reshape(rows, columns), axis=1)
            done = rows
            for start in range(0, keep.n, CHUNK):
                places = positions_in(keep.bools[start : start + CHUNK])
                numbers[done : done + places.size] = (places + start) % columns
                done += places.size
            return b"", numbers.view(np.uint8).data
        case MaskCode.DENSE | MaskCode.ALL_ZERO:
            return b"", memoryview(b"")
        case _:
            raise AssertionError(f"{code.name} is packed elsewhere")


def pack_frame(keep: Flags) -> Section | None:
    """Compressed bitmap of a flat mask, where it may be smaller than what the counts promise.

    That is where neither a bitmap nor gaps come close to the entropy, and where whole words are
    empty or full more often than by chance: where filters or channels were pruned.
    """
    n = keep.n
    c = min(keep.count, n - keep.count)
    if n < _LEAST_FRAMED:
        return None
    packed = keep.packed
    between = n >= _LEAST_BETWEEN and _BETWEEN[0] * n <= 1000 * c <= _BETWEEN[1] * n
    if not between:
        words = packed[: packed.size // 8 * 8].view("<u8")
        alike = max(np.count_nonzero(words == 0), np.count_nonzero(words == 2**64 - 1))
        by_chance = 1.0 - c / n
        for _ in range(6):
            by_chance *= by_chance
        if alike <= 2 * by_chance * words.size + _CHANCE_WORDS:
            return None
    frame = frames.compress(packed, repeats=True)
    return memoryview(frame) if len(frame) < packed.size else None


def pack_values(
    kept: Kept, dtype: DType, coded: bool, kind: Kind
) -> tuple[ValueCode, bytes, list[Buffer]]:
    """Code, parameters and section, in pieces, of kept elements, whose memory it may share.

    `kind` is what float32 numbers are rounded to, if anything.

    Raises
    ------
    OverflowError
        If a finite number cannot be rounded to that kind.
    """
    if dtype.name == "float32" and kept.bits.size:
        if isinstance(kind, int):
            stepped = levels.pack(kept, kind)
            if stepped is not None:
                return ValueCode.LEVELS, stepped[0].parameters, [*stepped[1]]
        if isinstance(kind, str):
            # What it was is let go, if nobody else holds it.
            kept = replace(kept, bits=half.round_all(kept.bits, kind))
            dtype = DTYPE_BY_NAME[kind]
        if coded and kept.base is not None:
            moved = delta.pack(kept, dtype.name)
            if moved is not None and moved.expected_bits < split.expected_bits(kept.bits, dtype):
                code, pieces = moved.section()
                return ValueCode.DELTA, code.parameters, [*pieces]
        if isinstance(kind, str):
            halves = half.pack(kept.bits, kind, coded)
            return ValueCode.HALF, halves[0].parameters, halves[1]
    bits = kept.bits
    packed = split.pack(bits, dtype) if coded else None
    if packed is not None:
        return ValueCode.SPLIT, packed[0].parameters, packed[1]
    if dtype is BOOL:
        return ValueCode.RAW, b"", [np.packbits(bits.view(np.uint8), bitorder="little").data]
    return ValueCode.RAW, b"", [bits.astype(unsigned(dtype), copy=False).view(np.uint8).data]


def read_values(section: Section, dtype: DType, k: int) -> Bits:
    """All `k` kept elements of a raw value section, in an array of their own."""
    if dtype is BOOL:
        check_tail(section, k)
        packed = np.frombuffer(section, np.uint8)
        return np.unpackbits(packed, count=k, bitorder="little")
    return np.frombuffer(section, unsigned(dtype)).copy()


def value_reader(
    section: Section, record: Record, dtype: DType, scratch: npt.NDArray[np.uint8] | None = None
) -> Callable[[int, int, Bits | None], Bits]:
    """Return a function that gives the kept elements from one index to another, in order.

    Its third argument is what the base holds in their places, if the record needs it. `scratch`
    is as for `frames.plane_reader`.
    """
    if record.value_code == ValueCode.LEVELS:
        return levels.reader(section, record.levels, record.k, scratch)
    if record.value_code == ValueCode.DELTA:
        return delta.reader(section, record.delta, record.k, scratch)
    read = _plain_reader(section, record, dtype, scratch)
    return lambda start, stop, _: read(start, stop)


def _plain_reader(
    section: Section, record: Record, dtype: DType, scratch: npt.NDArray[np.uint8] | None
) -> Callable[[int, int], Bits]:
    k = record.k
    if record.value_code == ValueCode.SPLIT:
        return split.reader(section, record.split, dtype, k, scratch)
    if record.value_code == ValueCode.HALF:
        return half.reader(section, record.half, k, scratch)
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


def bitmap_parts(
    section: Section, values: Section, dtype: DType, n: int, k: int
) -> tuple[Bits, npt.NDArray[np.uint8]]:
    """Kept elements and bits of a bitmap section and the raw section of its `k` kept elements."""
    check_tail(section, n)
    packed = np.frombuffer(section, np.uint8)
    kept = np.frombuffer(values, unsigned(dtype))
    found = bitmap_kernel("count")(packed, n)
    if found != k:
        raise FormatError(f"its mask keeps {found} elements, its record says {k}")
    return kept, packed


def expand_bitmap(section: Section, values: Section, dtype: DType, n: int, k: int) -> Bits:
    """All `n` elements of a bitmap section and the raw section of its `k` kept elements."""
    kept, packed = bitmap_parts(section, values, dtype, n, k)
    bits: Bits = bitmap_kernel("expand")(kept, packed, n)
    return bits
