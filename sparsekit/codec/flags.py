"""Flat masks while they are encoded: as bools or as bits, whichever is at hand."""

import sys
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.codec.elements import Bits, nonzero
from sparsekit.codec.positions import CHUNK, Bools, positions_in
from sparsekit.codec.records import DType

Bytes = npt.NDArray[np.uint8]

# From so many elements on the compiled bitmap kernels are worth loading, and once loaded they are
# faster than NumPy.
KERNEL_ELEMENTS = 2**17
LOADED_ELEMENTS = 2**13
_KERNELS = "sparsekit.kernels.bitmap.cpu"


def kernels_pay_off(n: int) -> bool:
    """Whether masks of so many elements are for the compiled kernels.

    They run on torch's threads, so that a process that decodes without torch stays with NumPy.
    """
    least = LOADED_ELEMENTS if _KERNELS in sys.modules else KERNEL_ELEMENTS
    return n >= least and sys.modules.get("torch") is not None


def bitmap_kernel(function: str) -> Callable[..., Any]:
    """One of the functions on masks as bits."""
    from sparsekit.kernels import dispatch

    return dispatch.resolve(f"bitmap_{function}", "cpu").implementation.load()


def wanted_bits(dtype: DType) -> int:
    """Bits of an element of which one is set unless it is zero; -0.0 is zero."""
    return dtype.sign_bit - 1 if dtype.sign_bit else 2 ** (8 * dtype.itemsize) - 1


class Flags:
    """Which of `n` elements are kept."""

    def __init__(self, n: int, *, bools: Bools | None = None, packed: Bytes | None = None) -> None:
        self.n = n
        # A cached property's value, where it is known already.
        if bools is not None:
            self.__dict__["bools"] = bools
        if packed is not None:
            self.__dict__["packed"] = packed

    @classmethod
    def of_nonzero(cls, bits: Bits, dtype: DType) -> "Flags":
        """Those that are not zero; -0.0 is zero, NaN is not."""
        if not kernels_pay_off(bits.size):
            return cls(bits.size, bools=nonzero(bits, dtype))
        return cls(bits.size, packed=bitmap_kernel("nonzero")(bits, wanted_bits(dtype)))

    @cached_property
    def bools(self) -> Bools:
        """One byte for each element."""
        unpacked: Bools = bitmap_kernel("unpack")(self.packed, self.n)
        return unpacked

    @cached_property
    def packed(self) -> Bytes:
        """One bit for each element, the lowest first."""
        if kernels_pay_off(self.n):
            found: Bytes = bitmap_kernel("pack")(self.bools)
            return found
        return np.packbits(self.bools, bitorder="little")

    def between(self, start: int, stop: int) -> Bools:
        """One byte for each element from one index, a multiple of 8, to another."""
        if "bools" in self.__dict__:
            return self.bools[start:stop]
        packed = self.packed[start // 8 : -(-stop // 8)]
        return np.unpackbits(packed, count=stop - start, bitorder="little").view(np.bool_)

    @cached_property
    def count(self) -> int:
        """How many are kept."""
        if "bools" in self.__dict__:
            return int(np.count_nonzero(self.bools))
        found: int = bitmap_kernel("count")(self.packed, self.n)
        return found

    def outside(self, others: "Flags") -> int:
        """How many are kept here and not among the others."""
        if kernels_pay_off(self.n):
            found: int = bitmap_kernel("count")(self.packed & ~others.packed, self.n)
            return found
        return int(np.count_nonzero(self.bools & ~others.bools))

    def compact(self, bits: Bits) -> Bits:
        """Collect the kept elements in order."""
        if kernels_pay_off(bits.size):
            kept_bits: Bits = bitmap_kernel("compact")(bits, self.packed)
            return kept_bits
        keep = self.bools
        kept = np.empty(self.count, bits.dtype)
        done = 0
        for start in range(0, bits.size, CHUNK):
            positions = positions_in(keep[start : start + CHUNK])
            kept[done : done + positions.size] = bits[start : start + CHUNK].take(positions)
            done += positions.size
        return kept
