"""Wrong arguments, templates, budgets and bases: the text says which, what and why."""

import re
from typing import Any

import pytest
import torch

from sparsekit import codec
from sparsekit.codec.records import DTYPE_BY_NAME, MaskCode, Record, ValueCode
from sparsekit.codec.wire import pack_header, section_checksum
from sparsekit.errors import (
    ArgumentError,
    ArgumentTypeError,
    BaseMismatchError,
    BudgetError,
    FormatError,
    SparsekitError,
    TemplateError,
    TruncatedError,
)

EYE = torch.eye(4)
STATE = {"w": EYE, "b": torch.ones(2)}


@pytest.mark.parametrize(
    ("state", "options", "error", "match"),
    [
        pytest.param([EYE], {}, ArgumentTypeError, "state: expected a mapping", id="list"),
        pytest.param({1: EYE}, {}, ArgumentTypeError, "names of type str, got int", id="name"),
        pytest.param({"w": [1]}, {}, ArgumentTypeError, "tensor for 'w', got list", id="value"),
        pytest.param({"\udc80": EYE}, {}, ArgumentError, "cannot be UTF-8", id="surrogate"),
        pytest.param({"a\0": EYE}, {}, ArgumentError, "none of them zero", id="zero-byte"),
        pytest.param({"a" * 65_536: EYE}, {}, ArgumentError, "at most 65535", id="long-name"),
        pytest.param(
            {"w": EYE.to(torch.complex64)}, {}, ArgumentTypeError, "complex64", id="complex"
        ),
        pytest.param({"w": EYE.to_sparse()}, {}, ArgumentTypeError, "sparse_coo", id="sparse"),
        pytest.param({"w": EYE.to("meta")}, {}, ArgumentError, "meta tensor", id="meta"),
        pytest.param({"w": torch.ones((1,) * 17)}, {}, ArgumentError, "17 dimensions", id="17-d"),
        pytest.param(STATE, {"masks": [1]}, ArgumentTypeError, "masks: expected a map", id="masks"),
        pytest.param(
            STATE, {"masks": {"x": EYE > 0}}, ArgumentError, "'x' is not in the state", id="stray"
        ),
        pytest.param(STATE, {"masks": {"w": EYE}}, ArgumentTypeError, "bool tensor", id="float"),
        pytest.param(
            STATE, {"masks": {"w": None}}, ArgumentTypeError, "masks: expected a ten", id="no-mask"
        ),
        pytest.param(
            STATE, {"masks": {"w": EYE[:2] > 0}}, ArgumentError,
            r"masks: expected shape \(4, 4\) for 'w', got \(2, 4\)", id="mask-shape",
        ),
        pytest.param(
            STATE, {"masks": {"w": EYE.roll(1, 0) > 0}}, ArgumentError,
            "masks: 'w' has 4 non-zero values outside its mask", id="outside",
        ),
        pytest.param(STATE, {"base": [1]}, ArgumentTypeError, "base: expected a map", id="base"),
        pytest.param(
            STATE, {"level": "best"}, ArgumentError, "level: .* 'small', got 'best'", id="level"
        ),
        pytest.param(
            {"w": torch.full((16,), float("inf"))}, {"values": "int8"}, ArgumentError,
            "'w' holds numbers beyond the range of 'int8'", id="int8-infinity",
        ),
        pytest.param(
            STATE, {"mask_encoding": "subset"}, ArgumentError, "'subset' needs a base",
            id="subset-alone",
        ),
        pytest.param(
            STATE, {"mask_encoding": "predicted", "base": {}}, ArgumentError,
            "does not follow from the base tensor", id="predicted-from-nothing",
        ),
        pytest.param(STATE, {"values": "fp8"}, ArgumentError, "one of 'lossless'", id="values"),
        pytest.param(
            STATE, {"mask_encoding": "lzma"}, ArgumentError, "mask_encoding: expected", id="lzma"
        ),
        pytest.param(STATE, {"mask_encoding": "same"}, ArgumentError, "needs a base", id="same"),
        pytest.param(
            STATE, {"mask_encoding": "same", "base": {"w": EYE.T.roll(1)}}, ArgumentError,
            "'same' cannot hold 'w'", id="same-other",
        ),
        pytest.param(
            STATE, {"mask_encoding": "dense", "masks": {"w": EYE > 0}}, ArgumentError,
            "'dense' would lose the mask of 'w', which keeps 4 of 16", id="dense",
        ),
        pytest.param(STATE, {"round": -1}, ArgumentError, "round: expected 0 to", id="round-low"),
        pytest.param(STATE, {"round": 2**64}, ArgumentError, "round: expected", id="round-high"),
        pytest.param(STATE, {"round": 1.0}, ArgumentTypeError, "an int, got float", id="round"),
    ],
)  # fmt: skip
def test_encode_refuses(
    state: Any, options: dict[str, Any], error: type[SparsekitError], match: str
) -> None:
    with pytest.raises(error, match=match):
        codec.encode(state, **options)


def test_dense_on_request_keeps_the_zeros() -> None:
    payload = codec.encode({"w": EYE}, mask_encoding="dense")
    assert codec.inspect(payload).records[0].mask_encoding == "dense"
    assert torch.equal(codec.decode(payload)["w"], EYE)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        pytest.param({"w": EYE}, "has 'b', which the template lacks", id="more"),
        pytest.param({**STATE, "x": EYE}, "lacks 'x', which the template has", id="fewer"),
        pytest.param(
            {"w": EYE.reshape(2, 8), "b": STATE["b"]},
            re.escape("expected 'w' as float32 (2, 8), got float32 (4, 4)"), id="shape",
        ),
        pytest.param(
            {"w": EYE, "b": STATE["b"].to(torch.int32)},
            re.escape("expected 'b' as int32 (2,), got float32 (2,)"), id="dtype",
        ),
    ],
)  # fmt: skip
def test_a_template_must_match(template: dict[str, torch.Tensor], match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        codec.decode(codec.encode(STATE), template=template)


def test_a_template_may_be_reordered_and_without_values() -> None:
    template = {"b": torch.empty(2, device="meta"), "w": torch.empty(4, 4, device="meta")}
    state = codec.decode(codec.encode(STATE), template=template)
    assert list(state) == ["w", "b"]
    assert torch.equal(state["w"], EYE)


@pytest.mark.parametrize("template", [None, STATE], ids=["alone", "with-template"])
def test_the_budget_is_exact(template: dict[str, torch.Tensor] | None) -> None:
    payload = codec.encode(STATE)
    needed = 4 * (16 + 2)
    assert len(codec.decode(payload, template=template, max_bytes=needed)) == 2
    with pytest.raises(BudgetError, match=f"decodes to {needed} bytes, the limit is {needed - 1}"):
        codec.decode(payload, template=template, max_bytes=needed - 1)


def test_without_a_budget_the_limit_is_four_gib() -> None:
    def zeros(name: str, shape: tuple[int, ...]) -> Record:
        checksum = section_checksum(b"")
        int8 = DTYPE_BY_NAME["int8"]
        return Record(name, int8, shape, MaskCode.ALL_ZERO, ValueCode.RAW, 0, 0, 0, checksum)

    records = [zeros("w", (2**16, 2**16)), zeros("one more", ())]
    payload = pack_header(records, round=0, base_digest=bytes(16))
    for function in (codec.decode, codec.decode_masks):
        with pytest.raises(BudgetError, match="4294967297 bytes, the limit is 4294967296"):
            function(payload)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        pytest.param({"max_bytes": -1}, ArgumentError, "max_bytes: expected 0", id="negative"),
        pytest.param({"max_bytes": 1e9}, ArgumentTypeError, "an int, got float", id="float"),
        pytest.param({"max_bytes": True}, ArgumentTypeError, "an int, got bool", id="bool"),
        pytest.param({"template": 3}, ArgumentTypeError, "template: expected a map", id="template"),
        pytest.param(
            {"template": {"w": 1, "b": 2}}, ArgumentTypeError, "template: .* got int", id="values"
        ),
    ],
)
def test_decode_refuses_wrong_arguments(
    options: dict[str, Any], error: type[SparsekitError], match: str
) -> None:
    with pytest.raises(error, match=match):
        codec.decode(codec.encode(STATE), **options)


@pytest.mark.parametrize("function", [codec.decode, codec.decode_masks, codec.inspect])
def test_other_things_than_bytes_are_refused(function: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="payload: expected bytes, bytearray or memoryview"):
        function("a text")
    with pytest.raises(TruncatedError, match="expected at least 64 bytes, got 0"):
        function(b"")
    with pytest.raises(FormatError, match="magic"):
        function(b"PK\x03\x04")


@pytest.mark.parametrize("function", [codec.decode, codec.decode_masks])
def test_a_missing_or_other_base_is_told(function: Any) -> None:
    base = {"w": 2 * EYE, "b": torch.ones(2)}
    payload = codec.encode(STATE, base=base)
    assert torch.equal(function(payload, base=base)["w"] != 0, EYE != 0)
    with pytest.raises(BaseMismatchError, match=f"{codec.base_digest(base).hex()}, but none"):
        function(payload)
    for other in ({"w": EYE}, {**base, "b": torch.zeros(2)}, {}):
        with pytest.raises(BaseMismatchError, match="ask the sender for a payload without a base"):
            function(payload, base=other)


def test_an_unneeded_base_is_not_looked_at() -> None:
    payload = codec.encode(STATE)
    assert torch.equal(codec.decode(payload, base={"x": EYE.to_sparse()})["w"], EYE)
