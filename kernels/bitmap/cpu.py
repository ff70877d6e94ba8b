"""Masks as bits on the CPU: the functions of `reference` by compiled passes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError
from sparsekit.kernels import parallel
from sparsekit.kernels.bitmap import passes
from sparsekit.kernels.bitmap.reference import (
    Bools,
    Packed,
    Values,
    check_bits,
    check_count,
    check_values,
)
from sparsekit.kernels.compiled import Kernel

# Two threads pay off from this many entries each.
_ENTRIES_PER_THREAD = 1 << 17


@dataclass(frozen=True, slots=True)
class Counts:
    """Bits set before each part of a mask, and in all."""

    before: npt.NDArray[np.uint64]
    total: int


def pack(mask: Bools) -> Packed:
    """Bits of a flat mask: entry i is bit i % 8 (from the lowest) of byte i // 8."""
    if mask.dtype != np.bool_ or mask.ndim != 1:
        raise ArgumentError(f"mask: expected flat bools, got {mask.dtype} of shape {mask.shape}")
    packed = np.empty(-(-mask.size // 8), np.uint8)
    _run(passes.pack, mask.size, bits=packed, bools=np.ascontiguousarray(mask))
    return packed


def nonzero(values: Values, wanted: int) -> Packed:
    """Bits of a flat array of unsigned integers: set where one of the wanted bits is."""
    check_values(values)
    packed = np.empty(-(-values.size // 8), np.uint8)
    items = np.ascontiguousarray(values)
    _run(
        passes.NONZERO[values.dtype.itemsize], values.size,
        wanted=wanted, bits=packed, whole=items,
    )  # fmt: skip
    return packed


def unpack(packed: Packed, n: int) -> Bools:
    """Flat mask of `n` entries; bits after the last are ignored."""
    check_bits(packed, n)
    mask = np.empty(n, np.bool_)
    _run(passes.unpack, n, bits=np.ascontiguousarray(packed), bools=mask)
    return mask


def count(packed: Packed, n: int) -> int:
    """Number of bits that are set among the first `n`."""
    check_bits(packed, n)
    return _counts(np.ascontiguousarray(packed), n)[1]


def compact(values: Values, packed: Packed) -> Values:
    """Values whose bit is set, in order."""
    check_values(values)
    check_bits(packed, values.size)
    bits = np.ascontiguousarray(packed)
    before, total = _counts(bits, values.size)
    kept = np.empty(total, values.dtype)
    whole = np.ascontiguousarray(values)
    compact_items = passes.COMPACT[values.dtype.itemsize]
    _run(compact_items, values.size, bits=bits, counts=before, whole=whole, kept=kept)
    return kept


def counts(packed: Packed, n: int) -> Counts:
    """Count the bits that are set, for `expand`."""
    check_bits(packed, n)
    return Counts(*_counts(np.ascontiguousarray(packed), n))


def expand(
    values: Values,
    packed: Packed,
    n: int,
    *,
    out: Values | None = None,
    counts: Counts | None = None,
) -> Values:
    """Put values at the bits that are set, in order; the other of the `n` entries are 0.

    `out` is a contiguous array to write into; `counts` are those of the same bits.
    """
    check_values(values)
    check_bits(packed, n)
    bits = np.ascontiguousarray(packed)
    before, total = _counts(bits, n) if counts is None else (counts.before, counts.total)
    check_count(values, total)
    whole = np.empty(n, values.dtype) if out is None else out
    if whole.shape != (n,) or whole.dtype != values.dtype or not whole.flags.c_contiguous:
        raise ArgumentError(f"out: expected {n} contiguous elements of {values.dtype}")
    kept = np.ascontiguousarray(values)
    expand_items = passes.EXPAND[values.dtype.itemsize]
    _run(expand_items, n, bits=bits, counts=before, whole=whole, kept=kept)
    return whole


def _counts(bits: Packed, n: int) -> tuple[npt.NDArray[np.uint64], int]:
    """Bits set before each part, and in all."""
    counts = np.empty(-(-n // passes.PART), np.uint64)
    _run(passes.count, n, bits=bits, counts=counts)
    ends = np.cumsum(counts)
    return ends - counts, int(ends[-1]) if ends.size else 0


def _run(kernel: Kernel, n: int, wanted: int = 0, **arrays: npt.NDArray[Any]) -> None:
    addresses = {name: array.__array_interface__["data"][0] for name, array in arrays.items()}
    job = kernel.job(
        parts=-(-n // passes.PART), n=n, wanted=wanted - (wanted >> 63 << 64), **addresses
    )
    parallel.run(kernel.address, job, parallel.thread_count(n, _ENTRIES_PER_THREAD))
