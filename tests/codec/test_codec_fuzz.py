"""What the fuzzer once found is refused as it should be, and the fuzzer sees what it must see."""

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparsekit import codec
from sparsekit.errors import CodecError

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
