"""Tensors without their framework, as bit patterns.

Elements travel as unsigned integers of their own width, so that no floating-point unit ever
touches them: NaN payloads survive, and flush-to-zero modes cannot change a mask.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.codec.positions import CHUNK, Bools
from sparsekit.codec.records import DType

Bits: TypeAlias = npt.NDArray[np.unsignedinteger]


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
    found = bits
    for start in range(0, bits.size, CHUNK):
        other = bits[start : start + CHUNK] != bits.dtype.type(dtype.sign_bit)
        if not other.all():
            if found is bits:
                found = bits.copy()
            found[start : start + CHUNK] *= other
    return found


def magnitudes(bits: Bits, dtype: DType) -> Bits:
    """Bit patterns without the sign of floats, which order their magnitudes."""
    return bits & bits.dtype.type(dtype.sign_bit - 1) if dtype.sign_bit else bits
