"""The container: header, records and the sizes that every code needs, in plain integers.

`docs/wire-format.md` describes the bytes. Nothing here allocates by a number from a payload:
`parse` checks every one of them first, with Python integers, which cannot overflow.
"""

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from sparsekit.codec import layouts
from sparsekit.codec.record_checks import check_record
from sparsekit.codec.records import (
    DTYPES,
    DType,
    MaskCode,
    Record,
    ValueCode,
    quote,
)
from sparsekit.errors import (
    ArgumentTypeError,
    BudgetError,
    ChecksumError,
    FormatError,
    TruncatedError,
    VersionError,
)

MAGIC = b"\x89SPU\r\n\x1a\n"
MAJOR = 1
MINOR = 2
NO_BASE = bytes(16)

ALIGNMENT = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_RECORDS = 65_536

# Codes and flag bits below this are critical: a reader that does not know one must refuse.
# A record with an unknown code from here on holds something a reader can do without.
ANCILLARY = 128
CRITICAL_FLAGS = 0x00FF
SHORT_RECORDS = 0x0001
# Checksum of all sections, before the first short record.
_SECTIONS_BYTES = 8

_MASK_CODES = frozenset(map(int, MaskCode))
_VALUE_CODES = frozenset(map(int, ValueCode))

# Of a record and of what is made of it, measured; and what no budget counts: some 450 records.
_RECORD_MEMORY = 1024
_FREE_MEMORY = 640 * 2**10

PREFIX = struct.Struct("<8sBBHIIIQQ16sQ")
RECORD = layouts.LONG
CHECKSUM_AT = PREFIX.size - 8


Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Placed:
    """A record with the place of its two sections in the payload, in bytes."""

    record: Record
    mask_at: int
    value_at: int


@dataclass(frozen=True, slots=True)
class Header:
    """The checked header of a payload."""

    major: int
    minor: int
    header_len: int
    file_len: int
    round: int
    base_digest: bytes
    records: tuple[Placed, ...]


def padded(length: int) -> int:
    """Length of a section with its zero padding."""
    return -(-length // ALIGNMENT) * ALIGNMENT


def as_bytes_view(payload: Buffer | mmap.mmap) -> memoryview:
    """View a payload as one run of bytes."""
    if not isinstance(payload, bytes | bytearray | memoryview | mmap.mmap):
        raise ArgumentTypeError(
            f"payload: expected bytes, bytearray or memoryview, got {type(payload).__name__}"
        )
    view = memoryview(payload)
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())


def section_checksum(*sections: Buffer) -> int:
    """xxh3_64 over the mask section followed by the value section, in pieces without padding."""
    hasher = xxhash.xxh3_64()
    for section in sections:
        hasher.update(section)
    return hasher.intdigest()


def pack_header(
    records: Sequence[Record], *, round: int, base_digest: bytes, sections: int | None = None
) -> bytes:
    """Header bytes, checksum included, for records whose sections follow in this order.

    `sections` is the checksum of all sections; with it the records are short.
    """
    short = sections is not None
    body = b"" if sections is None else sections.to_bytes(8, "little")
    pack = layouts.pack_short if short else layouts.pack_long
    before = b""
    parts = [body]
    for record in records:
        parts.append(pack(record, before))
        before = record.name.encode()
    body = b"".join(parts)
    body += bytes(padded(len(body)) - len(body))
    header_len = PREFIX.size + len(body)
    size = sum(padded(r.mask_len) + padded(r.value_len) for r in records)
    # The lowest version that has all the codes, for the sake of older readers.
    minor = max((r.minor for r in records), default=0)
    prefix = PREFIX.pack(
        MAGIC, MAJOR, MINOR if short else minor, SHORT_RECORDS if short else 0, header_len,
        len(records), 0, header_len + size, round, base_digest, 0,
    )  # fmt: skip
    checksum = xxhash.xxh3_64_intdigest(prefix[:CHECKSUM_AT] + body)
    return prefix[:CHECKSUM_AT] + checksum.to_bytes(8, "little") + body


def described_bytes(n_records: int, header_len: int) -> int:
    """Memory that a header of so many records and bytes takes at most, apart from a free share."""
    # Objects of a record and its tensor; names as text of 4 bytes a character.
    return max(0, _RECORD_MEMORY * n_records + 4 * header_len - _FREE_MEMORY)


def parse(payload: memoryview, *, room: int | None = None) -> Header:
    """Check the whole header, the tiling, the padding and the checksums of a payload.

    Parameters
    ----------
    payload : memoryview, bytes
        The payload from its first to its last byte.
    room : int, optional
        Most bytes that its records may take once they are objects, as `described_bytes` counts.

    Returns
    -------
    Header
        Its records have sections of exactly the lengths that their codes need; what stands
        inside the sections is not yet checked.

    Raises
    ------
    CodecError
        `TruncatedError`, `VersionError`, `ChecksumError`, `FormatError` or `BudgetError`.
    """
    (_, major, minor, flags, header_len, n_records, _, file_len, round_, base_digest, _) = (
        _checked_prefix(payload)
    )
    if room is not None and described_bytes(n_records, header_len) > room:
        raise BudgetError(
            f"payload: its {n_records} records in a header of {header_len} bytes take more memory "
            "than is allowed; pass a larger max_bytes if the sender is to be trusted with it"
        )
    body = payload[PREFIX.size : header_len]
    sections = None
    if flags & SHORT_RECORDS:
        sections = int.from_bytes(body[:_SECTIONS_BYTES], "little")
        records = _parse_records(body[_SECTIONS_BYTES:], n_records, layouts.read_short)
    else:
        records = _parse_records(body, n_records, layouts.read_long)
    placed = _place(payload, records, header_len, file_len, sections)
    uses_base = any(
        r.dtype is not None and (r.mask_needs_base or r.values_need_base) for r in records
    )
    if uses_base != (base_digest != NO_BASE):
        raise FormatError(
            "payload: the base digest must be non-zero if and only if a record uses the base"
        )
    return Header(major, minor, header_len, file_len, round_, base_digest, placed)


def _checked_prefix(payload: memoryview) -> tuple[bytes, int, int, int, int, int, int, int, int,
                                                   bytes, int]:  # fmt: skip
    start = bytes(payload[: len(MAGIC)])
    if not MAGIC.startswith(start):
        raise FormatError("payload: the first 8 bytes are not the magic number of this format")
    if len(payload) < PREFIX.size:
        raise TruncatedError(f"payload: expected at least {PREFIX.size} bytes, got {len(payload)}")
    fields = PREFIX.unpack_from(payload)
    (_, major, _, flags, header_len, n_records, reserved, file_len, _, _, checksum) = fields
    if major != MAJOR:
        raise VersionError(
            f"payload: expected major version {MAJOR}, got {major}; "
            "decode it with a release of sparsekit that writes that version"
        )
    unknown = flags & CRITICAL_FLAGS & ~SHORT_RECORDS
    if unknown:
        raise VersionError(f"payload: unknown critical flags {unknown:#04x}")
    if len(payload) < file_len:
        raise TruncatedError(f"payload: expected {file_len} bytes, got {len(payload)}")
    if len(payload) > file_len:
        raise FormatError(
            f"payload: {len(payload) - file_len} bytes follow the {file_len} that belong to it"
        )
    if header_len % ALIGNMENT or not PREFIX.size <= header_len <= min(file_len, MAX_HEADER_BYTES):
        raise FormatError(f"payload: a header of {header_len} bytes is not possible")
    if reserved:
        raise FormatError("payload: the reserved header field is not zero")
    room, least = header_len - PREFIX.size, RECORD.size
    if flags & SHORT_RECORDS:
        room, least = room - _SECTIONS_BYTES, layouts.LEAST_SHORT
    if room < 0 or n_records > min(MAX_RECORDS, room // least):
        raise FormatError(f"payload: {n_records} records do not fit the header")
    hasher = xxhash.xxh3_64(payload[:CHECKSUM_AT])
    hasher.update(payload[PREFIX.size : header_len])
    if hasher.intdigest() != checksum:
        raise ChecksumError("payload: the header does not match its checksum")
    return fields


def _parse_records(body: memoryview, n_records: int, read: layouts.Reader) -> list[Record]:
    records = []
    names = set()
    at = 0
    raw = b""
    for index in range(n_records):
        fields, at = read(body, at, index, raw)
        raw = fields.name
        name = _parse_name(raw, index)
        if name in names:
            raise FormatError(f"record {index}: the name {quote(name)} appears twice")
        names.add(name)
        known = _known_dtype(name, fields.dtype, fields.mask_code, fields.value_code)
        record = Record(
            name, known, fields.shape, fields.mask_code, fields.value_code, fields.k,
            fields.mask_len, fields.value_len, fields.checksum, fields.parameters,
        )  # fmt: skip
        if known is not None:
            check_record(record, known)
        records.append(record)
    rest = bytes(body[at:])
    if len(rest) >= ALIGNMENT or any(rest):
        raise FormatError("payload: the header does not end with its last record")
    return records


def _parse_name(raw: bytes, index: int) -> str:
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise FormatError(f"record {index}: its name is not UTF-8") from None
    if "\0" in name:
        raise FormatError(f"record {index}: its name holds a zero byte")
    return name


def _known_dtype(name: str, dtype: int, mask: int, value: int) -> DType | None:
    """Element type of a record to decode, None for one to skip; raise for an unknown code."""
    skip = False
    for kind, code, known in (
        ("dtype", dtype, dtype < len(DTYPES)),
        ("mask encoding", mask, mask in _MASK_CODES),
        ("value encoding", value, value in _VALUE_CODES),
    ):
        if not known and code < ANCILLARY:
            raise VersionError(
                f"tensor {quote(name)}: unknown {kind} {code}; a newer release can decode it"
            )
        skip = skip or not known
    return None if skip else DTYPES[dtype]


def _place(
    payload: memoryview,
    records: Sequence[Record],
    header_len: int,
    file_len: int,
    sections: int | None,
) -> tuple[Placed, ...]:
    """Give each section its place, then check padding and checksums."""
    needed = header_len + sum(padded(r.mask_len) + padded(r.value_len) for r in records)
    if needed != file_len:
        raise FormatError(
            f"payload: header and sections take {needed} bytes, the file has {file_len}"
        )
    placed = []
    at = header_len
    whole = xxhash.xxh3_64()
    for record in records:
        mask_at, value_at = at, at + padded(record.mask_len)
        at = value_at + padded(record.value_len)
        mask_end, value_end = mask_at + record.mask_len, value_at + record.value_len
        if any(payload[mask_end:value_at]) or any(payload[value_end:at]):
            raise FormatError(f"tensor {quote(record.name)}: the padding is not zero")
        both = payload[mask_at:mask_end], payload[value_at:value_end]
        if sections is not None:
            for section in both:
                whole.update(section)
        elif section_checksum(*both) != record.checksum:
            raise ChecksumError(
                f"tensor {quote(record.name)}: its data does not match its checksum"
            )
        placed.append(Placed(record, mask_at, value_at))
    if sections is not None and whole.intdigest() != sections:
        raise ChecksumError("payload: its sections do not match their checksum")
    return tuple(placed)
