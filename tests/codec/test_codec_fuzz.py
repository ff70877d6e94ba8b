"""What the fuzzer once found is refused as it should be, and the fuzzer sees what it must see."""

import copy
import importlib.util
import random
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from zstandard import ZstdError

from sparsekit import codec
from sparsekit.errors import CodecError
from tests.codec import page_decoder, page_values

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_codec", ROOT / "tools/fuzz_codec.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_codec"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted((ROOT / "tests/fuzz").glob("*.spu")), ids=lambda p: p.stem)
def test_what_was_found_is_refused(path: Path) -> None:
    for function in (codec.decode, codec.decode_masks):
        try:
            function(path.read_bytes(), base={})
        except CodecError:
            continue
    with pytest.raises(CodecError):
        codec.decode(path.read_bytes(), base={})


def test_payloads_are_taken_apart_and_put_together(fuzz: ModuleType) -> None:
    for data in fuzz.corpus()[0]:
        try:
            codec.inspect(data)
        except CodecError:
            continue
        again = fuzz.put_together(fuzz.take_apart(data))
        # The round is not among what is changed.
        assert again[:32] == data[:32]
        assert again[64:] == data[64:]


def test_some_thousand_executions_find_nothing(fuzz: ModuleType) -> None:
    result = fuzz.work(7, 4000, 1e9)
    assert result["found"] == []
    assert sum(result["counts"].values()) == 4000
    assert result["counts"]["decoded"] > 200


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        pytest.param(lambda *_, **__: [][0], IndexError, id="other-error"),
        pytest.param(lambda *_, **__: {"w": torch.ones(9)}, AssertionError, id="outside-mask"),
        pytest.param(lambda *_, **__: bytearray(1 << 23), AssertionError, id="memory"),
    ],
)
def test_the_fuzzer_sees(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, broken: Any, error: type[Exception]
) -> None:
    monkeypatch.setattr(codec, "decode", broken)
    monkeypatch.setattr(codec, "decode_masks", lambda *_, **__: {"w": torch.zeros(9).bool()})
    with pytest.raises((error, AttributeError)) as caught:
        fuzz.check(b"", {}, memory=True)
    assert caught.type is error


def test_every_kind_of_change_gives_a_payload_that_can_be_written(fuzz: ModuleType) -> None:
    apart = [
        fuzz.take_apart((ROOT / f"tests/golden/{n}.spu").read_bytes()) for n in ("rice", "same")
    ]
    dice = random.Random(1)
    for _ in range(2000):
        fuzz.change(dice, apart[0], apart)
        del apart[0].records[6:]
        assert fuzz.put_together(apart[0]).startswith(b"\x89SPU")


NEWER = ("subset", "predicted", "delta", "delta-bf16", "delta-fp16", "int8", "int4", "int4-alone")


def read_by_the_page(data: bytes, bases: Any) -> Any:
    """Names, kept positions and bits as the page's decoder has them; None if it refuses."""
    base = bases.get(data[40:56])
    plain = None
    if base is not None:
        plain = page_decoder.read(codec.encode(base, mask_encoding="dense"))[1]
    try:
        state = page_decoder.read(data, plain)[1]
    except (page_values.Refused, AssertionError, IndexError, struct.error, ZstdError,
            OverflowError, ValueError):  # fmt: skip
        return None
    return {name: (t.kept, t.dense_bits()) for name, t in state.items()}


def read_by_us(data: bytes, bases: Any) -> tuple[Any, str]:
    """Return the same of the codec, and why it refuses."""
    base = bases.get(data[40:56], {})
    try:
        state, masks = codec.decode(data, base=base), codec.decode_masks(data, base=base)
    except CodecError as error:
        return None, str(error)
    found = {}
    for name, tensor in state.items():
        width = 8 * tensor.itemsize
        integers = tensor.reshape(-1).view(getattr(torch, f"int{width}")).tolist()
        kept = masks[name].reshape(-1).nonzero().flatten().tolist()
        found[name] = (kept, [i % 2**width for i in integers])
    return found, ""


@pytest.mark.parametrize("name", NEWER)
def test_both_decoders_take_and_refuse_the_same(fuzz: ModuleType, name: str) -> None:
    bases = fuzz.corpus()[1]
    whole = fuzz.take_apart((ROOT / f"tests/golden/{name}.spu").read_bytes())
    dice = random.Random(name)
    taken = 0
    for _ in range(150):
        payload = copy.deepcopy(whole)
        payload.records = [dice.choice(payload.records)]
        record = payload.records[0]
        part = dice.choice(("mask", "values", "parameters"))
        setattr(record, part, fuzz._bytes(dice, getattr(record, part)))
        data = fuzz.put_together(payload)
        found, refusal = read_by_us(data, bases)
        assert found == read_by_the_page(data, bases), refusal
        taken += found is not None
    assert taken > 3
