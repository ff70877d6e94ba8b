"""Encode and decode bit patterns: the whole codec without torch.

`sparsekit.codec.tensors` puts torch tensors in and out of it.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np
import xxhash

from sparsekit.codec import half, rice, sections
from sparsekit.codec import positions as kept
from sparsekit.codec.positions import CHUNK, Bools, Positions
from sparsekit.codec.records import (
    BOOL,
    MaskCode,
    Record,
    ValueCode,
    mask_bytes,
    parameter_bytes,
    value_bytes,
)
from sparsekit.codec.sections import Elements
from sparsekit.codec.wire import (
    MAX_EXTENT,
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    NO_BASE,
    Header,
    Placed,
    pack_header,
    padded,
    quote,
    section_checksum,
)
from sparsekit.errors import (
    ArgumentError,
    BaseMismatchError,
    BudgetError,
    FormatError,
    ValueRangeError,
)

Level: TypeAlias = Literal["fast", "balanced", "small"]
Values: TypeAlias = Literal["lossless", "bf16", "fp16"]
MaskEncoding: TypeAlias = Literal["auto", "dense", "bitmap", "rice", "csr", "same"]

_KINDS: dict[Values, str] = {"bf16": "bfloat16", "fp16": "float16"}
_FORCED = {
    "dense": MaskCode.DENSE,
    "bitmap": MaskCode.BITMAP,
    "rice": MaskCode.RICE,
    "csr": MaskCode.CSR,
    "same": MaskCode.SAME,
}

# Codes whose size follows from the counts, whatever stands beside what.
_COUNTED = (MaskCode.BITMAP, MaskCode.RICE, MaskCode.CSR)


def encode_elements(
    state: Mapping[str, Elements],
    masks: Mapping[str, Bools] | None,
    base: Mapping[str, Elements] | None,
    mask_encoding: MaskEncoding,
    level: Level,
    values: Values,
    round: int,
) -> bytes:
    """Build a payload; names and arguments were checked by the caller.

    Raises
    ------
    ArgumentError
        For a non-zero element outside its mask, a mask encoding that cannot hold a mask, and a
        state too large for the format.
    """
    if len(state) > MAX_RECORDS:
        raise ArgumentError(f"state: expected at most {MAX_RECORDS} tensors, got {len(state)}")
    records = []
    chunks: list[bytes | memoryview] = []
    for name, elements in state.items():
        given = None if masks is None else masks.get(name)
        forced = given is not None if masks is not None else len(elements.shape) >= 2
        encoding = mask_encoding if forced else "auto"
        record, mask, value_section = _encode_one(
            name, elements, given, None if base is None else base.get(name), encoding, level,
            _KINDS.get(values),
        )  # fmt: skip
        records.append(record)
        for section in (mask, value_section):
            chunks += [section, bytes(padded(len(section)) - len(section))]
    uses_base = any(record.mask_code == MaskCode.SAME for record in records)
    digest = digest_elements(base) if base is not None and uses_base else NO_BASE
    header = pack_header(records, round=round, base_digest=digest)
    if len(header) > MAX_HEADER_BYTES:
        raise ArgumentError(
            f"state: its names and shapes need a header of {len(header)} bytes, "
            f"at most {MAX_HEADER_BYTES} are allowed"
        )
    return b"".join([header, *chunks])


def _encode_one(
    name: str,
    elements: Elements,
    given: Bools | None,
    base: Elements | None,
    encoding: MaskEncoding,
    level: Level,
    kind: str | None,
) -> tuple[Record, memoryview, memoryview]:
    dtype, shape, bits = elements.dtype, elements.shape, elements.bits
    if any(extent > MAX_EXTENT for extent in shape):
        raise ArgumentError(f"state: {quote(name)} has an extent above {MAX_EXTENT}")
    keep = sections.nonzero(bits, dtype)
    if given is not None:
        outside = int(np.count_nonzero(keep & ~given))
        if outside:
            raise ArgumentError(
                f"masks: {quote(name)} has {outside} non-zero values outside its mask; "
                "multiply the tensor by the mask first, or pass the mask that it was pruned with"
            )
        keep = given
    k = int(np.count_nonzero(keep))
    code = _choose(name, elements, keep, k, given is not None, base, encoding, level)
    if code is MaskCode.DENSE:
        k = bits.size
    else:
        bits = sections.compact(bits, keep, k)
    mask_parameters, mask = sections.pack_mask(code, keep, k, shape)
    if encoding == "auto" and level != "fast" and code in _COUNTED:
        frame = sections.pack_frame(keep, k)
        if frame is not None and len(frame) < len(mask_parameters) + len(mask):
            code, mask_parameters, mask = MaskCode.BITMAP_ZSTD, b"", frame
    if kind is not None and dtype.name == "float32" and half.overflows(bits, kind):
        raise ValueRangeError(
            f"values: {quote(name)} holds finite numbers beyond the range of {kind}; "
            "use 'lossless', or 'bf16', whose range is that of float32"
        )
    value_code, value_parameters, values = sections.pack_values(
        sections.canonical(bits, dtype), dtype, level != "fast", kind
    )
    record = Record(
        name, dtype, shape, code, value_code, k, len(mask), len(values),
        section_checksum(mask, values), mask_parameters + value_parameters,
    )  # fmt: skip
    return record, mask, values


def _choose(
    name: str,
    elements: Elements,
    keep: Bools,
    k: int,
    given: bool,
    base: Elements | None,
    encoding: MaskEncoding,
    level: Level,
) -> MaskCode:
    """Pick the mask code with the fewest bytes, known in closed form from the counts."""
    n = elements.bits.size
    if k == n:
        return MaskCode.DENSE
    if encoding == "dense":
        if given:
            raise ArgumentError(
                f"mask_encoding: 'dense' would lose the mask of {quote(name)}, "
                f"which keeps {k} of {n}; use 'auto'"
            )
        return MaskCode.DENSE
    if k == 0:
        return MaskCode.ALL_ZERO
    totals = {}
    codes = [MaskCode.BITMAP, MaskCode.CSR]
    if level != "fast" or encoding == "rice":
        codes.append(MaskCode.RICE)
    for code in codes:
        size = mask_bytes(code, elements.shape, k)
        if size is not None:
            size += parameter_bytes(code, ValueCode.RAW)
            totals[code] = size + value_bytes(elements.dtype, k)
    if not given:
        totals[MaskCode.DENSE] = value_bytes(elements.dtype, n)
    if (
        base is not None
        and base.shape == elements.shape
        and np.array_equal(sections.nonzero(base.bits, base.dtype), keep)
    ):
        totals[MaskCode.SAME] = value_bytes(elements.dtype, k)
    if encoding == "auto":
        return min(totals, key=lambda code: (totals[code], code))
    forced = _FORCED[encoding]
    if forced not in totals:
        why = (
            "its mask is not the non-zero pattern of the base tensor of that name"
            if forced is MaskCode.SAME
            else "it has 2**32 columns or more"
        )
        raise ArgumentError(
            f"mask_encoding: {encoding!r} cannot hold {quote(name)}, {why}; use 'auto'"
        )
    return forced


def digest_elements(state: Mapping[str, Elements]) -> bytes:
    """xxh3_128 of a state; `docs/wire-format.md` has the serialisation, `base_digest` the use."""
    hasher = xxhash.xxh3_128()
    for raw, elements in sorted((name.encode(), elements) for name, elements in state.items()):
        head = [len(raw), elements.dtype.code, len(elements.shape), *elements.shape]
        hasher.update(np.array(head, "<u8").tobytes() + raw)
        for start in range(0, elements.bits.size, CHUNK):
            chunk = elements.bits[start : start + CHUNK]
            kept = sections.canonical(chunk, elements.dtype)
            hasher.update(kept.astype(sections.unsigned(elements.dtype), copy=False).data)
    return hasher.digest()


def checked_base(header: Header, base: Mapping[str, Elements] | None) -> Mapping[str, Elements]:
    """Return the base that a payload refers to, or an empty one where it refers to none.

    Raises
    ------
    BaseMismatchError
        If the payload needs a base and none, or another one, is given.
    """
    if header.base_digest == NO_BASE:
        return {}
    if base is None:
        raise BaseMismatchError(
            f"base: the payload refers to the state {header.base_digest.hex()}, but none is given; "
            "pass it as base, or ask the sender for a payload without a base"
        )
    digest = digest_elements(base)
    if digest != header.base_digest:
        raise BaseMismatchError(
            f"base: expected the state {header.base_digest.hex()}, got {digest.hex()}; "
            "ask the sender for a payload without a base"
        )
    return base


def decode_record(payload: memoryview, placed: Placed, base: Mapping[str, Elements]) -> Elements:
    """Decode one record whose header was checked, into memory of its own."""
    record = placed.record
    assert record.dtype is not None
    value_section = payload[placed.value_at : placed.value_at + record.value_len]
    raw = record.value_code == ValueCode.RAW
    try:
        if raw and record.mask_code == MaskCode.DENSE:
            bits = sections.read_values(value_section, record.dtype, record.k)
        elif (
            raw
            and record.mask_code == MaskCode.BITMAP
            and record.dtype is not BOOL
            and sections.kernels_pay_off(record.n)
        ):
            mask_section = payload[placed.mask_at : placed.mask_at + record.mask_len]
            bits = sections.expand_bitmap(
                mask_section, value_section, record.dtype, record.n, record.k
            )
        elif record.mask_code == MaskCode.DENSE:
            bits = np.empty(record.n, sections.unsigned(record.dtype))
            read = sections.value_reader(value_section, record, record.dtype)
            for start in range(0, record.n, CHUNK):
                stop = min(start + CHUNK, record.n)
                bits[start:stop] = read(start, stop)
        else:
            bits = np.zeros(record.n, sections.unsigned(record.dtype))
            read = sections.value_reader(value_section, record, record.dtype)
            for start, positions, done in _counted_positions(payload, placed, base):
                bits[start:][positions] = read(done, done + positions.size)
    except FormatError as error:
        raise FormatError(f"tensor {quote(record.name)}: {error}") from None
    except MemoryError:
        raise BudgetError(_no_memory(record)) from None
    return Elements(record.dtype, record.shape, bits)


def decode_mask(payload: memoryview, placed: Placed, base: Mapping[str, Elements]) -> Bools:
    """Flat mask of one record whose header was checked."""
    record = placed.record
    try:
        if record.mask_code == MaskCode.DENSE:
            return np.ones(record.n, np.bool_)
        keep = np.zeros(record.n, np.bool_)
        for start, positions, _ in _counted_positions(payload, placed, base):
            keep[start:][positions] = True
    except FormatError as error:
        raise FormatError(f"tensor {quote(record.name)}: {error}") from None
    except MemoryError:
        raise BudgetError(_no_memory(record)) from None
    return keep


def _no_memory(record: Record) -> str:
    return (
        f"tensor {quote(record.name)}: this machine cannot hold its {record.n} elements; "
        "pass a template or a smaller max_bytes to refuse such a payload at once"
    )


def _counted_positions(
    payload: memoryview, placed: Placed, base: Mapping[str, Elements]
) -> Iterator[tuple[int, Positions, int]]:
    """Positions chunk by chunk with the number that came before; exactly `k` in all."""
    k = placed.record.k
    done = 0
    for start, positions in _positions(payload, placed, base):
        if done + positions.size > k:
            raise FormatError(f"its mask keeps more than the {k} elements of its record")
        yield start, positions, done
        done += positions.size
    if done != k:
        raise FormatError(f"its mask keeps {done} elements, its record says {k}")


def _positions(
    payload: memoryview, placed: Placed, base: Mapping[str, Elements]
) -> Iterator[tuple[int, Positions]]:
    record = placed.record
    section = payload[placed.mask_at : placed.mask_at + record.mask_len]
    match MaskCode(record.mask_code):
        case MaskCode.BITMAP:
            return kept.bitmap_positions(section, record.n)
        case MaskCode.BITMAP_ZSTD:
            return kept.framed_positions(section, record.n)
        case MaskCode.RICE:
            return rice.positions(section, record.rice, record.n, record.k)
        case MaskCode.CSR:
            return kept.csr_positions(section, record.shape, record.k)
        case MaskCode.SAME:
            held = base.get(record.name)
            if held is None or held.shape != record.shape:
                raise FormatError("its mask refers to a base tensor of another shape or name")
            return sections.pattern_positions(held)
        case MaskCode.ALL_ZERO:
            return iter(())
        case MaskCode.DENSE:
            raise AssertionError("a dense record has no positions")
