"""Kept positions of masks, chunk by chunk, from what a section holds."""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.codec import frames
from sparsekit.codec.records import csr_grid, csr_width
from sparsekit.errors import FormatError

Bools: TypeAlias = npt.NDArray[np.bool_]
Positions: TypeAlias = npt.NDArray[np.intp]

# Masks are unpacked this many elements at a time: temporaries stay in the level-2 cache, and
# decoding needs less than 1 MiB beside its result.
CHUNK = 2**15


def positions_in(keep: Bools) -> Positions:
    """Positions of True in one chunk of a mask: `np.flatnonzero` without its slow range."""
    n = keep.size
    count = np.count_nonzero(keep)
    # Up to a density of 0.1 NumPy jumps from one True to the next, which is the slower way from
    # about 0.02 on. True elements after the end make it take the other, branch-free way.
    if not 0.02 * n < count <= 0.1 * n:
        return np.flatnonzero(keep)
    extended = np.ones(n + n // 8 + 1, np.bool_)
    extended[:n] = keep
    return np.flatnonzero(extended)[:count]


def flat_positions(keep: Bools) -> Positions:
    """Positions of True in a flat mask."""
    chunks = [
        positions_in(keep[start : start + CHUNK]) + start for start in range(0, keep.size, CHUNK)
    ]
    return np.concatenate(chunks) if chunks else np.empty(0, np.intp)


def taking(found: Iterator[Positions]) -> Callable[[int], Positions]:
    """Return a function that takes the ascending positions below its argument, each once."""
    waiting = np.empty(0, np.intp)

    def take(stop: int) -> Positions:
        nonlocal waiting
        while waiting.size == 0 or waiting[-1] < stop:
            more = next(found, None)
            if more is None:
                break
            waiting = np.concatenate([waiting, more])
        inside = int(np.searchsorted(waiting, stop))
        taken, waiting = waiting[:inside], waiting[inside:]
        return taken

    return take


def in_blocks(
    found: Iterator[tuple[int, Positions]], n: int, size: int
) -> Iterator[tuple[int, Positions]]:
    """Positions in the form of `bitmap_positions`, those of so many elements at a time."""
    take = taking(start + places for start, places in found)
    for start in range(0, n, size):
        yield start, take(min(start + size, n)) - start


def check_tail(section: memoryview, n_bits: int) -> None:
    """Refuse packed bits whose last byte holds more than they fill."""
    if n_bits % 8 and section[-1] >> (n_bits % 8):
        raise FormatError("the unused bits of the last byte are not zero")


def bitmap_positions(section: memoryview, n: int) -> Iterator[tuple[int, Positions]]:
    """Kept positions chunk by chunk: where the chunk starts, and positions counted from there."""
    check_tail(section, n)
    packed = np.frombuffer(section, np.uint8)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        bits = np.unpackbits(
            packed[start // 8 : -(-stop // 8)], count=stop - start, bitorder="little"
        )
        yield start, positions_in(bits.view(np.bool_))


def framed_positions(section: memoryview, n: int) -> Iterator[tuple[int, Positions]]:
    """Kept positions of a compressed bitmap, in the form of `bitmap_positions`."""
    read = frames.reader(section, -(-n // 8))
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        packed = read(-(-stop // 8) - start // 8, stop == n)
        if stop == n:
            check_tail(packed.data, n)
        bits = np.unpackbits(packed, count=stop - start, bitorder="little")
        yield start, positions_in(bits.view(np.bool_))


def csr_positions(
    section: memoryview, shape: tuple[int, ...], k: int
) -> Iterator[tuple[int, Positions]]:
    """Kept positions of a CSR section, checked; each chunk is counted from a row's start.

    The section holds one count per row and then `k` columns, all of the same width. Rows and
    entries are taken in chunks, because either may be the long side of a hostile payload.
    """
    rows, columns = csr_grid(shape)
    width = csr_width(columns)
    assert width is not None
    numbers = np.frombuffer(section, f"<u{width}")
    counts, places = numbers[:rows], numbers[rows:]
    seen = 0
    for first_row in range(0, rows, CHUNK // 8):
        ends = seen + np.cumsum(counts[first_row : first_row + CHUNK // 8], dtype=np.int64)
        stop_entry = int(ends[-1])
        if stop_entry > k:
            raise FormatError(f"the row counts exceed the {k} kept elements")
        last = -1
        for start in range(seen, stop_entry, CHUNK // 4):
            stop = min(start + CHUNK // 4, stop_entry)
            in_chunk = np.diff(ends.clip(start, stop), prepend=start)
            place = places[start:stop].astype(np.intp)
            flat = np.repeat(np.arange(ends.size) * columns, in_chunk) + place
            if place.max() >= columns or flat[0] <= last or (flat[1:] <= flat[:-1]).any():
                raise FormatError("the columns of a row are not increasing inside the row")
            last = int(flat[-1])
            yield first_row * columns, flat
        seen = stop_entry
    if seen != k:
        raise FormatError(f"the row counts give {seen} of the {k} kept elements")
