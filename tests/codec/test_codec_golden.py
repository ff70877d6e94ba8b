"""Golden payloads: their bytes are pinned, and no damage to them goes unnoticed."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import codec
from sparsekit.errors import CodecError, TruncatedError

GOLDEN = Path(__file__).parents[1] / "golden"
CONTENTS = json.loads((GOLDEN / "contents.json").read_text(encoding="utf-8"))
NAMES = sorted(CONTENTS)
NEWER = {"rice", "bitmap-zstd", "subset", "predicted", "split", "half", "levels", "delta"}
"""Encodings that format 1.0 does not have."""


def integers(tensor: Tensor) -> Tensor:
    """Bit patterns of a tensor as signed integers of the same width."""
    return tensor.reshape(-1).view(getattr(torch, f"int{8 * tensor.element_size()}"))


def expected_tensor(entry: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tensor and mask that an entry of contents.json describes."""
    dtype = getattr(torch, entry["dtype"])
    n = math.prod(entry["shape"])
    positions = list(range(n)) if entry["positions"] == "all" else entry["positions"]
    tensor = torch.zeros(n, dtype=dtype)
    mask = torch.zeros(n, dtype=torch.bool)
    width = 8 * tensor.element_size()
    for position, bits in zip(positions, entry["bits"], strict=True):
        signed = bits - 2**width if bits >= 2 ** (width - 1) else bits
        integers(tensor)[position] = signed
        mask[position] = True
    return tensor.reshape(entry["shape"]), mask.reshape(entry["shape"])


def expected_state(name: str) -> dict[str, Tensor]:
    return {key: expected_tensor(entry)[0] for key, entry in CONTENTS[name]["tensors"].items()}


def given_masks(name: str) -> dict[str, Tensor]:
    entries = CONTENTS[name]["tensors"].items()
    return {key: expected_tensor(entry)[1] for key, entry in entries if entry["masked"]}


def base_of(name: str) -> dict[str, Tensor] | None:
    base = CONTENTS[name].get("base")
    return expected_state(base) if base else None


def read(name: str) -> bytes:
    return (GOLDEN / f"{name}.spu").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_golden_payload_decodes_to_its_description(name: str) -> None:
    state = codec.decode(read(name), base=base_of(name))

    expected = expected_state(name)
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert state[key].shape == tensor.shape
        assert torch.equal(integers(state[key]), integers(tensor))


@pytest.mark.parametrize("name", NAMES)
def test_golden_payload_has_the_described_masks(name: str) -> None:
    masks = codec.decode_masks(read(name), base=base_of(name))

    assert list(masks) == list(CONTENTS[name]["tensors"])
    for key, entry in CONTENTS[name]["tensors"].items():
        assert masks[key].dtype == torch.bool
        assert torch.equal(masks[key], expected_tensor(entry)[1])


@pytest.mark.parametrize("name", NAMES)
def test_encode_writes_the_golden_bytes(name: str) -> None:
    entry = CONTENTS[name]
    payload = codec.encode(
        expected_state(name),
        masks=given_masks(name) or None,
        base=base_of(name),
        mask_encoding=entry.get("mask_encoding", "auto"),
        level=entry.get("level", "balanced"),
        values=entry.get("values", "lossless"),
        round=entry.get("round", 0),
    )
    assert payload == read(name)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_describes_a_golden_payload_without_its_base(name: str) -> None:
    payload = read(name)
    info = codec.inspect(payload)

    codes = {code for r in info.records for code in (r.mask_encoding, r.value_encoding)}
    newest = "ranked" in codes or CONTENTS[name].get("level") == "small"
    assert info.version == (1, 2 if newest else int(bool(codes & NEWER)))
    assert info.round == CONTENTS[name].get("round", 0)
    base = base_of(name)
    assert info.base_digest == (codec.base_digest(base) if base else None)
    assert info.payload_bytes == len(payload)
    for record, (key, entry) in zip(info.records, CONTENTS[name]["tensors"].items(), strict=True):
        assert (record.name, record.dtype, list(record.shape)) == (
            key,
            entry["dtype"],
            entry["shape"],
        )
        assert record.n == math.prod(entry["shape"])
        assert record.k == len(entry["bits"])
    assert 0 <= info.padding_bytes < 16 * max(len(info.records), 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_change_of_one_byte_is_refused(name: str) -> None:
    payload = read(name)
    base = base_of(name)
    unnoticed = []
    for at in range(len(payload)):
        for flip in (0x01, 0x10, 0x80, 0xFF):
            damaged = bytearray(payload)
            damaged[at] ^= flip
            for function in (codec.decode, codec.decode_masks):
                try:
                    function(damaged, base=base)
                except CodecError:
                    continue
                unnoticed.append((at, flip, function.__name__))
    assert unnoticed == []


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_refused(name: str) -> None:
    payload = read(name)
    base = base_of(name)
    for length in range(len(payload)):
        with pytest.raises(TruncatedError):
            codec.decode(payload[:length], base=base)
        with pytest.raises(TruncatedError):
            codec.inspect(payload[:length])


WITHOUT_TORCH = """
import pathlib, sys, types
sys.modules["torch"] = None
root = pathlib.Path(sys.argv[1])
for name in ("sparsekit", "sparsekit.codec"):
    package = types.ModuleType(name)
    package.__path__ = [str(root.joinpath(*name.split(".")))]
    sys.modules[name] = package
from sparsekit.codec import decoding, wire
payload = memoryview(pathlib.Path(sys.argv[2]).read_bytes())
for placed in wire.parse(payload).records:
    elements = decoding.decode_record(payload, placed, {})
    print(placed.record.name, *elements.bits.tolist())
"""


def test_the_core_decodes_without_torch() -> None:
    root = GOLDEN.parents[1]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(root), str(GOLDEN / "example.spu")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stderr == ""
    expected = [
        " ".join(map(str, [key, *(value % 2**32 for value in integers(tensor).tolist())]))
        for key, tensor in expected_state("example").items()
    ]
    assert result.stdout.splitlines() == expected


@pytest.mark.parametrize("name", NAMES)
def test_trailing_bytes_are_refused(name: str) -> None:
    with pytest.raises(CodecError, match="1 bytes follow"):
        codec.decode(read(name) + b"\0", base=base_of(name))
