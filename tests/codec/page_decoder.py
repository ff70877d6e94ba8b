"""A second decoder, written from docs/wire-format.md alone: no sparsekit, no NumPy, no torch.

Of the standards that the page names, it takes XXH3 and zstd from their libraries.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import xxhash

from tests.codec.page_values import (
    DTYPES,
    Plain,
    need,
    read_delta,
    read_half,
    read_levels,
    read_plane,
    read_split,
    read_values,
    unpack_bits,
)


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


def nonzero_of(base: Plain | None, record: Plain) -> list[tuple[int, int]]:
    """Positions and bits of the base tensor's non-zero elements."""
    assert base is not None
    need(base.shape == record.shape, "the base tensor has the same shape")
    return [(i, bits) for i, bits in enumerate(base.dense_bits()) if base.is_nonzero(bits)]


def read_subset(section: bytes, record: Plain, k: int, base: Plain | None, p: bytes) -> list[int]:
    parameter, m = struct.unpack("<BQ", p)
    found = nonzero_of(base, record)
    need(len(found) == m, "m")
    return [found[i][0] for i in read_rice(section, m, k, parameter)]


MANTISSAS = {0: 23, 1: 52, 2: 10, 3: 7}


def chosen_rice(n: int, k: int) -> int:
    c = min(k, n - k)

    def bits(r: int) -> float:
        q = math.pow(1 - c / n, 2**r)
        return c * (1 + r) + c * q / (1 - q)

    return min(range(32), key=bits) | (0x80 if k > n - k else 0)


def varint(section: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        number |= (section[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if section[at - 1] < 0x80:
            need(shift <= 63 and (shift == 7 or section[at - 1] > 0), "varint")
            return number, at


def read_predicted(section: bytes, record: Plain, base: Plain | None, p: bytes) -> list[int]:
    found = nonzero_of(base, record)
    assert base is not None
    if len(p) == 8:
        found = list(enumerate(base.dense_bits()))
    m, t = struct.unpack("<QQ", p) if len(p) == 16 else (len(found), *struct.unpack("<Q", p))
    need(len(found) == m and base.dtype in MANTISSAS, "m, a float type")
    sign = 1 << (8 * DTYPES[base.dtype][1] - 1)
    need(t < sign, "threshold")
    classes: list[list[int]] = [[] for _ in range(10)]
    kept = {}
    for position, bits in found:
        v = bits % sign
        a = min((abs(v - t) >> (MANTISSAS[base.dtype] - 3)).bit_length(), 4)
        classes[2 * a + (v >= t)].append(position)
        kept[position] = v >= t
    at, streams = 0, []
    for members in classes:
        c, at = varint(section, at)
        length = 0
        if 0 < c < len(members):
            length, at = varint(section, at)
        streams.append((members, c, length))
    for members, c, length in streams:
        u = len(members)
        need(c <= u, "exceptions")
        wrong = list(range(u)) if c == u else []
        if 0 < c < u:
            wrong = read_rice(section[at : at + length], u, c, chosen_rice(u, c))
        at += length
        for i in wrong:
            kept[members[i]] = not kept[members[i]]
    need(at == len(section), "end of the section")
    return [position for position in sorted(kept) if kept[position]]


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


def read_long_record(payload: bytes, at: int, _: bytes) -> tuple[tuple[Any, ...], int]:
    name_len, param_len, dtype, d, mask_code, value_code = struct.unpack_from(
        "<HHBBBB", payload, at
    )
    k, mask_len, value_len, checksum = struct.unpack_from("<QQQQ", payload, at + 8)
    need(d <= 16, "dimensions")
    shape = struct.unpack_from(f"<{d}I", payload, at + 40)
    at += 40 + 4 * d
    parameters, name = payload[at : at + param_len], payload[at + param_len :][:name_len]
    at += param_len + name_len
    return (
        name, dtype, mask_code, value_code, shape, k, mask_len, value_len, checksum, parameters
    ), at  # fmt: skip


def read_short_record(payload: bytes, at: int, before: bytes) -> tuple[tuple[Any, ...], int]:
    shared, dtype, d, mask_code, value_code = payload[at : at + 5]
    need(d <= 16 and shared <= len(before), "dimensions, shared bytes")
    at += 5
    numbers = []
    for _ in range(d + 5):
        number, at = varint(payload, at)
        numbers.append(number)
    shape = tuple(numbers[:d])
    k, mask_len, value_len, param_len, name_len = numbers[d:]
    need(all(extent < 2**32 for extent in shape) and shared + name_len < 2**16, "extents, name")
    parameters, name = payload[at : at + param_len], payload[at + param_len :][:name_len]
    at += param_len + name_len
    return (
        before[:shared] + name, dtype, mask_code, value_code, shape, k, mask_len, value_len, None,
        parameters,
    ), at  # fmt: skip


def read(payload: bytes, base: dict[str, Plain] | None = None) -> tuple[int, dict[str, Plain]]:
    need(payload[:8] == bytes.fromhex("895350550d0a1a0a"), "magic")
    major, _, flags, header_len, n_records, reserved, length, round_number = struct.unpack(
        "<BBHIIIQQ", payload[8:40]
    )
    need(major == 1 and flags & 0xFE == 0 and reserved == 0, "version, flags, reserved")
    short = bool(flags & 1)
    need(length == len(payload) and header_len % 8 == 0, "lengths")
    need(64 <= header_len <= min(length, 16_777_216), "header length")
    need(n_records <= 65_536, "number of records")
    covered = payload[:56] + payload[64:header_len]
    need(payload[56:64] == xxhash.xxh3_64_intdigest(covered).to_bytes(8, "little"), "checksum")
    base_digest = payload[40:56]
    if any(base_digest):
        need(base is not None and digest(base) == base_digest, "the base")
    state: dict[str, Plain] = {}
    uses_base = False
    at, data = 72 if short else 64, header_len
    raw, whole = b"", b""
    for _ in range(n_records):
        fields, at = (read_short_record if short else read_long_record)(payload, at, raw)
        raw, dtype, mask_code, value_code, shape, k, mask_len, value_len, checksum, parameters = (
            fields
        )
        need(dtype in DTYPES and mask_code in {*MASKS, 3, 6, 7, 10} and value_code <= 4, "codes")
        mask_params = {3: 1, 6: 9, 7: 16, 10: 8}.get(mask_code, 0)
        need(len(parameters) == mask_params + (0, 6, 7, 6, 7)[value_code], "parameters")
        name = raw.decode()
        need(at <= header_len and name not in state, "record")
        sections = []
        for size in (mask_len, value_len):
            sections.append(payload[data : data + size])
            padding = payload[data + size : data + (size + 7) // 8 * 8]
            need(not any(padding), "padding")
            data += size + len(padding)
        whole += b"".join(sections)
        found = xxhash.xxh3_64_intdigest(b"".join(sections))
        need(short or found == checksum, "checksum of a record")
        need(mask_code not in (0, 1, 5) or not mask_len, "an empty section")
        uses_base |= mask_code in (5, 6, 7, 10) or value_code == 4
        uses_base |= value_code == 3 and parameters[-5] > 0
        tensor = Plain(dtype, shape, [], [])
        held = base.get(name) if base else None
        if mask_code == 3:
            tensor.kept = read_rice(sections[0], math.prod(shape), k, parameters[0])
        elif mask_code == 6:
            tensor.kept = read_subset(sections[0], tensor, k, held, parameters[:9])
        elif mask_code in (7, 10):
            tensor.kept = read_predicted(sections[0], tensor, held, parameters[:mask_params])
        else:
            tensor.kept = MASKS[mask_code](sections[0], tensor, k, held)
        need(len(tensor.kept) == k, "k")
        if value_code == 3:
            tensor.bits = read_levels(sections[1], tensor, k, held, parameters[-6:])
        elif value_code == 4:
            tensor.bits = read_delta(sections[1], tensor, k, held, parameters[-7:])
        elif value_code == 2:
            tensor.bits = read_half(sections[1], dtype, k, parameters[-7:])
        elif value_code == 1:
            tensor.bits = read_split(sections[1], dtype, k, parameters[-6:])
        else:
            tensor.bits = read_values(sections[1], dtype, k)
        state[name] = tensor
    total = int.from_bytes(payload[64:72], "little")
    need(not short or xxhash.xxh3_64_intdigest(whole) == total, "checksum of the sections")
    need(header_len - at < 8 and not any(payload[at:header_len]), "end of the header")
    need(uses_base == any(base_digest), "the base is named if it is used")
    need(data == length, "sections make up the payload")
    return round_number, state
