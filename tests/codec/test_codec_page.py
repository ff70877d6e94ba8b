"""A second decoder, written from docs/wire-format.md alone: no sparsekit, no NumPy, no torch.

Of the standards that the page names, it takes XXH3 and zstd from their libraries.
"""

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
import zstandard

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONTENTS = json.loads((GOLDEN / "contents.json").read_text(encoding="utf-8"))

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


def read_dense(_: bytes, record: Plain, k: int, __: Plain | None) -> list[int]:
    n = math.prod(record.shape)
    need(k == n, "dense keeps all")
    return list(range(n))


def read_zero(_: bytes, __: Plain, k: int, ___: Plain | None) -> list[int]:
    need(k == 0, "all-zero keeps none")
    return []


def read_bitmap(section: bytes, record: Plain, _: int, __: Plain | None) -> list[int]:
    n = math.prod(record.shape)
    need(len(section) == (n + 7) // 8, "bitmap length")
    return [i for i, bit in enumerate(unpack_bits(section, n)) if bit]


def read_framed_bitmap(section: bytes, record: Plain, _: int, __: Plain | None) -> list[int]:
    n = math.prod(record.shape)
    need(len(section) < (n + 7) // 8, "shorter than the bitmap")
    return read_bitmap(read_plane(section, (n + 7) // 8), record, _, __)


def read_same(_: bytes, record: Plain, __: int, base: Plain | None) -> list[int]:
    assert base is not None
    need(base.shape == record.shape, "the base tensor has the same shape")
    return [i for i, bits in enumerate(base.dense_bits()) if base.is_nonzero(bits)]


def read_csr(section: bytes, record: Plain, k: int, _: Plain | None) -> list[int]:
    shape = record.shape
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    kind, width = ("H", 2) if columns < 65536 else ("I", 4)
    need(len(section) == width * (rows + k), "CSR length")
    numbers = struct.unpack(f"<{rows + k}{kind}", section)
    counts, places = numbers[:rows], list(numbers[rows:])
    need(sum(counts) == k, "row counts add up")
    positions = []
    for row, count in enumerate(counts):
        mine, places = places[:count], places[count:]
        need(all(c < columns for c in mine) and mine == sorted(set(mine)), "columns increase")
        positions += [row * columns + c for c in mine]
    return positions


def read_rice(section: bytes, n: int, k: int, parameter: int) -> list[int]:
    r, complement = parameter & 0x7F, parameter >> 7
    c = n - k if complement else k
    need(r <= 31 and c >= 1, "the Rice parameter")
    least = (r + 1) * c
    need((least + 7) // 8 <= len(section) <= (least + ((n - c) >> r) + 7) // 8, "length")
    need(section[-1] != 0, "the last byte")
    bits = unpack_bits(section, 8 * len(section))
    gaps, run = [], 0
    for bit in bits[r * c :]:
        if bit:
            gaps.append(run << r)
        run = 0 if bit else run + 1
    need(len(gaps) == c, "c quotients")
    for i, bit in enumerate(bits[: r * c]):
        gaps[i % c] |= bit << (i // c)
    coded, position = [], -1
    for gap in gaps:
        position += gap + 1
        coded.append(position)
    need(position < n, "positions below n")
    return sorted(set(range(n)) - set(coded)) if complement else coded


MASKS: dict[int, Callable[[bytes, Plain, int, Plain | None], list[int]]] = {
    0: read_dense,
    1: read_zero,
    2: read_bitmap,
    4: read_framed_bitmap,
    5: read_same,
    9: read_csr,
}


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


def digest(state: dict[str, Plain]) -> bytes:
    hasher = xxhash.xxh3_128()
    for name in sorted(state, key=str.encode):
        tensor = state[name]
        raw = name.encode()
        for number in (len(raw), tensor.dtype, len(tensor.shape), *tensor.shape):
            hasher.update(number.to_bytes(8, "little"))
        hasher.update(raw)
        size = DTYPES[tensor.dtype][1]
        for bits in tensor.dense_bits():
            hasher.update((bits if tensor.is_nonzero(bits) else 0).to_bytes(size, "little"))
    return hasher.digest()


def read(payload: bytes, base: dict[str, Plain] | None = None) -> tuple[int, dict[str, Plain]]:
    need(payload[:8] == bytes.fromhex("895350550d0a1a0a"), "magic")
    major, _, flags, header_len, n_records, reserved, length, round_number = struct.unpack(
        "<BBHIIIQQ", payload[8:40]
    )
    need(major == 1 and flags & 0xFF == 0 and reserved == 0, "version, flags, reserved")
    need(length == len(payload) and header_len % 8 == 0, "lengths")
    need(64 <= header_len <= min(length, 16_777_216), "header length")
    need(n_records <= 65_536, "number of records")
    covered = payload[:56] + payload[64:header_len]
    need(payload[56:64] == xxhash.xxh3_64_intdigest(covered).to_bytes(8, "little"), "checksum")
    base_digest = payload[40:56]
    if any(base_digest):
        need(base is not None and digest(base) == base_digest, "the base")
    state: dict[str, Plain] = {}
    at, data = 64, header_len
    for _ in range(n_records):
        name_len, param_len, dtype, d, mask_code, value_code = struct.unpack_from(
            "<HHBBBB", payload, at
        )
        k, mask_len, value_len, checksum = struct.unpack_from("<QQQQ", payload, at + 8)
        need(d <= 16, "dimensions")
        need(dtype in DTYPES and mask_code in {*MASKS, 3} and value_code in (0, 1, 2), "codes")
        need(param_len == (mask_code == 3) + (0, 6, 7)[value_code], "parameters")
        shape = struct.unpack_from(f"<{d}I", payload, at + 40)
        at += 40 + 4 * d
        parameters = payload[at : at + param_len]
        at += param_len
        name = payload[at : at + name_len].decode()
        at += name_len
        need(at <= header_len and name not in state, "record")
        sections = []
        for size in (mask_len, value_len):
            sections.append(payload[data : data + size])
            padding = payload[data + size : data + (size + 7) // 8 * 8]
            need(not any(padding), "padding")
            data += size + len(padding)
        need(xxhash.xxh3_64_intdigest(b"".join(sections)) == checksum, "checksum of a record")
        tensor = Plain(dtype, shape, [], [])
        held = base.get(name) if base else None
        if mask_code == 3:
            tensor.kept = read_rice(sections[0], math.prod(shape), k, parameters[0])
        else:
            tensor.kept = MASKS[mask_code](sections[0], tensor, k, held)
        need(len(tensor.kept) == k, "k")
        if value_code == 2:
            tensor.bits = read_half(sections[1], dtype, k, parameters[-7:])
        elif value_code == 1:
            tensor.bits = read_split(sections[1], dtype, k, parameters[-6:])
        else:
            tensor.bits = read_values(sections[1], dtype, k)
        state[name] = tensor
    need(header_len - at < 8 and not any(payload[at:header_len]), "end of the header")
    need(data == length, "sections make up the payload")
    return round_number, state


@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_the_page_alone_decodes_every_golden_payload(name: str) -> None:
    entry = CONTENTS[name]
    base = read((GOLDEN / f"{entry['base']}.spu").read_bytes())[1] if "base" in entry else None

    round_number, state = read((GOLDEN / f"{name}.spu").read_bytes(), base)

    assert round_number == entry.get("round", 0)
    assert list(state) == list(entry["tensors"])
    for key, expected in entry["tensors"].items():
        tensor = state[key]
        assert DTYPES[tensor.dtype][0] == expected["dtype"]
        assert list(tensor.shape) == expected["shape"]
        n = math.prod(tensor.shape)
        positions = list(range(n)) if expected["positions"] == "all" else expected["positions"]
        assert tensor.kept == positions
        assert tensor.bits == expected["bits"]


def test_the_second_decoder_refuses_a_wrong_base() -> None:
    payload = (GOLDEN / "same.spu").read_bytes()
    other = read((GOLDEN / "example.spu").read_bytes())[1]
    with pytest.raises(Refused, match="the base"):
        read(payload, other)


def test_every_golden_payload_is_described_and_listed() -> None:
    assert {path.stem for path in GOLDEN.glob("*.spu")} == set(CONTENTS)


def test_the_worked_example_of_the_page_is_the_golden_file() -> None:
    page = (ROOT / "docs" / "wire-format.md").read_text(encoding="utf-8")
    block = page.split("<!-- example -->")[1].split("```")[1]
    lines = re.findall(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+?)(?:  |$)", block, re.MULTILINE)
    offsets = [int(offset, 16) for offset, _ in lines]
    pieces = [bytes.fromhex(text) for _, text in lines]
    assert offsets == [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    assert b"".join(pieces) == (GOLDEN / "example.spu").read_bytes()
