"""Payloads with valid checksums and bad intentions: a typed error, and no memory taken."""

import struct
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit import codec
from sparsekit.errors import (
    BaseMismatchError,
    BudgetError,
    ChecksumError,
    CodecError,
    FormatError,
    TruncatedError,
    VersionError,
)

FLOAT32, INT8, BOOL = 0, 4, 9
DENSE, ALL_ZERO, BITMAP, SAME, CSR = 0, 1, 2, 5, 9


@dataclass(frozen=True)
class Forged:
    """One record, every field free; `None` for what an honest writer would put there."""

    mask: bytes = b""
    values: bytes = b""
    k: int = 0
    shape: tuple[int, ...] = ()
    mask_code: int = DENSE
    value_code: int = 0
    dtype: int = FLOAT32
    name: bytes = b"w"
    params: bytes = b""
    ndim: int | None = None
    name_len: int | None = None
    mask_len: int | None = None
    value_len: int | None = None
    checksum: int | None = None
    padding: bytes = b"\0"

    def header(self) -> bytes:
        def told(value: int | None, truth: int) -> int:
            return truth if value is None else value

        checksum = xxhash.xxh3_64_intdigest(self.mask + self.values)
        fixed = struct.pack(
            "<HHBBBBQQQQ",
            told(self.name_len, len(self.name)), len(self.params), self.dtype,
            told(self.ndim, len(self.shape)), self.mask_code, self.value_code, self.k,
            told(self.mask_len, len(self.mask)), told(self.value_len, len(self.values)),
            told(self.checksum, checksum),
        )  # fmt: skip
        shape = struct.pack(f"<{len(self.shape)}I", *self.shape)
        return fixed + shape + self.params + self.name

    def sections(self) -> bytes:
        return b"".join(s + self.padding * (-len(s) % 8) for s in (self.mask, self.values))


@dataclass(frozen=True)
class Payload:
    """A payload of forged records, every header field free, checksum made to fit."""

    records: tuple[Forged, ...] = ()
    magic: bytes = b"\x89SPU\r\n\x1a\n"
    major: int = 1
    minor: int = 0
    flags: int = 0
    header_len: int | None = None
    n_records: int | None = None
    reserved: int = 0
    file_len: int | None = None
    digest: bytes = bytes(16)
    header_tail: bytes | None = None
    tail: bytes = b""

    def bytes(self) -> bytes:
        body = b"".join(record.header() for record in self.records)
        body += bytes(-len(body) % 8) if self.header_tail is None else self.header_tail
        sections = b"".join(record.sections() for record in self.records) + self.tail
        header_len = 64 + len(body) if self.header_len is None else self.header_len
        file_len = 64 + len(body) + len(sections) if self.file_len is None else self.file_len
        n_records = len(self.records) if self.n_records is None else self.n_records
        start = self.magic + struct.pack(
            "<BBHIIIQQ16s",
            self.major, self.minor, self.flags, header_len, n_records, self.reserved, file_len, 0,
            self.digest,
        )  # fmt: skip
        covered = start + (body + sections)[: max(header_len - 64, 0)]
        return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(covered)) + body + sections


def floats(count: int) -> bytes:
    return struct.pack(f"<{count}f", *range(1, count + 1))


GOOD = Forged(floats(0), floats(2), k=2, shape=(2,))
BITS = Forged(b"\x05\x02", floats(3), k=3, shape=(2, 5), mask_code=BITMAP)
ROWS = Forged(struct.pack("<6H", 2, 0, 1, 1, 4, 0), floats(3), k=3, shape=(3, 5), mask_code=CSR)
WIDE = Forged(
    struct.pack("<4I", 1, 1, 65_535, 2), b"\x01\x02", k=2, shape=(2, 65_536), mask_code=CSR,
    dtype=INT8,
)  # fmt: skip
FLAGS = Forged(b"", b"\x07", k=3, shape=(3,), dtype=BOOL)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(GOOD, id="dense"),
        pytest.param(BITS, id="bitmap"),
        pytest.param(ROWS, id="csr"),
        pytest.param(WIDE, id="wide-csr"),
        pytest.param(FLAGS, id="bool"),
        pytest.param(Forged(shape=(3, 0, 2)), id="empty"),
        pytest.param(replace(BITS, shape=(0, 4), mask=b"", values=b"", k=0), id="empty-bitmap"),
        pytest.param(
            replace(ROWS, shape=(3, 0), mask=bytes(6), values=b"", k=0), id="csr-no-columns"
        ),
        pytest.param(replace(ROWS, shape=(0, 5), mask=b"", values=b"", k=0), id="csr-no-rows"),
    ],
)
def test_the_forger_can_write_honest_payloads(record: Forged) -> None:
    payload = Payload((record,)).bytes()
    assert codec.decode(payload)["w"].count_nonzero() == record.k
    assert codec.decode_masks(payload)["w"].count_nonzero() == record.k


def refused(payload: Payload, error: type[CodecError], match: str, limit: int = 2**20) -> None:
    """Check that nothing reads `payload`, and that trying takes less than `limit` bytes."""
    data = payload.bytes()
    for function in (codec.decode, codec.decode_masks):
        tracemalloc.start()
        try:
            with pytest.raises(error, match=match):
                function(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit


@pytest.mark.parametrize(
    ("payload", "error", "match"),
    [
        pytest.param(Payload(magic=b"\x89SPV\r\n\x1a\n"), FormatError, "magic", id="magic"),
        pytest.param(Payload(major=2), VersionError, "major version 1, got 2", id="major"),
        pytest.param(Payload(major=0), VersionError, "major version 1, got 0", id="major-0"),
        pytest.param(Payload(flags=0x0004), VersionError, "critical flags 0x04", id="flags"),
        pytest.param(Payload(reserved=1), FormatError, "reserved", id="reserved"),
        pytest.param(Payload(file_len=2**64 - 1), TruncatedError, "got 64", id="file-long"),
        pytest.param(Payload(file_len=63), FormatError, "1 bytes follow", id="file-short"),
        pytest.param(Payload(header_len=2**32 - 8), FormatError, "header of", id="header-long"),
        pytest.param(Payload(header_len=72), FormatError, "header of", id="header-past-end"),
        pytest.param(Payload(header_len=56), FormatError, "header of", id="header-short"),
        pytest.param(Payload((GOOD,), header_len=70), FormatError, "header of", id="header-odd"),
        pytest.param(Payload(n_records=2**32 - 1), FormatError, "do not fit", id="records-many"),
        pytest.param(Payload((GOOD,), n_records=2), FormatError, "do not fit", id="records-more"),
        pytest.param(Payload((GOOD,) * 2, n_records=1), FormatError, "not end", id="records-less"),
        pytest.param(Payload((GOOD, GOOD)), FormatError, "appears twice", id="twice"),
        pytest.param(Payload((GOOD,), header_tail=bytes(11)), FormatError, "not end", id="hole"),
        pytest.param(
            Payload((GOOD,), header_tail=b"\0\0\1"), FormatError, "not end", id="header-padding"
        ),
        pytest.param(Payload((GOOD,), tail=bytes(8)), FormatError, "sections take", id="tail"),
        pytest.param(Payload(digest=bytes(15) + b"\1"), FormatError, "digest", id="no-use-of-base"),
    ],
)
def test_hostile_header_is_refused(payload: Payload, error: type[CodecError], match: str) -> None:
    refused(payload, error, match)


@pytest.mark.parametrize(
    ("record", "error", "match"),
    [
        pytest.param(replace(GOOD, ndim=200), FormatError, "200 dimensions", id="ndim-200"),
        pytest.param(replace(GOOD, ndim=16), FormatError, "exceed the header", id="ndim-16"),
        pytest.param(replace(GOOD, name_len=65_535), FormatError, "exceed", id="name-beyond"),
        pytest.param(replace(GOOD, name=b"\xff\xfe"), FormatError, "UTF-8", id="name-not-utf8"),
        pytest.param(replace(GOOD, name=b"a\0b"), FormatError, "zero byte", id="name-zero-byte"),
        pytest.param(replace(GOOD, params=b"\0"), FormatError, "parameters", id="parameters"),
        pytest.param(replace(GOOD, dtype=10), VersionError, "unknown dtype 10", id="dtype"),
        pytest.param(replace(GOOD, mask_code=8), VersionError, "mask encoding 8", id="mask-code"),
        pytest.param(replace(GOOD, value_code=5), VersionError, "value encoding 5", id="val-code"),
        pytest.param(
            replace(GOOD, mask_code=200, value_code=5), VersionError, "value encoding 5",
            id="critical-beside-ancillary",
        ),
        pytest.param(replace(GOOD, checksum=1), ChecksumError, "checksum", id="checksum"),
        pytest.param(replace(BITS, padding=b"\1"), FormatError, "padding", id="padding"),
        pytest.param(
            replace(GOOD, shape=(2**32 - 1,) * 16), FormatError, "too many", id="n-overflow"
        ),
        pytest.param(
            replace(GOOD, shape=(2**31, 2**32 - 1, 0, 2), k=0), FormatError, "too many",
            id="zero-times-overflow",
        ),
        pytest.param(
            replace(GOOD, shape=(2**31,), k=2**31), FormatError, "value section of", id="k-huge"
        ),
        pytest.param(
            replace(GOOD, shape=(2**31,), k=2**31, value_len=2**33), FormatError, "sections take",
            id="lengths-huge",
        ),
        pytest.param(
            replace(GOOD, mask_len=2**64 - 8, mask_code=BITMAP), FormatError, "mask section of",
            id="length-wraps",
        ),
        pytest.param(replace(GOOD, k=3), FormatError, "3 kept of 2", id="k-above-n"),
        pytest.param(replace(GOOD, k=1), FormatError, "1 kept of 2", id="dense-k"),
        pytest.param(replace(GOOD, mask_code=ALL_ZERO), FormatError, "2 kept", id="all-zero-k"),
        pytest.param(replace(GOOD, values=floats(3)), FormatError, "section of 8", id="values"),
        pytest.param(
            Forged(shape=(2**31, 8), mask_code=ALL_ZERO), BudgetError, "limit is", id="zeros"
        ),
        pytest.param(replace(BITS, mask=b"\5\6"), FormatError, "unused bits", id="bitmap-tail"),
        pytest.param(replace(BITS, mask=b"\5\0"), FormatError, "keeps 2 elements", id="popcount-"),
        pytest.param(replace(BITS, mask=b"\7\2"), FormatError, "more than the 3", id="popcount+"),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 2, 0, 1, 4, 1, 0)), FormatError, "increasing",
            id="csr-order",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 2, 0, 1, 4, 4, 0)), FormatError, "increasing",
            id="csr-twice",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 2, 0, 1, 1, 5, 0)), FormatError, "increasing",
            id="csr-column-beyond",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 2, 0, 0, 1, 4, 0)), FormatError, "give 2",
            id="csr-counts-few",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 2, 1, 1, 1, 4, 0)), FormatError, "exceed the 3",
            id="csr-counts-many",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<6H", 65_535, 65_535, 1, 1, 4, 0)), FormatError,
            "exceed the 3", id="csr-counts-huge",
        ),
        pytest.param(
            replace(ROWS, shape=(3, 2**31, 2)), FormatError, "cannot hold its shape",
            id="csr-too-wide",
        ),
        pytest.param(
            replace(ROWS, mask=struct.pack("<3H", 3, 0, 1)), FormatError, "section of 12",
            id="csr-short",
        ),
        pytest.param(
            replace(ROWS, shape=(3, 0), mask=struct.pack("<3H", 1, 0, 0), values=b"", k=0),
            FormatError, "exceed the 0", id="csr-no-columns",
        ),
        pytest.param(
            replace(GOOD, mask_code=SAME), FormatError, "digest", id="same-without-digest"
        ),
    ],
)  # fmt: skip
def test_hostile_record_is_refused(record: Forged, error: type[CodecError], match: str) -> None:
    # An honest neighbour, so that a defect of the checks cannot hide behind the totals.
    other = Forged(values=floats(1), k=1, shape=(1,), name=b"other")
    refused(Payload((other, record)), error, match)


def test_unused_bits_of_packed_bools_are_refused() -> None:
    payload = Payload((replace(FLAGS, values=b"\x0f"),)).bytes()
    with pytest.raises(FormatError, match="unused bits"):
        codec.decode(payload)


def test_columns_that_increase_into_the_next_chunk_are_checked() -> None:
    columns = list(range(60_000))
    columns[8192] = columns[8191]
    mask = struct.pack(f"<{1 + len(columns)}H", len(columns), *columns)
    record = Forged(
        mask, bytes(len(columns)), k=len(columns), shape=(1, 60_001), mask_code=CSR, dtype=INT8
    )
    with pytest.raises(FormatError, match="increasing"):
        codec.decode(Payload((record,)).bytes())


def test_an_unknown_ancillary_record_is_skipped() -> None:
    extra = Forged(b"abc", b"defgh", k=99, shape=(2,), name=b"note", params=b"xyz")
    unknown: list[dict[str, Any]] = [{"mask_code": 128}, {"value_code": 255}, {"dtype": 200}]
    for codes in unknown:
        payload = Payload((GOOD, replace(extra, **codes))).bytes()
        state = codec.decode(payload, template={"w": torch.zeros(2)})
        assert list(state) == ["w"]
        assert list(codec.decode_masks(payload)) == ["w"]
        info = codec.inspect(payload)
        assert [record.dtype for record in info.records] == ["float32", "skipped"]
        assert info.n == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"checksum": 1}, "does not match its checksum", id="checksum"),
        pytest.param({"padding": b"\1"}, "padding is not zero", id="padding"),
        pytest.param({"value_len": 2**40}, "sections take", id="length"),
        pytest.param({"name": b"w"}, "appears twice", id="name"),
    ],
)
def test_a_skipped_record_is_checked_all_the_same(change: dict[str, Any], match: str) -> None:
    extra = Forged(b"abc", b"defgh", name=b"note", mask_code=128)
    refused(Payload((GOOD, replace(extra, **change))), CodecError, match)


def test_newer_minor_versions_and_ancillary_flags_are_read() -> None:
    payload = Payload((GOOD,), minor=7, flags=0x0300).bytes()
    assert torch.equal(codec.decode(payload)["w"], torch.tensor([1.0, 2.0]))
    assert codec.inspect(payload).version == (1, 7)


def test_a_base_tensor_of_another_shape_is_refused() -> None:
    base = {"w": torch.tensor([[1.0, 0.0]])}
    record = replace(GOOD, mask_code=SAME, k=1, values=floats(1))
    payload = Payload((record,), digest=codec.base_digest(base)).bytes()
    with pytest.raises(FormatError, match="another shape"):
        codec.decode(payload, base=base)
    with pytest.raises(BaseMismatchError, match="none is given"):
        codec.decode_masks(payload)


def test_a_base_with_another_count_is_refused() -> None:
    base = {"w": torch.tensor([1.0, float("nan")])}
    record = replace(GOOD, mask_code=SAME, k=1, values=floats(1))
    payload = Payload((record,), digest=codec.base_digest(base)).bytes()
    with pytest.raises(FormatError, match="more than the 1"):
        codec.decode(payload, base=base)


numbers = st.one_of(
    st.integers(0, 40), st.sampled_from([2**16 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
forged = st.builds(
    Forged,
    mask=st.binary(max_size=24),
    values=st.binary(max_size=24),
    k=st.one_of(st.integers(0, 24), st.integers(0, 2**64 - 1)),
    shape=st.lists(numbers, max_size=4).map(tuple),
    mask_code=st.sampled_from([DENSE, ALL_ZERO, BITMAP, SAME, CSR, 3, 4, 6, 130]),
    value_code=st.sampled_from([0, 0, 0, 0, 1, 2, 3, 130]),
    dtype=st.integers(0, 10),
    name=st.binary(max_size=4),
    params=st.one_of(st.just(b""), st.binary(max_size=8)),
)


@given(records=st.lists(forged, max_size=3).map(tuple), digest=st.sampled_from([0, 0, 0, 1]))
@settings(max_examples=300, deadline=None)
def test_any_forged_payload_decodes_or_is_refused(records: tuple[Forged, ...], digest: int) -> None:
    payload = Payload(records, digest=bytes(15) + bytes([digest])).bytes()
    try:
        state = codec.decode(payload, base={}, max_bytes=2**16)
    except CodecError:
        return
    for name, tensor in state.items():
        mask = codec.decode_masks(payload)[name]
        assert mask.shape == tensor.shape
        assert not tensor[~mask].count_nonzero()


@given(
    rows=st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=4),
    columns=st.integers(1, 12),
    k_error=st.sampled_from([0, 0, 0, 1, -1]),
)
@settings(max_examples=300, deadline=None)
def test_csr_is_taken_exactly_when_its_rows_increase(
    rows: list[list[int]], columns: int, k_error: int
) -> None:
    places = [column for row in rows for column in row]
    k = max(len(places) + k_error, 0)
    numbers = ([len(row) for row in rows] + places + [0])[: len(rows) + k]
    record = Forged(
        struct.pack(f"<{len(numbers)}H", *numbers), bytes([1]) * k, k=k,
        shape=(len(rows), columns), mask_code=CSR, dtype=INT8,
    )  # fmt: skip
    honest = k == len(places) and all(
        row == sorted(set(row)) and all(column < columns for column in row) for row in rows
    )
    payload = Payload((record,)).bytes()
    if honest:
        mask = codec.decode_masks(payload)["w"]
        assert [row.nonzero().flatten().tolist() for row in mask] == rows
    else:
        with pytest.raises(FormatError):
            codec.decode(payload)
