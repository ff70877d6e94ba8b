"""float32 values as 16-bit floats: half the bytes, at the price of the last bits.

Rounding is to the nearest, ties to even, in integers where NumPy has no such type, so that it is
the same on every machine. Reading back is exact.
"""

from collections.abc import Callable

import numpy as np

from sparsekit.codec import split
from sparsekit.codec.codes import HalfCode
from sparsekit.codec.positions import CHUNK
from sparsekit.codec.records import DTYPE_BY_NAME
from sparsekit.codec.split import Bits
from sparsekit.codec.wire import Buffer

_EXPONENT = 0x7F800000


def round_all(bits: Bits, kind: str) -> Bits:
    """As `narrow`, with +0.0 for -0.0, to which a small number may round.

    Raises
    ------
    OverflowError
        If a finite float32 becomes infinite.
    """
    infinity = 0x7C00 if kind == "float16" else 0x7F80
    found = np.empty(bits.size, "<u2")
    for start in range(0, bits.size, CHUNK):
        wide = bits[start : start + CHUNK]
        some = narrow(wide, kind)
        if (((some & 0x7FFF) == infinity) & ((wide & _EXPONENT) != _EXPONENT)).any():
            raise OverflowError
        found[start : start + CHUNK] = some * (some != 0x8000)
    return found


def narrow(bits: Bits, kind: str) -> Bits:
    """Bit patterns of the nearest 16-bit floats; a NaN stays one."""
    values = np.ascontiguousarray(bits, "<u4")
    if kind == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return values.view("<f4").astype("<f2").view("<u2")
    is_nan = (values & 0x7FFFFFFF) > _EXPONENT
    # Just below half of the last bit, and that bit: a tie goes up if it is 1.
    rounded = values + np.uint32(0x7FFF) + (values >> np.uint32(16) & np.uint32(1))
    top = np.where(is_nan, values | np.uint32(0x400000), rounded) >> np.uint32(16)
    return top.astype("<u2")


def widen(bits: Bits, kind: str) -> Bits:
    """Bit patterns of float32 numbers equal to 16-bit floats."""
    if kind == "float16":
        return bits.astype("<u2", copy=False).view("<f2").astype("<f4").view("<u4")
    return bits.astype("<u4") << np.uint32(16)


def rounded(bits: Bits, kind: str) -> Bits:
    """As `narrow`, with +0.0 for -0.0, to which a small number may round."""
    narrowed = narrow(bits, kind)
    canonical: Bits = narrowed * (narrowed != 0x8000)
    return canonical


def pack(narrowed: Bits, kind: str, coded: bool) -> tuple[HalfCode, list[Buffer]]:
    """Section of rounded values, in pieces, and its parameters."""
    packed = split.pack(narrowed, DTYPE_BY_NAME[kind]) if coded else None
    if packed is None:
        return HalfCode(kind, None), [narrowed.astype("<u2", copy=False).view(np.uint8).data]
    return HalfCode(kind, packed[0]), packed[1]


def reader(
    section: memoryview, code: HalfCode, k: int, scratch: split.Bytes | None = None
) -> Callable[[int, int], Bits]:
    """Return a function that gives the values from one index to another, each once, in order.

    `scratch` is as for `frames.plane_reader`.
    """
    if code.split is not None:
        inner = split.reader(section, code.split, DTYPE_BY_NAME[code.kind], k, scratch)
        return lambda start, stop: widen(inner(start, stop), code.kind)
    values = np.frombuffer(section, "<u2")
    return lambda start, stop: widen(values[start:stop], code.kind)
