"""What leans on a base: masks inside the base's, lossless differences, steps in a closed loop."""

import struct
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit import codec
from sparsekit.codec.based_codes import BLOCK
from sparsekit.codec.core import Level, MaskEncoding, Values
from sparsekit.errors import ArgumentError, BaseMismatchError, FormatError, ValueRangeError
from tests.codec import page_decoder, page_values
from tests.codec.memory import peak_bytes
from tests.codec.test_codec_hostile import GOOD, Payload, floats

N = 3 * BLOCK + 77
BASED_MASKS: tuple[MaskEncoding, ...] = ("same", "subset", "predicted")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(getattr(torch, f"int{8 * tensor.element_size()}"))


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(bits(left + 0), bits(right + 0))


def pruned(n: int, kept: float, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=random)
    return values * (torch.rand(n, generator=random) < kept)


def retrained(base: Tensor, move: float, seed: int = 1) -> Tensor:
    """The same non-zero elements, each changed by about that share of the mean."""
    random = torch.Generator().manual_seed(seed)
    step = move * torch.randn(base.numel(), generator=random) * base.std()
    return torch.where(base != 0, base + step.view(base.shape), base)


def repruned(state: Tensor, kept: float) -> tuple[Tensor, Tensor]:
    """Keep the largest."""
    k = int(kept * state.numel())
    mask = state.abs() >= state.abs().sort(descending=True).values[k - 1]
    return state * mask, mask


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize("encoding", ["auto", "bitmap", "rice", "csr", *BASED_MASKS])
def test_tensors_of_several_blocks_come_back(values: Values, encoding: MaskEncoding) -> None:
    base = {"w": pruned(N, 0.3), "still": torch.ones(5)}
    tensor, mask = repruned(retrained(base["w"], 0.05), 0.3 if encoding == "same" else 0.2)
    if encoding == "same":
        mask = base["w"] != 0
        tensor = retrained(base["w"], 0.05)
    state = {"w": tensor, "still": torch.full((5,), 2.0)}
    payload = codec.encode(
        state, masks={"w": mask}, base=base, values=values, mask_encoding=encoding
    )
    record = codec.inspect(payload).records[0]
    coded = "levels" if values.startswith("int") else "delta"
    assert record.value_encoding == coded
    assert record.mask_encoding == ("predicted" if encoding == "auto" else encoding)
    found = codec.decode(payload, base=base, template=state)
    assert torch.equal(codec.decode_masks(payload, base=base)["w"], mask)
    assert equal(found["w"] * ~mask, torch.zeros(N))
    if values == "lossless":
        assert equal(found["w"], tensor)
    elif coded == "delta":
        half = torch.bfloat16 if values == "bf16" else torch.float16
        assert equal(found["w"], tensor.to(half).float())
    else:
        step = (tensor - base["w"])[mask].abs().max() / (127 if values == "int8" else 7)
        spread = (tensor - base["w"])[mask].square().mean().sqrt()
        off = (found["w"] - tensor).abs()
        assert off[mask].square().mean().sqrt() < (0.02 if values == "int8" else 0.2) * spread
        assert off.max() < (max(step, 0.06 * spread) if values == "int8" else 3 * spread)
    stored = {"w": codec.decode(payload, base=base)["w"]}
    assert codec.base_digest(stored) == codec.base_digest({"w": found["w"]})


def any_floats() -> st.SearchStrategy[int]:
    special = [0, 1, 2**31, 0x7F800000, 0xFF800000, 0x7FC00001, 0x3F800000, 0x7F7FFFFF, 0x80000001]
    return st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(special))


def patterns(numbers: list[int]) -> Tensor:
    return torch.tensor([b - 2**32 if b >= 2**31 else b for b in numbers], dtype=torch.int32).view(
        torch.float32
    )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_differences_of_any_bits_lose_nothing(data: st.DataObject) -> None:
    n = data.draw(st.integers(32, 90))
    base = patterns(data.draw(st.lists(any_floats(), min_size=n, max_size=n)))
    # Near the base, so that differences pay off, with some numbers from anywhere.
    near = data.draw(st.lists(st.integers(-300, 300), min_size=n, max_size=n))
    state = (base.view(torch.int32) + torch.tensor(near, dtype=torch.int32)).view(torch.float32)
    for place in data.draw(st.lists(st.integers(0, n - 1), max_size=5)):
        state[place] = patterns([data.draw(any_floats())])[0]
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    state = torch.where(kept, state, 0.0)
    payload = codec.encode({"w": state}, masks={"w": kept}, base={"w": base})
    found = codec.decode(payload, base={"w": base})["w"]
    zero = state.view(torch.int32) == -(2**31)
    assert torch.equal(found.view(torch.int32), state.view(torch.int32).masked_fill(zero, 0))
    assert torch.equal(codec.decode_masks(payload, base={"w": base})["w"], kept)
    plain = {"w": page_values.Plain(0, (n,), list(range(n)), [int(b) % 2**32 for b in bits(base)])}
    again = page_decoder.read(payload, plain)[1]["w"]
    assert again.dense_bits() == [int(b) % 2**32 for b in bits(found)]


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_masks_inside_the_bases_come_back(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    dtype = data.draw(st.sampled_from(DTYPES))
    numbers = data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))
    base = (torch.tensor(numbers) * (3 if dtype.is_floating_point else 1)).to(dtype)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) & (base != 0)
    state = torch.where(kept, base, torch.zeros_like(base))
    for encoding in ("auto", *BASED_MASKS):
        try:
            payload = codec.encode(
                {"w": state}, masks={"w": kept}, base={"w": base}, mask_encoding=encoding
            )
        except ArgumentError:
            different = encoding == "same" or not dtype.is_floating_point
            same = bool((kept == (base != 0)).all())
            assert same or different
            continue
        assert torch.equal(codec.decode_masks(payload, base={"w": base})["w"], kept)
        assert equal(codec.decode(payload, base={"w": base})["w"], state)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_masks_beyond_the_bases_come_back(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    dtype = data.draw(st.sampled_from(DTYPES))
    numbers = data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))
    base = (torch.tensor(numbers) * (3 if dtype.is_floating_point else 1)).to(dtype)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    state = torch.where(kept, base, torch.zeros_like(base))
    encodings: tuple[MaskEncoding, ...] = ("auto", "ranked")
    for encoding in encodings:
        try:
            payload = codec.encode(
                {"w": state}, masks={"w": kept}, base={"w": base}, mask_encoding=encoding
            )
        except ArgumentError:
            assert encoding == "ranked"
            assert not dtype.is_floating_point
            continue
        used = codec.inspect(payload).records[0].mask_encoding
        assert encoding == "auto" or used in ("ranked", "dense", "all-zero")
        assert torch.equal(codec.decode_masks(payload, base={"w": base})["w"], kept)
        assert equal(codec.decode(payload, base={"w": base})["w"], state)


@pytest.mark.parametrize(("values", "kept", "most"), [("int8", 0.99, 0.13), ("int4", 0.93, 0.3)])
def test_zeros_that_rounding_left_spoil_no_mask(values: Values, kept: float, most: float) -> None:
    # As after the first model: small weights became zero, and the next purge keeps some of them.
    state = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    held = codec.decode(codec.encode({"w": state}, values=values))
    tensor, mask = repruned(retrained(state, 0.02), kept)
    assert bool(mask[held["w"] == 0].any())
    payload = codec.encode({"w": tensor}, masks={"w": mask}, base=held, values=values)
    record = codec.inspect(payload).records[0]
    assert record.mask_encoding == "ranked"
    assert 8 * record.mask_bytes / mask.numel() < most
    assert torch.equal(codec.decode_masks(payload, base=held)["w"], mask)


def test_a_purge_costs_less_than_naming_the_subset() -> None:
    base = pruned(200_000, 0.5)
    tensor, mask = repruned(retrained(base, 0.05), 0.4)
    sizes = {}
    for encoding in ("rice", "subset", "predicted"):
        payload = codec.encode(
            {"w": tensor}, masks={"w": mask}, base={"w": base}, mask_encoding=encoding
        )
        sizes[encoding] = codec.inspect(payload).mask_bytes
    assert sizes["predicted"] < 0.35 * sizes["subset"]
    assert sizes["subset"] < 0.5 * sizes["rice"]
    assert sizes["predicted"] * 8 < 0.1 * mask.numel()


@pytest.mark.parametrize(("values", "share"), [("int8", 0.02), ("int4", 0.25)])
def test_rounding_does_not_add_up_in_a_closed_loop(values: Values, share: float) -> None:
    state = torch.randn(5_000, generator=torch.Generator().manual_seed(5))
    held = codec.decode(codec.encode({"w": state}, values=values))
    errors = []
    for number in range(30):
        state = retrained(state, 0.05, seed=number)
        update = (state - held["w"]).square().mean().sqrt()
        payload = codec.encode({"w": state}, base=held, values=values)
        held = codec.decode(payload, base=held)
        errors.append(float((held["w"] - state).square().mean().sqrt() / update))
    assert max(errors[5:]) < share
    assert max(errors[20:]) < 1.2 * max(errors[5:15])


def test_steps_take_the_bits_that_they_promise() -> None:
    base, n = torch.randn(100_000, generator=torch.Generator().manual_seed(2)), 100_000
    state = {"w": retrained(base, 0.03)}
    wanted: dict[Values, tuple[float, float]] = {"int8": (6.0, 6.7), "int4": (2.5, 2.9)}
    for values, (least, most) in wanted.items():
        record = codec.inspect(codec.encode(state, base={"w": base}, values=values)).records[0]
        assert least < 8 * record.value_bytes / n < most


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -3.4e38])
def test_steps_to_infinity_are_refused(values: Values, number: float) -> None:
    base = {"w": torch.full((20,), 3.4e38)}
    state = {"w": base["w"].clone()}
    state["w"][3] = number
    with pytest.raises(ValueRangeError, match="'w' holds numbers beyond the range of 'int"):
        codec.encode(state, base=base, values=values)
    codec.encode(state, base=base)


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize("level", get_args(Level))
def test_unchanged_and_empty_tensors_come_back(values: Values, level: Level) -> None:
    base = {
        "same": torch.randn(300), "none": torch.zeros(0, 3), "zero": torch.zeros(400),
        "scalar": torch.tensor(2.0), "other shape": torch.ones(40), "other dtype": torch.ones(50),
        "integers": torch.arange(60),
    }  # fmt: skip
    state = base | {
        "other shape": torch.ones(8, 5), "other dtype": torch.ones(50, dtype=torch.float64),
        "new": torch.ones(70),
    }  # fmt: skip
    payload = codec.encode(state, base=base, values=values, level=level)
    found = codec.decode(payload, base=base, template=state)
    for name, tensor in state.items():
        if name == "same" and values in ("bf16", "fp16"):
            half = torch.bfloat16 if values == "bf16" else torch.float16
            tensor = tensor.to(half).float()
        assert equal(found[name], tensor), name


def test_an_unchanged_state_takes_next_to_nothing() -> None:
    base = {"w": pruned(100_000, 0.1)}
    payload = codec.encode(base, base=base)
    assert codec.inspect(payload).mask_bytes == 0
    assert len(payload) < 250


def test_only_what_needs_the_base_names_it() -> None:
    base = {"w": pruned(5_000, 0.5)}
    other = {"w": pruned(5_000, 0.4, seed=9)}
    alone = codec.encode(other, level="fast", base=base)
    assert codec.inspect(alone).base_digest is None
    based = codec.encode(retrained_state(base), base=base)
    for wrong in (None, other, {}):
        with pytest.raises(BaseMismatchError, match="base"):
            codec.decode(based, base=wrong)
        with pytest.raises(BaseMismatchError, match="base"):
            codec.decode_masks(based, base=wrong)


def retrained_state(base: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: retrained(tensor, 0.01) for name, tensor in base.items()}


@pytest.mark.parametrize("values", get_args(Values))
@pytest.mark.parametrize("encoding", BASED_MASKS)
def test_decoding_takes_little_beside_its_result(values: Values, encoding: MaskEncoding) -> None:
    base = {"w": pruned(1_500_000, 0.5)}
    state, mask = retrained(base["w"], 0.05), base["w"] != 0
    if encoding != "same":
        state, mask = repruned(state, 0.4)
    payload = codec.encode(
        {"w": state}, masks={"w": mask}, base=base, values=values, mask_encoding=encoding
    )
    codec.decode(payload, base=base)
    peak = peak_bytes(lambda: codec.decode(payload, base=base))
    assert 4 * state.numel() <= peak < 4 * state.numel() + 2**20, peak - 4 * state.numel()


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_steps_survive_flush_to_zero(values: Values) -> None:
    base = torch.randn(400)
    base[5:9] = torch.tensor([1e-40, -1e-42, -0.0, 3e-39])
    state = base.clone()
    state[20:] += 0.1 * torch.randn(380)
    payload = codec.encode({"w": state}, base={"w": base}, values=values)
    assert codec.inspect(payload).records[0].value_encoding == "levels"
    wanted = codec.decode(payload, base={"w": base})["w"]
    assert equal(wanted[5:9], base[5:9])
    torch.set_flush_denormal(True)
    try:
        found = codec.decode(payload, base={"w": base})["w"]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(found), bits(wanted))
    # Steps this small are not for levels.
    small = {"w": torch.linspace(1e-38, 2e-38, 64)}
    assert codec.inspect(codec.encode(small, values=values)).records[0].value_encoding == "raw"


@pytest.mark.parametrize("encoding", ["subset", "predicted", "ranked"])
@pytest.mark.parametrize("values", ["lossless", "int8"])
def test_dense_masks_inside_a_base_take_little_memory(
    values: Values, encoding: MaskEncoding
) -> None:
    random = torch.Generator().manual_seed(8)
    base = torch.randn(1_000_000, generator=random)
    mask = torch.rand(1_000_000, generator=random) < 0.97
    state = {"w": retrained(base, 0.05) * mask}
    payload = codec.encode(
        state, masks={"w": mask}, base={"w": base}, values=values, mask_encoding=encoding
    )
    codec.decode(payload, base={"w": base})
    peak = peak_bytes(lambda: codec.decode(payload, base={"w": base}))
    assert peak < 4 * mask.numel() + 2**20, (peak - 4 * mask.numel()) / 2**10


@pytest.mark.parametrize(
    ("base", "threshold", "match"),
    [
        pytest.param(torch.tensor([1, 0]), 1, "integers", id="integers"),
        pytest.param(torch.tensor([1.0, 0.0]), 2**31, "no number", id="threshold"),
        pytest.param(torch.tensor([[1.0, 0.0]]), 1, "another shape", id="shape"),
    ],
)
def test_ranked_masks_need_a_base_of_floats(base: Tensor, threshold: int, match: str) -> None:
    record = replace(
        GOOD,
        mask_code=10,
        k=1,
        mask=bytes(10),
        values=floats(1),
        params=struct.pack("<Q", threshold),
    )  # fmt: skip
    payload = Payload((record,), digest=codec.base_digest({"w": base})).bytes()
    for function in (codec.decode, codec.decode_masks):
        with pytest.raises(FormatError, match=match):
            function(payload, base={"w": base})
