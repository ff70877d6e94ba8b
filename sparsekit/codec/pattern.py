"""The pattern of a base tensor: its non-zero elements."""

from collections.abc import Iterator

from sparsekit.codec.elements import Elements, nonzero
from sparsekit.codec.positions import CHUNK, Positions, positions_in


def pattern_positions(base: Elements, *, chunk: int = CHUNK) -> Iterator[tuple[int, Positions]]:
    """Positions of the non-zero elements of a base tensor, in the form of `bitmap_positions`."""
    for start in range(0, base.bits.size, chunk):
        yield start, positions_in(nonzero(base.bits[start : start + chunk], base.dtype))
