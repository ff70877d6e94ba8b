"""Short records: the same tensors in fewer bytes, and no way to lie in them."""

import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit import codec
from sparsekit.errors import ChecksumError, CodecError, FormatError, VersionError
from tests.codec.page_decoder import read

TWO = struct.pack("<2f", 1, 2)


def record(
    name: bytes = b"w",
    shape: bytes = b"\2",
    *,
    shared: int = 0,
    ndim: int = 1,
    mask: int = 0,
    k: bytes = b"\2",
    lengths: bytes = b"\0\x08",
    params: bytes = b"",
) -> bytes:
    """A dense float32 record as it should be, but for what is given."""
    fixed = bytes([shared, 0, ndim, mask, 0])
    return fixed + shape + k + lengths + bytes([len(params), len(name)]) + params + name


def payload(*records: bytes, sections: bytes = TWO, check: int | None = None, flags: int = 1,
            count: int | None = None, head: bytes | None = None) -> bytes:  # fmt: skip
    """A payload of such records whose header's checksum fits."""
    whole = xxhash.xxh3_64_intdigest(sections) if check is None else check
    body = whole.to_bytes(8, "little") + b"".join(records) if head is None else head
    body += bytes(-len(body) % 8)
    size = 64 + len(body) + len(sections)
    start = struct.pack(
        "<8sBBHIIIQQ16s", b"\x89SPU\r\n\x1a\n", 1, 2, flags, 64 + len(body),
        len(records) if count is None else count, 0, size, 0, bytes(16),
    )  # fmt: skip
    checksum = xxhash.xxh3_64_intdigest(start + body)
    return start + checksum.to_bytes(8, "little") + body + sections


def test_an_honest_payload_is_read() -> None:
    assert codec.decode(payload(record()))["w"].tolist() == [1, 2]
    both = payload(record(b"weight"), record(b"ed", shared=2), sections=2 * TWO)
    assert list(codec.decode(both)) == ["weight", "weed"]
    assert codec.inspect(both).version == (1, 2)
    assert codec.decode(payload(sections=b"")) == {}


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        pytest.param(payload(record(shared=1)), FormatError, "shares more bytes", id="shared"),
        pytest.param(
            payload(record(shape=b"\x80\x80\x80\x80\x10")), FormatError, "extent", id="extent"
        ),
        pytest.param(payload(record(k=b"\x82\0")), FormatError, "longer than needed", id="varint"),
        pytest.param(payload(record(k=b"\x80" * 9)), FormatError, "has no end", id="endless"),
        pytest.param(payload(record(k=b"\3")), FormatError, "3 kept of 2", id="k"),
        pytest.param(payload(record(ndim=17)), FormatError, "17 dimensions", id="dimensions"),
        pytest.param(payload(record(params=b"x")), FormatError, "0 bytes of param", id="params"),
        pytest.param(payload(record(), record(), sections=2 * TWO), FormatError, "twice", id="two"),
        pytest.param(payload(record(b"w" * 20), count=2), FormatError, "record 1", id="missing"),
        pytest.param(payload(record(), count=9), FormatError, "do not fit", id="count"),
        pytest.param(payload(record(), count=0), FormatError, "last record", id="left-over"),
        pytest.param(payload(record()[:-1] + b"\xff"), FormatError, "UTF-8", id="name"),
        pytest.param(payload(head=b"", sections=b""), FormatError, "do not fit", id="no-checksum"),
        pytest.param(
            payload(record()[:9] + b"\x7f" + record()[10:]), FormatError, "exceed", id="long-params"
        ),
        pytest.param(payload(record(), check=1), ChecksumError, "its sections", id="checksum"),
        pytest.param(payload(record(mask=8)), VersionError, "mask encoding 8", id="code"),
        pytest.param(payload(record(), flags=3), VersionError, "flags 0x02", id="flag"),
    ],
)
def test_lies_are_refused(data: bytes, error: type[CodecError], match: str) -> None:
    for function in (codec.decode, codec.decode_masks, codec.inspect):
        with pytest.raises(error, match=match):
            function(data)


def test_unknown_ancillary_records_are_skipped_and_checked() -> None:
    skipped = record(b"note", mask=130, params=b"abc", lengths=b"\5\3", k=b"\x63")
    sections = b"abcde\0\0\0fgh\0\0\0\0\0" + TWO
    right = xxhash.xxh3_64_intdigest(b"abcdefgh" + TWO)
    data = payload(skipped, record(), sections=sections, check=right)
    assert list(codec.decode(data)) == ["w"]
    with pytest.raises(ChecksumError):
        codec.decode(payload(skipped, record(), sections=sections))


names = st.lists(
    st.text(alphabet="ab.ßé", max_size=9) | st.just("layer." * 60), max_size=6, unique=True
)


@given(names=names, data=st.data())
@settings(max_examples=60, deadline=None)
def test_they_say_the_same_as_long_ones(names: list[str], data: st.DataObject) -> None:
    state: dict[str, Tensor] = {}
    for name in names:
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 130]), max_size=3))
        if torch.Size(shape).numel() < 40_000:
            state[name] = torch.arange(torch.Size(shape).numel()).view(shape) % 3
    long, short = codec.encode(state), codec.encode(state, level="small")
    assert len(short) < len(long) or not state
    ours, theirs = codec.inspect(short), codec.inspect(long)
    assert ours.records == theirs.records
    found = codec.decode(short)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert list(read(short)[1]) == list(state)
