"""Payloads in files, one tensor at a time: memory for the largest tensor, not for all."""

import io
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from torch import Tensor

from sparsekit.codec.core import Level, MaskEncoding, Values
from sparsekit.codec.tensors import decode_each, encode_chunks
from sparsekit.types import Masks, State

_COPY_BYTES = 1 << 20


def encode_to(
    file: IO[bytes],
    state: State,
    *,
    masks: Masks | None = None,
    base: State | None = None,
    level: Level = "balanced",
    values: Values = "lossless",
    mask_encoding: MaskEncoding = "auto",
    round: int = 0,
) -> int:
    """Write a payload to a file, the same bytes as `encode` returns.

    Tensors are asked for one after the other, so that a mapping may load each when it is asked.
    Sections wait in a temporary file for the header, which comes before them.

    Parameters
    ----------
    file : binary file object
        Written from where it stands; it need not be seekable.
    state, masks, base, level, values, mask_encoding, round
        As for `encode`. A base is in memory as a whole.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    ArgumentTypeError, ArgumentError, ValueRangeError
        As `encode`; nothing has been written then.
    OSError
        If a file cannot be written.
    """
    with tempfile.TemporaryFile() as waiting:
        size = 0
        chunks = encode_chunks(
            state, masks=masks, base=base, level=level, values=values,
            mask_encoding=mask_encoding, round=round,
        )  # fmt: skip
        for name, sections in chunks:
            # The header comes at the end, under no name; a tensor without one has two sections.
            target = waiting if name or len(sections) > 1 else file
            for section in sections:
                size += target.write(section)
        waiting.seek(0)
        shutil.copyfileobj(waiting, file, _COPY_BYTES)
    return size


def decode_from(
    file: IO[bytes] | io.BufferedIOBase,
    *,
    base: State | None = None,
    template: State | None = None,
    max_bytes: int | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors out of a payload in a file, one after the other.

    Header, sizes and checksums of the whole payload have been checked before this returns; what
    stands inside a tensor's sections is checked when its turn comes.

    Parameters
    ----------
    file : binary file object
        It holds the payload and nothing else. Where it can be mapped to memory it is, and must not
        be changed meanwhile; otherwise it is first copied to a temporary file.
    base, template, max_bytes
        As for `decode`.

    Returns
    -------
    iterator of (str, Tensor)
        Names and tensors in the payload's order.

    Raises
    ------
    CodecError, ArgumentTypeError, ArgumentError
        As `decode`.
    """
    return decode_each(_mapped(file), base=base, template=template, max_bytes=max_bytes)


def _mapped(file: IO[bytes] | io.BufferedIOBase) -> mmap.mmap | bytes:
    # Of what is no plain file, a compressed one say, the operating system's file is another.
    if isinstance(getattr(file, "raw", file), io.FileIO):
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            # Without a length, as a pipe, or with none.
            pass
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(file, copy, _COPY_BYTES)
        copy.flush()
        if not copy.tell():
            return b""
        return mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
