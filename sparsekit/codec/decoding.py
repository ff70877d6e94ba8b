"""Decode payloads, which may be hostile, to bit patterns; needs no torch."""

from collections.abc import Iterator, Mapping

import numpy as np

from sparsekit.codec import compiled, flags, predicted, related, rice, sections
from sparsekit.codec import positions as kept
from sparsekit.codec.based_codes import BLOCK
from sparsekit.codec.core import digest_elements
from sparsekit.codec.elements import Bits, Elements, unsigned
from sparsekit.codec.pattern import pattern_positions
from sparsekit.codec.positions import CHUNK, Bools, Positions
from sparsekit.codec.records import BOOL, DType, MaskCode, Record, ValueCode, quote
from sparsekit.codec.wire import NO_BASE, Header, Placed
from sparsekit.errors import BaseMismatchError, BudgetError, FormatError


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
    held = _held(record, base) if record.values_need_base else None
    raw = record.value_code == ValueCode.RAW
    try:
        if compiled.takes(record):
            mask_section = payload[placed.mask_at : placed.mask_at + record.mask_len]
            same = record.mask_code == MaskCode.SAME
            tensor = _base_tensor(record, base) if same else None
            bits: Bits = compiled.decode(mask_section, value_section, record, tensor)
        elif raw and record.mask_code == MaskCode.DENSE:
            bits = sections.read_values(value_section, record.dtype, record.k)
        elif is_plain_bitmap(record) and flags.kernels_pay_off(record.n):
            mask_section = payload[placed.mask_at : placed.mask_at + record.mask_len]
            bits = sections.expand_bitmap(
                mask_section, value_section, record.dtype, record.n, record.k
            )
        else:
            bits = _in_order(payload, placed, base, record.dtype, held)
    except FormatError as error:
        raise FormatError(f"tensor {quote(record.name)}: {error}") from None
    except MemoryError:
        raise BudgetError(_no_memory(record)) from None
    return Elements(record.dtype, record.shape, bits)


def _in_order(
    payload: memoryview,
    placed: Placed,
    base: Mapping[str, Elements],
    dtype: DType,
    held: Bits | None,
) -> Bits:
    """All elements, written from the first to the last.

    The kept ones that are left are at most as many as the elements that are. So the last `k` bytes
    of the tensor have room for what is still to be read of a plane of `k` bytes.
    """
    record = placed.record
    section = payload[placed.value_at : placed.value_at + record.value_len]
    bits = np.empty(record.n, unsigned(dtype))
    octets = bits.view(np.uint8)
    read = sections.value_reader(section, record, dtype, octets[octets.size - record.k :])
    if record.mask_code == MaskCode.DENSE:
        size = BLOCK if record.value_code == ValueCode.DELTA else CHUNK
        for start in range(0, record.n, size):
            stop = min(start + size, record.n)
            bits[start:stop] = read(start, stop, None if held is None else held[start:stop])
        return bits
    filled = 0
    for start, positions, done in _counted_positions(payload, placed, base):
        given = None if held is None else held[start:][positions]
        values = read(done, done + positions.size, given)
        if positions.size:
            end = start + int(positions[-1]) + 1
            bits[filled:end] = 0
            bits[start:][positions] = values
            filled = end
    bits[filled:] = 0
    return bits


def is_plain_bitmap(record: Record) -> bool:
    """Whether a record is a bitmap and its kept elements as they are."""
    plain = record.mask_code == MaskCode.BITMAP and record.value_code == ValueCode.RAW
    return plain and record.dtype is not BOOL


def bitmap_parts(payload: memoryview, placed: Placed) -> tuple[Bits, flags.Bytes]:
    """Kept elements and bits of a record that is a plain bitmap, checked; both in the payload."""
    record = placed.record
    assert record.dtype is not None
    try:
        return sections.bitmap_parts(
            payload[placed.mask_at : placed.mask_at + record.mask_len],
            payload[placed.value_at : placed.value_at + record.value_len],
            record.dtype, record.n, record.k,
        )  # fmt: skip
    except FormatError as error:
        raise FormatError(f"tensor {quote(record.name)}: {error}") from None


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
    found = _positions(payload, placed, base)
    if placed.record.value_code == ValueCode.DELTA:
        found = kept.in_blocks(found, placed.record.n, BLOCK)
    for start, positions in found:
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
            return pattern_positions(_base_tensor(record, base))
        case MaskCode.SUBSET:
            held = _base_tensor(record, base)
            return related.subset_positions(section, record.subset, record.k, held)
        case MaskCode.PREDICTED | MaskCode.RANKED:
            return predicted.positions(section, record.predicted, _base_tensor(record, base))
        case MaskCode.ALL_ZERO:
            return iter(())
        case MaskCode.DENSE:
            raise AssertionError("a dense record has no positions")


def _base_tensor(record: Record, base: Mapping[str, Elements]) -> Elements:
    held = base.get(record.name)
    if held is None or held.shape != record.shape:
        raise FormatError("it refers to a base tensor of another shape or name")
    return held


def _held(record: Record, base: Mapping[str, Elements]) -> Bits:
    try:
        held = _base_tensor(record, base)
    except FormatError as error:
        raise FormatError(f"tensor {quote(record.name)}: {error}") from None
    if held.dtype != record.dtype:
        raise FormatError(
            f"tensor {quote(record.name)}: it refers to a base tensor of {held.dtype.name}"
        )
    return held.bits
