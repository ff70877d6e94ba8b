"""Tensors to encode, wherever their elements are."""

from dataclasses import dataclass
from typing import Protocol

from sparsekit.codec.elements import Bits, Elements
from sparsekit.codec.flags import Flags
from sparsekit.codec.records import DType


class Source(Protocol):
    """What the encoder asks of a tensor."""

    @property
    def dtype(self) -> DType:
        """Type of its elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        ...

    @property
    def n(self) -> int:
        """Number of its elements."""
        ...

    def nonzero(self) -> Flags:
        """Find its elements that are not zero."""
        ...

    def kept(self, keep: Flags) -> Bits:
        """Collect the kept elements in order."""
        ...

    def whole(self) -> Bits:
        """All elements, flat."""
        ...


@dataclass(frozen=True, slots=True)
class HostSource:
    """A tensor in the memory of this machine."""

    elements: Elements

    @property
    def dtype(self) -> DType:
        """Type of its elements."""
        return self.elements.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""
        return self.elements.shape

    @property
    def n(self) -> int:
        """Number of its elements."""
        return self.elements.bits.size

    def nonzero(self) -> Flags:
        """Find its elements that are not zero."""
        return Flags.of_nonzero(self.elements.bits, self.elements.dtype)

    def kept(self, keep: Flags) -> Bits:
        """Collect the kept elements in order."""
        return keep.compact(self.elements.bits)

    def whole(self) -> Bits:
        """All elements, flat."""
        return self.elements.bits
