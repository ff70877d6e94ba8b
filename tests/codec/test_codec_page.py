"""The page docs/wire-format.md says all that a reader needs."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.codec.page_decoder import read
from tests.codec.page_values import DTYPES, Refused

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONTENTS = json.loads((GOLDEN / "contents.json").read_text(encoding="utf-8"))


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
