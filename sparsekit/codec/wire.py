"""The container: header, records and the sizes that every code needs, in plain integers.

`docs/wire-format.md` describes the bytes. Nothing here allocates by a number from a payload:
`parse` checks every one of them first, with Python integers, which cannot overflow.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from sparsekit.codec.based_codes import (
    DELTA_PARAMETERS,
    LEVEL_PARAMETERS,
    PREDICTED_PARAMETERS,
    SUBSET_PARAMETERS,
    LevelCode,
    PredictedCode,
    SubsetCode,
    parse_delta,
    parse_levels,
    parse_predicted,
    parse_subset,
)
from sparsekit.codec.codes import (
    HALF_BYTES,
    SPLIT_PARAMETERS,
    HalfCode,
    SplitCode,
    parse_half,
    parse_rice,
    parse_split,
)
from sparsekit.codec.records import (
    DTYPES,
    MINOR_0_MASKS,
    DType,
    MaskCode,
    Record,
    ValueCode,
    mask_bytes,
    parameter_bytes,
    value_bytes,
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
MINOR = 1
NO_BASE = bytes(16)

ALIGNMENT = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_RECORDS = 65_536
MAX_DIMS = 16
MAX_EXTENT = 2**32 - 1
MAX_NAME_BYTES = 2**16 - 1
MAX_TENSOR_BYTES = 2**63 - 1

# Codes and flag bits below this are critical: a reader that does not know one must refuse.
# A record with an unknown code from here on holds something a reader can do without.
ANCILLARY = 128
CRITICAL_FLAGS = 0x00FF

_MASK_CODES = frozenset(map(int, MaskCode))
_VALUE_CODES = frozenset(map(int, ValueCode))

# Of a record and of what is made of it, measured; and what no budget counts: some 450 records.
_RECORD_MEMORY = 1024
_FREE_MEMORY = 640 * 2**10

PREFIX = struct.Struct("<8sBBHIIIQQ16sQ")
RECORD = struct.Struct("<HHBBBBQQQQ")
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


def quote(name: str) -> str:
    """A name fit for an error message: escaped, and cut where a hostile one is endless."""
    return repr(name) if len(name) <= 80 else repr(name[:80]) + "..."


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


def pack_header(records: Sequence[Record], *, round: int, base_digest: bytes) -> bytes:
    """Header bytes, checksum included, for records whose sections follow in this order."""
    body = b"".join(_pack_record(record) for record in records)
    body += bytes(padded(len(body)) - len(body))
    header_len = PREFIX.size + len(body)
    sections = sum(padded(r.mask_len) + padded(r.value_len) for r in records)
    # The lowest version that has all the codes, for the sake of older readers.
    newer = any(r.mask_code not in MINOR_0_MASKS or r.value_code != ValueCode.RAW for r in records)
    prefix = PREFIX.pack(
        MAGIC, MAJOR, MINOR if newer else 0, 0, header_len, len(records), 0,
        header_len + sections, round, base_digest, 0,
    )  # fmt: skip
    checksum = xxhash.xxh3_64_intdigest(prefix[:CHECKSUM_AT] + body)
    return prefix[:CHECKSUM_AT] + checksum.to_bytes(8, "little") + body


def _pack_record(record: Record) -> bytes:
    assert record.dtype is not None
    name = record.name.encode()
    fixed = RECORD.pack(
        len(name), len(record.parameters), record.dtype.code, len(record.shape),
        record.mask_code, record.value_code, record.k, record.mask_len, record.value_len,
        record.checksum,
    )  # fmt: skip
    return fixed + struct.pack(f"<{len(record.shape)}I", *record.shape) + record.parameters + name


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
    (_, major, minor, _, header_len, n_records, _, file_len, round_, base_digest, _) = (
        _checked_prefix(payload)
    )
    if room is not None and described_bytes(n_records, header_len) > room:
        raise BudgetError(
            f"payload: its {n_records} records in a header of {header_len} bytes take more memory "
            "than is allowed; pass a larger max_bytes if the sender is to be trusted with it"
        )
    records = _parse_records(payload[PREFIX.size : header_len], n_records)
    placed = _place(payload, records, header_len, file_len)
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
    if flags & CRITICAL_FLAGS:
        raise VersionError(f"payload: unknown critical flags {flags & CRITICAL_FLAGS:#04x}")
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
    if n_records > min(MAX_RECORDS, (header_len - PREFIX.size) // RECORD.size):
        raise FormatError(f"payload: {n_records} records do not fit the header")
    hasher = xxhash.xxh3_64(payload[:CHECKSUM_AT])
    hasher.update(payload[PREFIX.size : header_len])
    if hasher.intdigest() != checksum:
        raise ChecksumError("payload: the header does not match its checksum")
    return fields


def _parse_records(body: memoryview, n_records: int) -> list[Record]:
    records = []
    names = set()
    at = 0
    for index in range(n_records):
        if at + RECORD.size > len(body):
            raise FormatError(f"record {index}: it ends beyond the header")
        fields = RECORD.unpack_from(body, at)
        name_len, param_len, dtype, ndim, mask, value, k, mask_len, value_len, checksum = fields
        at += RECORD.size
        if ndim > MAX_DIMS:
            raise FormatError(f"record {index}: {ndim} dimensions, at most {MAX_DIMS} are allowed")
        end = at + 4 * ndim + param_len + name_len
        if end > len(body):
            raise FormatError(f"record {index}: its shape, parameters and name exceed the header")
        shape = struct.unpack_from(f"<{ndim}I", body, at)
        parameters = bytes(body[at + 4 * ndim : end - name_len])
        name = _parse_name(bytes(body[end - name_len : end]), index)
        at = end
        if name in names:
            raise FormatError(f"record {index}: the name {quote(name)} appears twice")
        names.add(name)
        known = _known_dtype(name, dtype, mask, value)
        record = Record(
            name, known, shape, mask, value, k, mask_len, value_len, checksum, parameters
        )
        if known is not None:
            _check_record(record, known)
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


def _check_record(record: Record, dtype: DType) -> None:
    name = quote(record.name)
    # Zero extents count as 1: the product of the others must still be a possible size.
    if math.prod(extent or 1 for extent in record.shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise FormatError(f"tensor {name}: its shape has too many elements")
    n, k = record.n, record.k
    code = MaskCode(record.mask_code)
    if k > n or (code is MaskCode.DENSE and k != n) or (code is MaskCode.ALL_ZERO and k):
        raise FormatError(f"tensor {name}: {k} kept of {n} elements contradicts its mask encoding")
    needed = parameter_bytes(code, record.value_code)
    if len(record.parameters) != needed:
        raise FormatError(
            f"tensor {name}: its codes take {needed} bytes of parameters, "
            f"got {len(record.parameters)}"
        )
    for part, found, (least, most) in (
        ("mask", record.mask_len, _mask_range(record, code)),
        ("value", record.value_len, _value_range(record, dtype)),
    ):
        if not least <= found <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise FormatError(
                f"tensor {name}: expected a {part} section of {expected} bytes, got {found}"
            )


def _mask_range(record: Record, code: MaskCode) -> tuple[int, int]:
    """Fewest and most bytes of a record's mask section."""
    if code is MaskCode.RICE:
        rice = parse_rice(record.parameters[0])
        if rice is None or not rice.coded(record.n, record.k):
            raise FormatError(f"tensor {quote(record.name)}: its Rice parameter is not possible")
        return rice.length_range(record.n, record.k)
    if code in (MaskCode.SUBSET, MaskCode.PREDICTED):
        return _related_range(record, code)
    needed = mask_bytes(code, record.shape, record.k)
    if code is MaskCode.BITMAP_ZSTD:
        return 1, max(0, -(-record.n // 8) - 1)
    if needed is None:
        raise FormatError(f"tensor {quote(record.name)}: its mask encoding cannot hold its shape")
    return needed, needed


def _related_range(record: Record, code: MaskCode) -> tuple[int, int]:
    related: SubsetCode | PredictedCode | None
    if code is MaskCode.SUBSET:
        related = parse_subset(record.parameters[: SUBSET_PARAMETERS.size])
    else:
        related = parse_predicted(record.parameters[: PREDICTED_PARAMETERS.size])
    found = None if related is None else related.length_range(record.n, record.k)
    if found is None:
        raise FormatError(
            f"tensor {quote(record.name)}: the parameters of its mask are not possible"
        )
    return found


def _value_range(record: Record, dtype: DType) -> tuple[int, int]:
    """Fewest and most bytes of a record's value section."""
    parameters, name = record.parameters, dtype.name
    code: SplitCode | HalfCode | LevelCode | None
    found: tuple[int, int] | None
    match ValueCode(record.value_code):
        case ValueCode.RAW:
            needed = value_bytes(dtype, record.k)
            return needed, needed
        case ValueCode.DELTA:
            delta = parse_delta(parameters[-DELTA_PARAMETERS.size :])
            found = None if delta is None else delta.length_range(name, record.n, record.k)
        case other:
            if other is ValueCode.SPLIT:
                code = parse_split(parameters[-SPLIT_PARAMETERS.size :])
            elif other is ValueCode.HALF:
                code = parse_half(parameters[-HALF_BYTES:])
            else:
                code = parse_levels(parameters[-LEVEL_PARAMETERS.size :])
            found = None if code is None else code.length_range(name, record.k)
    if found is None:
        raise FormatError(
            f"tensor {quote(record.name)}: the parameters of its values are not possible"
        )
    return found


def _place(
    payload: memoryview, records: Sequence[Record], header_len: int, file_len: int
) -> tuple[Placed, ...]:
    """Give each section its place, then check padding and checksums."""
    needed = header_len + sum(padded(r.mask_len) + padded(r.value_len) for r in records)
    if needed != file_len:
        raise FormatError(
            f"payload: header and sections take {needed} bytes, the file has {file_len}"
        )
    placed = []
    at = header_len
    for record in records:
        mask_at, value_at = at, at + padded(record.mask_len)
        at = value_at + padded(record.value_len)
        mask_end, value_end = mask_at + record.mask_len, value_at + record.value_len
        if any(payload[mask_end:value_at]) or any(payload[value_end:at]):
            raise FormatError(f"tensor {quote(record.name)}: the padding is not zero")
        found = section_checksum(payload[mask_at:mask_end], payload[value_at:value_end])
        if found != record.checksum:
            raise ChecksumError(
                f"tensor {quote(record.name)}: its data does not match its checksum"
            )
        placed.append(Placed(record, mask_at, value_at))
    return tuple(placed)
