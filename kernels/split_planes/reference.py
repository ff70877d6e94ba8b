"""Planes of float32 numbers, with NumPy: the oracle for every other backend.

The first plane has the exponent's distance to the smallest one and the mantissa's `top_bits`
highest bits, the second the sign and the bits of the mantissa's upper 7 that follow, the third the
16 lowest bits. `docs/wire-format.md` describes them.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Halves: TypeAlias = npt.NDArray[np.uint16]


def split(values: Words, smallest: int, top_bits: int) -> tuple[Bytes, Bytes, Halves]:
    """Planes of bit patterns; 8 bits have room for the exponents' distances and the top bits."""
    rest = 7 - top_bits
    exponent, mantissa = values >> 23 & 255, values >> 16 & 127
    first = (exponent - smallest) << top_bits | mantissa >> rest
    second = values >> 31 << rest | mantissa & (1 << rest) - 1
    return first.astype(np.uint8), second.astype(np.uint8), values.astype(np.uint16)


def join(first: Bytes, second: Bytes, low: Halves, smallest: int, top_bits: int) -> Words:
    """Bit patterns of planes.

    Raises
    ------
    ValueError
        If the planes hold what no number has.
    """
    rest = 7 - top_bits
    a, b = first.astype(np.uint32), second.astype(np.uint32)
    exponent, sign = (a >> top_bits) + np.uint32(smallest), b >> rest
    if (exponent > 255).any() or (sign > 1).any():
        raise ValueError("its planes hold what no number has")
    mantissa = (a & (1 << top_bits) - 1) << rest | b & (1 << rest) - 1
    found = sign << 31 | exponent << 23 | mantissa << 16 | low
    return found.astype(np.uint32, copy=False)
