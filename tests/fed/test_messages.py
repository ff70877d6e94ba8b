import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import CodecError, FormatError, TruncatedError
from sparsekit.fed import messages

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(control=st.dictionaries(st.text(max_size=8), VALUES, max_size=5), payload=st.binary())
def test_messages_survive(control: dict[str, object], payload: bytes) -> None:
    data = messages.pack(control, payload)
    found = messages.unpack(data)
    assert found.control == control
    assert found.payload == payload
    assert len(data) == messages.FRAMING_BYTES + found.control_bytes + len(payload)


def test_layout_is_pinned() -> None:
    expected = b"SPKM" + struct.pack("<IQ", 15, 3) + b'{"a":1,"b":"x"}' + b"\x00\x01\x02"
    assert messages.pack({"b": "x", "a": 1}, b"\x00\x01\x02") == expected
    assert messages.FRAMING_BYTES == 16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_sent(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        messages.pack({"x": value})


def test_every_cut_is_noticed() -> None:
    data = messages.pack({"a": 1}, b"payload")
    for length in range(len(data)):
        with pytest.raises(TruncatedError):
            messages.unpack(data[:length])
    with pytest.raises(FormatError, match="its header says"):
        messages.unpack(data + b"\0")


def raw(control: bytes) -> bytes:
    return struct.pack("<4sIQ", b"SPKM", len(control), 0) + control


@pytest.mark.parametrize(
    ("control", "text"),
    [
        pytest.param(b"", "not JSON", id="empty"),
        pytest.param(b"[1]", "is a list, not an object", id="list"),
        pytest.param(b"{", "not JSON", id="open"),
        pytest.param(b'{"a": NaN}', "not a finite number", id="NaN"),
        pytest.param(b'{"a": -Infinity}', "not a finite number", id="infinity"),
        pytest.param(b'{"a": 1e999}', "not a finite number", id="overflow"),
        pytest.param(b'{"a": 9223372036854775808}', "more than 64 bits", id="65 bits"),
        pytest.param(b'{"a": ' + b"7" * 5000 + b"}", "not JSON", id="5000 digits"),
        pytest.param(b'{"a": "\xff"}', "not JSON", id="no UTF-8"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not JSON", id="UTF-16"),
        pytest.param(b'{"a":' + b"[" * 100_000, "not JSON", id="deep"),
    ],
)
def test_hostile_control_is_refused(control: bytes, text: str) -> None:
    with pytest.raises(FormatError, match=text):
        messages.unpack(raw(control))


def test_lengths_are_checked_before_anything_is_read() -> None:
    huge = struct.pack("<4sIQ", b"SPKM", messages.MAX_CONTROL_BYTES + 1, 0)
    with pytest.raises(FormatError, match="exceeds the limit"):
        messages.unpack(huge)
    with pytest.raises(TruncatedError, match="18446744073709551633 bytes"):
        messages.unpack(struct.pack("<4sIQ", b"SPKM", 2, 2**64 - 1) + b"{}")
    with pytest.raises(FormatError, match="magic"):
        messages.unpack(b"HTTP/1.1 200 OK\r\n")


@given(st.binary(max_size=64))
def test_noise_never_passes_and_never_crashes(noise: bytes) -> None:
    with pytest.raises(CodecError):
        messages.unpack(noise)
    with pytest.raises(CodecError):
        messages.unpack(b"SPKM" + noise[:10])


def test_equal_content_gives_equal_bytes() -> None:
    one = messages.pack({"a": 1, "b": [1.5, None]})
    assert one == messages.pack({"b": [1.5, None], "a": 1})
    assert json.loads(one[16:]) == {"a": 1, "b": [1.5, None]}
