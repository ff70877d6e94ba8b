"""How records stand in a header: at their full length, or short, with numbers of few bytes."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sparsekit.codec import varints
from sparsekit.codec.records import Record
from sparsekit.errors import FormatError

LONG = struct.Struct("<HHBBBBQQQQ")
MAX_DIMS = 16
MAX_EXTENT = 2**32 - 1
MAX_NAME_BYTES = 2**16 - 1
LEAST_SHORT = 10
"""Bytes of the shortest short record."""
_MOST_SHARED = 255


@dataclass(frozen=True, slots=True)
class Fields:
    """What a record holds, not yet checked but for its place in the header."""

    name: bytes
    dtype: int
    shape: tuple[int, ...]
    mask_code: int
    value_code: int
    k: int
    mask_len: int
    value_len: int
    checksum: int
    """0 in a short record: all sections together have one."""
    parameters: bytes


Reader: TypeAlias = Callable[[memoryview, int, int, bytes], tuple[Fields, int]]
"""Reads the record at a place of the header, with its number and the name of the one before."""


def pack_long(record: Record, before: bytes) -> bytes:
    """Bytes of a record; the name of the one before does not matter."""
    del before
    assert record.dtype is not None
    name = record.name.encode()
    fixed = LONG.pack(
        len(name), len(record.parameters), record.dtype.code, len(record.shape),
        record.mask_code, record.value_code, record.k, record.mask_len, record.value_len,
        record.checksum,
    )  # fmt: skip
    return fixed + struct.pack(f"<{len(record.shape)}I", *record.shape) + record.parameters + name


def read_long(body: memoryview, at: int, index: int, before: bytes) -> tuple[Fields, int]:
    """Read a record, and say where the next one starts."""
    del before
    if at + LONG.size > len(body):
        raise _beyond(index)
    name_len, param_len, dtype, ndim, mask, value, k, mask_len, value_len, checksum = (
        LONG.unpack_from(body, at)
    )
    _check_dims(ndim, index)
    at += LONG.size
    end = at + 4 * ndim + param_len + name_len
    if end > len(body):
        raise FormatError(f"record {index}: its shape, parameters and name exceed the header")
    shape = struct.unpack_from(f"<{ndim}I", body, at)
    parameters = bytes(body[at + 4 * ndim : end - name_len])
    name = bytes(body[end - name_len : end])
    return (
        Fields(name, dtype, shape, mask, value, k, mask_len, value_len, checksum, parameters), end,
    )  # fmt: skip


def pack_short(record: Record, before: bytes) -> bytes:
    """Bytes of a record whose name may start like that of the one before."""
    assert record.dtype is not None
    name = record.name.encode()
    shared = 0
    while shared < min(len(name), len(before), _MOST_SHARED) and name[shared] == before[shared]:
        shared += 1
    numbers = (
        *record.shape, record.k, record.mask_len, record.value_len, len(record.parameters),
        len(name) - shared,
    )  # fmt: skip
    fixed = bytes(
        [shared, record.dtype.code, len(record.shape), record.mask_code, record.value_code]
    )
    return fixed + b"".join(map(varints.pack, numbers)) + record.parameters + name[shared:]


def read_short(body: memoryview, at: int, index: int, before: bytes) -> tuple[Fields, int]:
    """Read a short record, and say where the next one starts."""
    if at + LEAST_SHORT > len(body):
        raise _beyond(index)
    shared, dtype, ndim, mask, value = body[at : at + 5]
    _check_dims(ndim, index)
    if shared > len(before):
        raise FormatError(f"record {index}: its name shares more bytes than the one before has")
    at += 5
    numbers = []
    for _ in range(ndim + 5):
        number, at = varints.read(body, at, f"record {index}")
        numbers.append(number)
    *shape, k, mask_len, value_len, param_len, suffix_len = numbers
    if any(extent > MAX_EXTENT for extent in shape) or shared + suffix_len > MAX_NAME_BYTES:
        raise FormatError(f"record {index}: an extent or its name is too long")
    end = at + param_len + suffix_len
    if end > len(body):
        raise FormatError(f"record {index}: its parameters and name exceed the header")
    parameters = bytes(body[at : at + param_len])
    name = before[:shared] + bytes(body[at + param_len : end])
    fields = Fields(
        name, dtype, tuple(shape), mask, value, k, mask_len, value_len, 0, parameters
    )  # fmt: skip
    return fields, end


def _check_dims(ndim: int, index: int) -> None:
    if ndim > MAX_DIMS:
        raise FormatError(f"record {index}: {ndim} dimensions, at most {MAX_DIMS} are allowed")


def _beyond(index: int) -> FormatError:
    return FormatError(f"record {index}: it ends beyond the header")
