"""Feed the codec damaged payloads that are well-formed enough to reach its depths.

    python tools/fuzz_codec.py [--executions N] [--seconds S] [--processes P] [--seed S] [--write]

Every execution takes a payload of the corpus (tests/golden and tests/fuzz) apart, changes some of
its fields and sections, puts it together with checksums that fit, and decodes it. Nothing but
success or a CodecError may come of that, within a few seconds and within the memory that the
caller allows. What breaks this is written to build/fuzz; once mended, it belongs into tests/fuzz,
where a test decodes it from then on. ``--write`` records the run in docs/results/fuzz.json.
"""

import argparse
import collections
import copy
import hashlib
import importlib
import json
import multiprocessing
import random
import signal
import struct
import sys
import time
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
import xxhash

from sparsekit import codec
from sparsekit.bench.machine import describe
from sparsekit.codec import flags
from sparsekit.errors import CodecError

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "build" / "fuzz"
RESULTS = ROOT / "docs" / "results" / "fuzz.json"
MAX_BYTES = 1 << 18
# Beside the decoded tensors and a copy of them as masks.
SLACK_BYTES = 1 << 20
HANG_SECONDS = 10
_PREFIX = struct.Struct("<8sBBHIIIQQ16s")
_RECORD = struct.Struct("<HHBBBBQQQQ")
Bases: TypeAlias = dict[bytes, dict[str, torch.Tensor]]
"""By digest."""
LARGE = 3 * flags.LOADED_ELEMENTS + 77
INTERESTING = (0, 1, 2, 7, 8, 9, 31, 32, 63, 64, 127, 128, 255, 256, 257, 4096, 2**15, 2**16 - 1,
               2**16, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)  # fmt: skip


@dataclass
class Record:
    """A record with its sections; lengths and checksums are made when it is written."""

    name: bytes
    parameters: bytes
    dtype: int
    shape: list[int]
    mask_code: int
    value_code: int
    k: int
    mask: bytes
    values: bytes
    lies: dict[str, int] = field(default_factory=dict)
    """Lengths or a checksum to write instead of the true ones."""


@dataclass
class Payload:
    """A payload taken apart."""

    minor: int
    flags: int
    digest: bytes
    records: list[Record]


def take_apart(data: bytes) -> Payload:
    """Read a valid payload, in a way of its own."""
    _, _, minor, flags, header_len, count, _, _, _, digest = _PREFIX.unpack_from(data)
    at, section = 64 + 8 * (flags & 1), header_len
    records = []
    name = b""
    for _ in range(count):
        if flags & 1:
            shared, dtype, ndim, mask_code, value_code = data[at : at + 5]
            numbers, at = _varints(data, at + 5, ndim + 5)
            shape = numbers[:ndim]
            k, mask_len, value_len, parameter_len, name_len = numbers[ndim:]
            start = name[:shared]
        else:
            fixed = _RECORD.unpack_from(data, at)
            name_len, parameter_len, dtype, ndim, mask_code, value_code = fixed[:6]
            k, mask_len, value_len = fixed[6:9]
            at += _RECORD.size
            shape = list(struct.unpack_from(f"<{ndim}I", data, at))
            at += 4 * ndim
            start = b""
        parameters = data[at : at + parameter_len]
        name = start + data[at + parameter_len :][:name_len]
        at += parameter_len + name_len
        mask = data[section : section + mask_len]
        section += -(-mask_len // 8) * 8
        values = data[section : section + value_len]
        section += -(-value_len // 8) * 8
        records.append(
            Record(name, parameters, dtype, shape, mask_code, value_code, k, mask, values)
        )
    return Payload(minor, flags, digest, records)


def _varints(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    numbers = []
    for _ in range(count):
        number = shift = 0
        while True:
            number |= (data[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if data[at - 1] < 0x80:
                break
        numbers.append(number)
    return numbers, at


def _varint(number: int) -> bytes:
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def put_together(payload: Payload) -> bytes:
    """Write a payload with checksums that fit."""
    body, sections = b"", b""
    name = b""
    whole = xxhash.xxh3_64()
    for r in payload.records:
        parts = {
            "name_len": len(r.name), "parameter_len": len(r.parameters), "ndim": len(r.shape),
            "mask_len": len(r.mask), "value_len": len(r.values),
            "checksum": xxhash.xxh3_64_intdigest(r.mask + r.values),
        } | r.lies  # fmt: skip
        if payload.flags & 1:
            body += _short(r, parts, name)
            name = r.name
        else:
            body += _long(r, parts)
        whole.update(r.mask + r.values)
        for section in (r.mask, r.values):
            sections += section + bytes(-len(section) % 8)
    if payload.flags & 1:
        body = whole.intdigest().to_bytes(8, "little") + body
    body += bytes(-len(body) % 8)
    start = _PREFIX.pack(
        b"\x89SPU\r\n\x1a\n", 1, payload.minor & 255, payload.flags & 0xFFFF, 64 + len(body),
        len(payload.records), 0, 64 + len(body) + len(sections), 0, payload.digest,
    )  # fmt: skip
    checksum = xxhash.xxh3_64_intdigest(start + body)
    return start + checksum.to_bytes(8, "little") + body + sections


def _long(r: Record, parts: dict[str, int]) -> bytes:
    fixed = _RECORD.pack(
        parts["name_len"] & 0xFFFF, parts["parameter_len"] & 0xFFFF, r.dtype & 255,
        parts["ndim"] & 255, r.mask_code & 255, r.value_code & 255, r.k & 2**64 - 1,
        parts["mask_len"] & 2**64 - 1, parts["value_len"] & 2**64 - 1, parts["checksum"],
    )  # fmt: skip
    shape = struct.pack(f"<{len(r.shape)}I", *(n & 2**32 - 1 for n in r.shape))
    return fixed + shape + r.parameters + r.name


def _short(r: Record, parts: dict[str, int], before: bytes) -> bytes:
    shared = parts.get("shared", 0)
    if "shared" not in parts:
        while shared < min(len(before), len(r.name), 255) and before[shared] == r.name[shared]:
            shared += 1
    fixed = bytes((shared & 255, r.dtype & 255, parts["ndim"] & 255, r.mask_code & 255,
                   r.value_code & 255))  # fmt: skip
    rest = r.name[shared:]
    suffix_len = parts["name_len"] if "name_len" in r.lies else len(rest)
    numbers = (*r.shape, r.k, parts["mask_len"], parts["value_len"], parts["parameter_len"],
               suffix_len)  # fmt: skip
    return fixed + b"".join(_varint(max(n, 0)) for n in numbers) + r.parameters + rest


def _number(dice: random.Random, old: int, most: int) -> int:
    return dice.choice(
        (
            dice.choice(INTERESTING), old + dice.choice((-8, -2, -1, 1, 2, 8)),
            old ^ 1 << dice.randrange(32), dice.randrange(64), dice.randrange(most),
        )
    )  # fmt: skip


def _bytes(dice: random.Random, old: bytes) -> bytes:
    data = bytearray(old)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << dice.randrange(8)
            case 1 if data:
                data[at % len(data)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
            case 2:
                data[at:at] = dice.randbytes(dice.choice((1, 1, 2, 4, 8)))
            case 3:
                del data[at : at + dice.choice((1, 1, 2, 4, 8))]
            case 4:
                data = data[:at]
            case _:
                data += data[at:][: dice.randrange(64)]
    return bytes(data[: 1 << 14])


def change(dice: random.Random, payload: Payload, others: list[Payload]) -> None:
    """Change one thing."""
    if not payload.records:
        payload.records.append(copy.deepcopy(dice.choice(dice.choice(others).records or [_EMPTY])))
        return
    record = dice.choice(payload.records)
    match dice.randrange(16):
        case 0:
            record.k = _number(dice, record.k, 2**64)
        case 1 if record.shape:
            at = dice.randrange(len(record.shape))
            record.shape[at] = _number(dice, record.shape[at], 2**32)
        case 2:
            record.mask_code = dice.choice((*range(11), 130, dice.randrange(256)))
        case 3:
            record.value_code = dice.choice((*range(6), 130, dice.randrange(256)))
        case 4:
            record.dtype = dice.choice((*range(10), 10, 200))
        case 5 | 6 | 7:
            record.mask = _bytes(dice, record.mask)
        case 8 | 9 | 10:
            record.values = _bytes(dice, record.values)
        case 11:
            record.parameters = _bytes(dice, record.parameters)
        case 12:
            # A section or a whole record of another payload.
            other = dice.choice(dice.choice(others).records or [_EMPTY])
            name = dice.choice(("mask", "values", "parameters", "shape", "k"))
            setattr(record, name, copy.copy(getattr(other, name)))
        case 13:
            payload.records.append(copy.deepcopy(dice.choice(payload.records)))
            payload.records[-1].name += b"2" * dice.randrange(2)
        case 14:
            names = ("name_len", "parameter_len", "ndim", "mask_len", "value_len", "shared")
            name = dice.choice(names)
            record.lies[name] = abs(_number(dice, 3, 2**16))
        case _:
            if dice.random() < 0.5:
                record.shape = [dice.choice((0, 1, 3, 17, 300)) for _ in range(dice.randrange(6))]
            else:
                payload.flags ^= 1 << dice.randrange(16)


_EMPTY = Record(b"e", b"", 0, [0], 0, 0, 0, b"", b"")


def check(data: bytes, bases: Bases, *, memory: bool) -> str:
    """Decode once, and return the outcome's name; raise if it is none that is allowed."""
    base = bases.get(data[40:56], {})
    signal.alarm(HANG_SECONDS)
    if memory:
        tracemalloc.start()
    try:
        try:
            state = codec.decode(data, base=base, max_bytes=MAX_BYTES)
        except CodecError as error:
            return type(error).__name__
        masks = codec.decode_masks(data, base=base)
        for name, tensor in state.items():
            assert masks[name].shape == tensor.shape
            whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            bits = tensor.contiguous().view(whole[tensor.element_size()])
            assert not bool(bits[~masks[name]].any())
        return "decoded"
    finally:
        signal.alarm(0)
        if memory:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= 2 * MAX_BYTES + SLACK_BYTES + 2 * len(data), f"{peak} bytes of memory"


def corpus() -> tuple[list[bytes], Bases]:
    """Payloads to start from, and the bases that some of them need."""
    paths = [
        *sorted((ROOT / "tests/golden").glob("*.spu")),
        *sorted((ROOT / "tests/fuzz").glob("*.spu")),
    ]
    states = [
        codec.decode((ROOT / f"tests/golden/{name}.spu").read_bytes())
        for name in ("base", "shared")
    ]
    # For the compiled kernels, which small tensors do not meet.
    random = torch.Generator().manual_seed(1)
    large = torch.randn(LARGE, generator=random)
    drawn = torch.rand(LARGE, generator=random)
    states.append({"large": large * (drawn < 0.2)})
    made = [codec.encode({"large": large * (drawn < kept)}) for kept in (0.02, 0.2, 0.5, 0.9)]
    moved = {"large": states[-1]["large"] * 1.01}
    made += [codec.encode(moved, base=states[-1], level=level)
             for level in ("fast", "balanced", "small")]  # fmt: skip
    payloads = [*(path.read_bytes() for path in paths), *made]
    return payloads, {codec.base_digest(s): s for s in states}


def work(seed: int, executions: int, seconds: float) -> dict[str, Any]:
    """Run so many executions, or so long."""
    signal.signal(signal.SIGALRM, _hang)
    # Once loaded they take all but small tensors.
    importlib.import_module("sparsekit.kernels.bitmap.cpu")
    dice = random.Random(seed)
    seeds, bases = corpus()
    apart = []
    for data in seeds:
        try:
            codec.inspect(data)
            apart.append(take_apart(data))
        except CodecError:
            continue
    counts: collections.Counter[str] = collections.Counter()
    found = []
    end = time.monotonic() + seconds
    torch.set_num_threads(1)
    for number in range(executions):
        if number % 256 == 0 and time.monotonic() > end:
            break
        if dice.random() < 0.05:
            data = _bytes(dice, dice.choice(seeds))
        else:
            payload = copy.deepcopy(dice.choice(apart))
            for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5))):
                change(dice, payload, apart)
            data = put_together(payload)
        try:
            counts[check(data, bases, memory=number % 64 == 0)] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            counts[f"FAILED {type(error).__name__}"] += 1
            FOUND.mkdir(parents=True, exist_ok=True)
            path = FOUND / f"{hashlib.sha256(data).hexdigest()[:16]}.spu"
            path.write_bytes(data)
            found.append(f"{path.name}: {type(error).__name__}: {error}"[:300])
            if len(found) >= 20:
                break
    return {"counts": dict(counts), "found": found}


def _hang(*_: Any) -> None:
    raise TimeoutError(f"no answer within {HANG_SECONDS} s")


def main() -> None:
    """Run on several processes and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executions", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    start = time.monotonic()
    share = -(-options.executions // options.processes)
    tasks = [(options.seed * 1000 + i, share, options.seconds) for i in range(options.processes)]
    # Forked before torch has started any thread.
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        results = pool.starmap(work, tasks)
    counts: collections.Counter[str] = collections.Counter()
    for result in results:
        counts.update(result["counts"])
    found = sorted({line for result in results for line in result["found"]})
    total = sum(counts.values())
    print(f"{total:,} executions in {time.monotonic() - start:.0f} s")
    for name, count in counts.most_common():
        print(f"  {count:10,} {name}")
    for line in found:
        print(line)
    if options.write and not found:
        report = {
            "executions": total, "seed": options.seed, "outcomes": dict(sorted(counts.items())),
            "seconds": round(time.monotonic() - start), "machine": describe(),
        }  # fmt: skip
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
