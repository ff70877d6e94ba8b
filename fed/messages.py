"""One message between server and site: JSON control, then a codec payload, behind a fixed header.

Layout, little-endian: magic ``SPKM`` (4 B), control length (u32), payload length (u64), control
(UTF-8 JSON, one object), payload. The 16 header bytes are the framing.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.codec.wire import Buffer
from sparsekit.errors import FormatError, TruncatedError

_HEADER = struct.Struct("<4sIQ")
_MAGIC = b"SPKM"
FRAMING_BYTES = _HEADER.size
MAX_CONTROL_BYTES = 1 << 20


@dataclass(frozen=True)
class Message:
    """What was sent: ``control``, plain JSON values, and ``payload``, codec bytes or nothing.

    The payload is a view of the message, not a copy.
    """

    control: Mapping[str, Any]
    payload: memoryview
    control_bytes: int


def pack(control: Mapping[str, Any], payload: Buffer = b"") -> bytes:
    """Serialize one message; equal input gives equal bytes."""
    return head(control, len(payload)) + payload


def head(control: Mapping[str, Any], payload_bytes: int) -> bytes:
    """Return what `pack` puts before the payload, for those who send it from where it is."""
    text = json.dumps(control, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return _HEADER.pack(_MAGIC, len(text), payload_bytes) + text


def unpack(data: Buffer) -> Message:
    """Read one whole message.

    Raises
    ------
    FormatError, TruncatedError
        If the bytes are not exactly one message.
    """
    if len(data) < FRAMING_BYTES:
        raise TruncatedError(f"message: expected at least {FRAMING_BYTES} bytes, got {len(data)}")
    magic, control_length, payload_length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise FormatError(f"message: expected magic {_MAGIC!r}, got {magic!r}")
    if control_length > MAX_CONTROL_BYTES:
        raise FormatError(
            f"message: control of {control_length} bytes exceeds the limit {MAX_CONTROL_BYTES}"
        )
    expected = FRAMING_BYTES + control_length + payload_length
    if len(data) != expected:
        kind = TruncatedError if len(data) < expected else FormatError
        raise kind(f"message: its header says {expected} bytes, got {len(data)}")
    start = FRAMING_BYTES + control_length
    try:
        text = bytes(data[FRAMING_BYTES:start]).decode("utf-8")
        control = json.loads(text, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"message: control is not JSON: {error}") from None
    if not isinstance(control, dict):
        raise FormatError(f"message: control is a {type(control).__name__}, not an object")
    payload = memoryview(data)[start:]
    return Message(control=control, payload=payload, control_bytes=control_length)


def _integer(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer of more than 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
