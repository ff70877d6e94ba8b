"""Rice codes of masks on the CPU: the functions of `reference` by compiled passes."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError
from sparsekit.kernels import parallel
from sparsekit.kernels.bitmap.reference import Packed, check_bits
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.rice import passes

_MOST = 2**32


def pack(packed: Packed, n: int, count: int, r: int, complement: bool) -> Packed:
    """Section of a mask of which `count` >= 1 entries are coded."""
    _check(packed, n)
    words = np.zeros(-(-n // 64), np.uint64)
    words.view(np.uint8)[: packed.size] = packed
    gaps = np.empty(-(-count // 64) * 64, np.uint32)
    gaps[count:] = 0
    most = (1 + r) * count + ((n - count) >> r)
    section = np.zeros(-(-most // 8) + 16, np.uint8)
    state = np.zeros(4, np.uint64)
    _run(
        passes.pack, n=n, bits=_at(words), flip=int(complement), count=count, r=r,
        gaps=_at(gaps), section=_at(section), state=_at(state),
    )  # fmt: skip
    return section[: -(-int(state[passes.UNARY]) // 8)]


def unpacker(
    section: Packed, n: int, count: int, r: int, complement: bool
) -> Callable[[int, int], Packed]:
    """Return a function that gives the mask's bits from one entry to another, in order.

    It raises `ValueError` for a section that is none of `count` gaps inside of `n` entries; the
    first entry asked for must be a multiple of 64, and so must the last unless it is `n`.
    """
    if not n < _MOST:
        raise ArgumentError(f"n: expected fewer than 2**32 entries, got {n}")
    state = np.zeros(4, np.uint64)
    state[passes.UNARY] = r * count
    lows = np.zeros(64, np.uint32)
    source = np.ascontiguousarray(section)

    def read(start: int, stop: int) -> Packed:
        words = np.zeros(-(-(stop - start) // 64), np.uint64)
        _run(
            passes.unpack, n=n, bits=_at(words), count=count, r=r, gaps=_at(lows),
            section=_at(source), size=source.size, start=start, stop=stop, state=_at(state),
        )  # fmt: skip
        if state[passes.STATUS]:
            raise ValueError(
                f"its gaps are fewer than the {count} of its record"
                if state[passes.STATUS] == passes.ENDLESS
                else f"its gaps lead beyond the {n} elements"
            )
        if stop == n:
            _check_end(source, count, state)
        if complement:
            np.bitwise_not(words, out=words)
            if (stop - start) % 64:
                words[-1] &= np.uint64((1 << (stop - start) % 64) - 1)
        return words.view(np.uint8)[: -(-(stop - start) // 8)]

    return read


def _check_end(section: Packed, count: int, state: npt.NDArray[np.uint64]) -> None:
    end = int(state[passes.UNARY])
    if state[passes.INDEX] != count:
        raise ValueError(f"it has {state[passes.INDEX]} gaps, its record needs {count}")
    if -(-end // 8) != section.size or (end % 8 and section[-1] >> end % 8):
        raise ValueError("it does not end with the last gap")


def _check(packed: Packed, n: int) -> None:
    check_bits(packed, n)
    if not n < _MOST:
        raise ArgumentError(f"n: expected fewer than 2**32 entries, got {n}")


def _at(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _run(kernel: Kernel, **fields: int) -> None:
    parallel.run(kernel.address, kernel.job(**fields), 1)
