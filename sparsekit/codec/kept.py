"""Kept elements of a tensor beside what a base holds in their places, a chunk at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsekit.codec.based_codes import BLOCK
from sparsekit.codec.elements import Bits, Elements, canonical
from sparsekit.codec.flags import Flags
from sparsekit.codec.positions import positions_in

# Kept elements at a time, about: what is worked out of them stays in the cache.
_CHUNK = 2 * BLOCK
_MOST_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some kept elements, in order."""

    bits: Bits
    held: Bits | None
    """What the base holds in their places, if there is one."""
    counts: npt.NDArray[np.int64]
    """Kept ones among every `BLOCK` elements of the tensor."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Kept elements of a tensor.

    Attributes
    ----------
    bits : ndarray
        All of them, in order; those of floats without -0.0.
    keep : Flags
        Where they are.
    base : Elements or None
        A tensor of the same shape.
    """

    bits: Bits
    keep: Flags
    base: Elements | None

    def chunks(self) -> Iterator[Chunk]:
        """Give all, those of some blocks of the tensor at a time."""
        done = 0
        n, k = self.keep.n, self.bits.size
        whole = k == n
        size = BLOCK * min(max(_CHUNK * n // max(k, 1) // BLOCK, 2), _MOST_BLOCKS)
        for start in range(0, n, size):
            stop = min(start + size, n)
            held = None if self.base is None else self.base.bits[start:stop]
            blocks = range(0, stop - start, BLOCK)
            if whole:
                counts = [min(BLOCK, stop - start - first) for first in blocks]
            else:
                keep = self.keep.between(start, stop)
                counts = [int(np.count_nonzero(keep[first : first + BLOCK])) for first in blocks]
                held = None if held is None else held.take(positions_in(keep))
            if self.base is not None and held is not None:
                held = canonical(held, self.base.dtype)
            first, done = done, done + sum(counts)
            yield Chunk(self.bits[first:done], held, np.array(counts, np.int64))
