"""Masks as bits, with NumPy: the oracle for every other backend."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError

Bools: TypeAlias = npt.NDArray[np.bool_]
Packed: TypeAlias = npt.NDArray[np.uint8]
Values: TypeAlias = npt.NDArray[Any]


def check_bits(packed: Packed, n: int) -> None:
    """Refuse bits that are not flat bytes, or not as many as `n` entries fill.

    Raises
    ------
    ArgumentError
        Nothing may be read from `packed` then.
    """
    if packed.dtype != np.uint8 or packed.shape != (-(-n // 8),):
        raise ArgumentError(
            f"packed: expected {-(-n // 8)} bytes for {n} entries, "
            f"got {packed.dtype} of shape {packed.shape}"
        )


def check_values(values: Values) -> None:
    """Refuse values that are not flat, or of an element size that no backend has."""
    if values.ndim != 1 or values.dtype.itemsize not in (1, 2, 4, 8) or values.dtype.hasobject:
        raise ArgumentError(
            "values: expected one axis and elements of 1, 2, 4 or 8 bytes, "
            f"got {values.dtype} of shape {values.shape}"
        )


def check_count(values: Values, kept: int) -> None:
    """Refuse values that are more or fewer than the bits that are set."""
    if values.size != kept:
        raise ArgumentError(f"values: expected {kept}, one per bit that is set, got {values.size}")


def pack(mask: Bools) -> Packed:
    """Bits of a flat mask: entry i is bit i % 8 (from the lowest) of byte i // 8."""
    return np.packbits(mask, bitorder="little")


def nonzero(values: Values, wanted: int) -> Packed:
    """Bits of a flat array of unsigned integers: set where one of the wanted bits is."""
    check_values(values)
    return pack((values & values.dtype.type(wanted)) != 0)


def unpack(packed: Packed, n: int) -> Bools:
    """Flat mask of `n` entries; bits after the last are ignored."""
    check_bits(packed, n)
    return np.unpackbits(packed, count=n, bitorder="little").view(np.bool_)


def count(packed: Packed, n: int) -> int:
    """Number of bits that are set among the first `n`."""
    return int(np.count_nonzero(unpack(packed, n)))


def compact(values: Values, packed: Packed) -> Values:
    """Values whose bit is set, in order."""
    check_values(values)
    kept: Values = values[unpack(packed, values.size)]
    return kept


def expand(values: Values, packed: Packed, n: int) -> Values:
    """Put values at the bits that are set, in order; the other of the `n` entries are 0."""
    check_values(values)
    mask = unpack(packed, n)
    check_count(values, int(np.count_nonzero(mask)))
    whole = np.zeros(n, values.dtype)
    whole[mask] = values
    return whole
