"""float32 values that travel as 16-bit floats: torch's rounding, exact reading, bytes, refusals."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekit import codec
from sparsekit.codec import half
from sparsekit.codec.core import Level, Values
from sparsekit.errors import ArgumentError, FormatError
from tests.codec.test_codec_hostile import Forged, Payload, refused

KINDS: dict[Values, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("values", KINDS)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_rounding_is_torchs(values: Values, bits: list[int]) -> None:
    kind = str(KINDS[values]).removeprefix("torch.")
    patterns = np.array(bits, np.uint32)
    floats = torch.from_numpy(patterns.view(np.float32).copy())
    rounded = floats.to(KINDS[values])
    narrowed = half.narrow(patterns, kind)
    is_nan = torch.isnan(floats).numpy()
    assert np.array_equal(
        narrowed[~is_nan], rounded.view(torch.int16).numpy().view(np.uint16)[~is_nan]
    )
    found = torch.from_numpy(half.widen(narrowed, kind).view(np.float32).copy())
    assert torch.equal(found[~is_nan], rounded.float()[~is_nan])
    assert bool(torch.isnan(found[is_nan]).all())


@pytest.mark.parametrize("level", ["fast", "balanced"])
@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("n", [0, 1, 100, 40_000])
def test_states_come_back_rounded(values: Values, n: int, level: Level) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(n, 3, generator=random)
    weight = torch.where(weight.abs() > 1, weight, 0.0)
    state = {
        "w": weight, "b": torch.randn(5, generator=random), "d": weight.double(),
        "h": weight.bfloat16(), "n": torch.arange(7),
    }  # fmt: skip
    masks = {"w": weight != 0}
    payload = codec.encode(state, masks=masks, values=values, level=level)
    found = codec.decode(payload, template=state)
    assert torch.equal(found["w"], weight.to(KINDS[values]).float())
    assert torch.equal(found["b"], state["b"].to(KINDS[values]).float())
    for name in ("d", "h", "n"):
        assert torch.equal(found[name], state[name])
    assert torch.equal(codec.decode_masks(payload)["w"], masks["w"])
    # Rounding again changes nothing, so that both ends can hold the decoded state.
    assert codec.encode(found, masks=masks, values=values, level=level) == payload


def test_bytes_are_halved() -> None:
    random = torch.Generator().manual_seed(2)
    weight = torch.randn(300, 1000, generator=random)
    state = {"w": torch.where(weight.abs() > 1.6, weight, 0.0)}
    sizes = {
        values: codec.inspect(codec.encode(state, values=values)).value_bytes
        for values in ("lossless", "bf16", "fp16")
    }
    assert sizes["bf16"] < 0.4 * sizes["lossless"]
    assert sizes["fp16"] < 0.65 * sizes["lossless"]


def test_a_weight_that_rounds_to_zero_stays_kept() -> None:
    state = {"w": torch.tensor([0.0, 1e-9, -1e-9, 1.0])}
    payload = codec.encode(state, masks={"w": state["w"] != 0}, values="fp16")
    found = codec.decode(payload)["w"]
    assert found.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert not bool(torch.signbit(found).any())
    assert codec.decode_masks(payload)["w"].tolist() == [False, True, True, True]


def test_what_fp16_cannot_hold_is_refused() -> None:
    for state in ({"w": torch.tensor([65_520.0])}, {"w": torch.tensor([1.0, -1e30])}):
        with pytest.raises(ArgumentError, match="'w' holds numbers beyond the range"):
            codec.encode(state, values="fp16")
    special = {"w": torch.tensor([65_519.0, float("inf"), float("nan")])}
    found = codec.decode(codec.encode(special, values="fp16"))["w"]
    assert found[:2].tolist() == [65_504.0, float("inf")]
    assert bool(torch.isnan(found[2]))
    largest = {"w": torch.tensor([3.4028234663852886e38])}
    with pytest.raises(ArgumentError, match="beyond the range of 'bf16'"):
        codec.encode(largest, values="bf16")


def record(values: bytes, parameters: bytes, dtype: int = 0) -> Forged:
    return Forged(b"", values, k=3, shape=(3,), value_code=2, params=parameters, dtype=dtype)


def test_the_forger_writes_what_the_page_says() -> None:
    numbers = struct.pack("<3e", 1.0, -2.5, 65504.0)
    found = codec.decode(Payload((record(numbers, bytes(7)),)).bytes())["w"]
    assert found.tolist() == [1.0, -2.5, 65504.0]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        pytest.param(record(bytes(6), bytes(6)), "take 7 bytes", id="six-parameters"),
        pytest.param(record(bytes(6), b"\x02" + bytes(6)), "not possible", id="kind"),
        pytest.param(record(bytes(6), bytes(7), dtype=6), "not possible", id="int32"),
        pytest.param(record(bytes(5), bytes(7)), "value section of 6 bytes", id="short"),
        pytest.param(record(bytes(6), b"\0\2" + bytes(5)), "not possible", id="mode"),
        pytest.param(
            record(bytes(9), b"\0\1\0\3\0\0\0"), "value section of 4 to 6", id="split-long"
        ),
    ],
)
def test_bad_half_sections_are_refused(bad: Forged, match: str) -> None:
    refused(Payload((bad,)), FormatError, match)
