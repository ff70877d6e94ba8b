"""The values of a payload, read as docs/wire-format.md says; see `page_decoder`."""

import math
import struct
from dataclasses import dataclass

import zstandard

DTYPES = {
    0: ("float32", 4), 1: ("float64", 8), 2: ("float16", 2), 3: ("bfloat16", 2), 4: ("int8", 1),
    5: ("int16", 2), 6: ("int32", 4), 7: ("int64", 8), 8: ("uint8", 1), 9: ("bool", 1),
}  # fmt: skip


class Refused(Exception):
    """The page says that a reader refuses."""


@dataclass
class Plain:
    dtype: int
    shape: tuple[int, ...]
    kept: list[int]
    bits: list[int]

    def dense_bits(self) -> list[int]:
        dense = [0] * math.prod(self.shape)
        for position, bits in zip(self.kept, self.bits, strict=True):
            dense[position] = bits
        return dense

    def is_nonzero(self, bits: int) -> bool:
        size = DTYPES[self.dtype][1]
        return bits not in ((0, 1 << (8 * size - 1)) if self.dtype < 4 else (0,))


def need(condition: bool, rule: str) -> None:
    if not condition:
        raise Refused(rule)


def unpack_bits(section: bytes, count: int) -> list[int]:
    bits = [(section[i // 8] >> (i % 8)) & 1 for i in range(8 * len(section))]
    need(not any(bits[count:]), "unused bits are 0")
    return bits[:count]


def read_values(section: bytes, dtype: int, k: int) -> list[int]:
    if dtype == 9:
        need(len(section) == (k + 7) // 8, "packed bools")
        return unpack_bits(section, k)
    size = DTYPES[dtype][1]
    need(len(section) == k * size, "raw length")
    return [int.from_bytes(section[i : i + size], "little") for i in range(0, k * size, size)]


FIELDS = {0: (8, 23), 2: (5, 10), 3: (8, 7)}


def read_plane(section: bytes, k: int) -> bytes:
    if len(section) == k:
        return section
    frame = zstandard.get_frame_parameters(section)
    need(frame.content_size == k and not frame.has_checksum and not frame.dict_id, "the frame")
    need(frame.window_size <= 2**17, "the window")
    at, blocks, last = zstandard.frame_header_size(section), 0, False
    while not last:
        head = int.from_bytes(section[at : at + 3], "little")
        last, blocks = bool(head & 1), blocks + 1
        at += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)
        need(at <= len(section) and blocks <= 16 + k // 1024, "blocks")
    return zstandard.ZstdDecompressor().decompress(section, allow_extra_data=False)


def read_split(section: bytes, dtype: int, k: int, parameters: bytes) -> list[int]:
    mode, smallest, length = struct.unpack("<BBI", parameters)
    need(mode <= 1 and (mode == 1 or smallest == 0), "mode")
    need(mode == 1 or dtype != 2, "float16 has mode 1")
    exponent_bits, mantissa_bits = FIELDS[dtype]
    low_bits = 16 if dtype == 0 else 0
    low_at = len(section) - k * low_bits // 8
    need(1 <= length <= k and 1 <= low_at - length <= k, "lengths of the planes")
    first, second = read_plane(section[:length], k), read_plane(section[length:low_at], k)
    values = []
    for i in range(k):
        exponent, m = first[i], mantissa_bits - low_bits
        top = 0
        if mode == 1:
            exponent, top, m = (first[i] >> 3) + smallest, first[i] & 7, m - 3
        need(exponent < 1 << exponent_bits and second[i] < 2 << m, "bits of the values")
        mantissa = top << m | second[i] & ((1 << m) - 1)
        low = int.from_bytes(section[low_at + 2 * i :][:2], "little") if low_bits else 0
        sign = second[i] >> m
        bits = (sign << exponent_bits | exponent) << mantissa_bits | mantissa << low_bits | low
        values.append(bits)
    return values


def widened(bits: int, kind: int) -> int:
    """Bits of the float32 that equals a float16 (kind 0) or a bfloat16 (kind 1)."""
    if kind == 1:
        return bits << 16
    (value,) = struct.unpack("<e", bits.to_bytes(2, "little"))
    if value != value:
        return (bits & 0x8000) << 16 | 0x7F800000 | (bits & 0x3FF) << 13
    return int.from_bytes(struct.pack("<f", value), "little")


def read_half(section: bytes, dtype: int, k: int, parameters: bytes) -> list[int]:
    kind, inner = parameters[0], parameters[1:]
    need(dtype == 0 and kind <= 1, "half is for float32")
    if any(inner):
        halves = read_split(section, 2 + kind, k, inner)
    else:
        need(len(section) == 2 * k, "length of half values")
        halves = [int.from_bytes(section[i : i + 2], "little") for i in range(0, 2 * k, 2)]
    return [widened(bits, kind) for bits in halves]


def rounded(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


def read_levels(section: bytes, record: Plain, k: int, base: Plain | None, p: bytes) -> list[int]:
    width, based, step = struct.unpack("<BBf", p)
    need(width in (4, 8) and based <= 1 and math.isfinite(step) and p[5] < 128, "parameters")
    need(record.dtype == 0 and k >= 1, "float32")
    need(step == 0 or step >= 2.0**-100, "step")
    size = k if width == 8 else (k + 1) // 2
    need(1 <= len(section) <= size, "length of levels")
    plane = read_plane(section, size)
    if width == 8:
        levels = [byte - 256 * (byte > 127) for byte in plane]
        need(min(levels) >= -127, "levels")
    else:
        need(max(plane) < 225, "pairs")
        levels = [q - 7 for byte in plane for q in divmod(byte, 15)]
        need(k % 2 == 0 or levels[-1] == 0, "the last pair")
    values = []
    held = held_bits(base, record) if based else [0] * k
    for position, q, bits in zip(record.kept, levels, held, strict=False):
        del position
        value = rounded(q * step)
        if based and q == 0:
            values.append(0 if bits == 1 << 31 else bits)
            continue
        if based:
            value = rounded(as_float(bits) + value)
        values.append(int.from_bytes(struct.pack("<f", value + 0.0), "little"))
    return values


def held_bits(base: Plain | None, record: Plain) -> list[int]:
    """Bits of the base in the places of the kept elements."""
    assert base is not None
    need(base.shape == record.shape and base.dtype == record.dtype, "the base tensor")
    dense = base.dense_bits()
    return [dense[position] for position in record.kept]


def narrowed(bits: int, kind: int) -> int:
    """Bits of the nearest float16 (kind 1) or bfloat16 (kind 2), +0.0 for -0.0."""
    if kind == 1:
        half = int.from_bytes(struct.pack("<e", as_float(bits)), "little")
    else:
        low, half = bits & 0xFFFF, bits >> 16
        half += low > 0x8000 or (low == 0x8000 and half & 1)
    return 0 if half == 0x8000 else half


def read_delta(section: bytes, record: Plain, k: int, base: Plain | None, p: bytes) -> list[int]:
    kind, s, length = struct.unpack("<BhI", p)
    need(kind <= 2 and -31 <= s <= 288 and 1 <= length <= k, "parameters")
    width, exponent_bits, mantissa_bits = ((32, 8, 23), (16, 5, 10), (16, 8, 7))[kind]
    first = read_plane(section[:length], k)
    held = [narrowed(b, kind) if kind else b for b in held_bits(base, record)]
    fields = []
    for byte, b in zip(first, held, strict=True):
        f, t = byte >> 3, byte & 7
        e = (b >> mantissa_bits) & ((1 << exponent_bits) - 1)
        j = min(max(f + s - e, 1), 33) - (f > 1)
        fields.append((f, t, j, max(j - 3, 0) + 1 if f else 0))
    stored = [0] * k
    at, done = length, 0
    for block in range(0, math.prod(record.shape), 2**13):
        mine = range(
            done, done + sum(block <= position < block + 2**13 for position in record.kept)
        )
        done = mine.stop
        for i in range(4):
            for v in mine:
                if fields[v][3] >= 8 * (i + 1):
                    stored[v] |= section[at] << (8 * i)
                    at += 1
        places = [(v, fields[v][3] // 8 * 8 + i) for i in range(7) for v in mine
                  if fields[v][3] % 8 > i]  # fmt: skip
        size = (len(places) + 7) // 8
        bits = unpack_bits(section[at : at + size], len(places))
        at += size
        for (v, place), bit in zip(places, bits, strict=True):
            stored[v] |= bit << place
    need(at == len(section), "the last block")
    values = []
    sign = 1 << (width - 1)
    for (f, t, j, w), low, b in zip(fields, stored, held, strict=True):
        d = 0
        if f:
            d = ((1 << j) if f > 1 else 0) + (t << (j - 3) if j >= 3 else t >> (3 - j))
            d += low & ((1 << (w - 1)) - 1)
            d = -d if low >> (w - 1) else d
        number = (sign - b if b >= sign else b) + d
        need(abs(number) < sign, "a number")
        x = number if number >= 0 else sign - number
        values.append(widened(x, kind - 1) if kind else x)
    return values
