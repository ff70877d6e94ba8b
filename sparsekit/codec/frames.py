"""Bytes through zstd's Huffman coder, in frames that are checked before they are decompressed."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from sparsekit.errors import FormatError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Read: TypeAlias = Callable[[int, bool], Bytes]
"""Gives the next bytes; says whether they must be the last."""
Counts: TypeAlias = npt.NDArray[np.int64]

_LEVEL = 1
# Planes of noise hold no sequences: a table this small is passed in half the time, and what it
# finds by chance does not spoil the Huffman code.
_FEW_HASHES = 6
# Huffman coding needs no window, and a reader then needs little memory.
_WINDOW_LOG = 17
# Binary logarithms of 1 + i / 256, with 16 bits behind the point.
_LOG2 = np.round(np.log2(1 + np.arange(256) / 256) * 2**16).astype(np.int64)
# What a frame takes beside its codes, about.
_TABLE_BITS = 400
# Blocks of fewer bytes on average are refused: each takes time, and may hold nothing at all.
_FREE_BLOCKS = 16
_LEAST_BLOCK = 1024
# Type of a block that stores one byte for many.
_REPEATED = 1


def compress(plain: Bytes, *, repeats: bool = False) -> bytes:
    """One frame, or the bytes themselves where that is not shorter.

    `repeats` says that sequences of bytes are worth looking for.
    """
    options = {} if repeats else {"hash_log": _FEW_HASHES}
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, source_size=plain.size, window_log=_WINDOW_LOG, **options
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compress(plain.data)
    return frame if len(frame) < plain.size else plain.tobytes()


def byte_counts(plane: Bytes) -> Counts:
    """How often each of the 256 bytes occurs."""
    return np.bincount(plane, minlength=256)


def expected_bits(counts: Counts) -> int:
    """Size of a plane by the counts of its bytes, in whole numbers: the same on every machine."""
    size = int(counts.sum())
    counts = counts[counts > 0]
    fraction, exponent = np.frexp(np.append(counts, size).astype(np.float64))
    logs = (exponent.astype(np.int64) << 16) + _LOG2[((2 * fraction - 1) * 256).astype(np.intp)]
    coded = int((counts * (logs[-1] - logs[:-1])).sum()) >> 16
    return min(coded + _TABLE_BITS, 8 * size)


def reader(section: memoryview, size: int) -> Read:
    """Return a function that gives the next bytes of a frame, and whether they must be the last.

    Parameters
    ----------
    section : memoryview
        One frame and nothing else.
    size : int
        Bytes that it must hold.
    """
    stream = _stream(section, size)

    def read(count: int, last: bool) -> Bytes:
        try:
            data = stream.read(count)
            if len(data) == count and not (last and stream.read(1)):
                return np.frombuffer(data, np.uint8)
        except zstandard.ZstdError as error:
            raise FormatError(f"a frame is damaged: {error}") from None
        raise FormatError(f"a frame does not hold {size} bytes")

    return read


def plane_reader(section: memoryview, k: int, scratch: Bytes | None = None) -> Read:
    """Return a function as `reader` does, for `k` bytes that `compress` has written.

    A frame is decompressed at once into `scratch`, `k` bytes that nobody writes to before they are
    read: zstd then needs a tenth of a MiB, and not six. Without it, piece by piece.
    """
    if len(section) == k:
        plain = np.frombuffer(section, np.uint8)
    elif scratch is None:
        return reader(section, k)
    else:
        plain = scratch
        _fill(section, plain)
    at = 0

    def take(count: int, last: bool) -> Bytes:
        nonlocal at
        del last
        at += count
        return plain[at - count : at]

    return take


def _fill(section: memoryview, plain: Bytes) -> None:
    stream = _stream(section, plain.size)
    try:
        if stream.readinto(plain.data) == plain.size and not stream.read(1):
            return
    except zstandard.ZstdError as error:
        raise FormatError(f"a frame is damaged: {error}") from None
    raise FormatError(f"a frame does not hold {plain.size} bytes")


def _stream(section: memoryview, size: int) -> zstandard.ZstdDecompressionReader:
    try:
        frame = zstandard.get_frame_parameters(section)
        at = zstandard.frame_header_size(section)
    except zstandard.ZstdError as error:
        raise FormatError(f"it is no zstd frame: {error}") from None
    if frame.content_size != size or frame.has_checksum or frame.dict_id:
        raise FormatError(f"a frame is not one of {size} bytes without a checksum")
    if frame.window_size > 1 << _WINDOW_LOG:
        raise FormatError("a frame asks for too much memory")
    # zstandard says neither where a frame ends nor that something follows it.
    last, blocks = False, _FREE_BLOCKS + size // _LEAST_BLOCK
    while not last:
        blocks -= 1
        if blocks < 0:
            raise FormatError(f"a frame has too many blocks for {size} bytes")
        if at + 3 > len(section):
            raise FormatError("a frame has no end")
        block = int.from_bytes(section[at : at + 3], "little")
        last, repeated = bool(block & 1), block >> 1 & 3 == _REPEATED
        at += 3 + (1 if repeated else block >> 3)
    if at != len(section):
        raise FormatError("a frame does not end where its section does")
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG)
    return decompressor.stream_reader(section)
