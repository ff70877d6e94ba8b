"""Payloads that cost more than they seem to: many records, long names, blocks of nothing."""

import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from sparsekit import codec
from sparsekit.codec import frames
from sparsekit.codec.arrays import decode_arrays
from sparsekit.errors import BudgetError, FormatError, TemplateError
from tests.codec.test_codec_hostile import Forged, Payload

MANY = Payload(tuple(Forged(shape=(0,), name=b"%d" % i) for i in range(65_536))).bytes()
LONG = Payload(tuple(Forged(shape=(0,), name=b"%d" % i + b"x" * 60_000) for i in range(99))).bytes()


@pytest.mark.parametrize("payload", [MANY, LONG], ids=["many", "long"])
@pytest.mark.parametrize("function", [codec.decode, decode_arrays])
def test_records_count_against_the_budget(payload: bytes, function: object) -> None:
    assert callable(function)
    tracemalloc.start()
    try:
        with pytest.raises(BudgetError, match="records in a header"):
            function(payload, max_bytes=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
    assert function(payload, max_bytes=2**28)


def test_a_template_allows_as_many_records_as_it_has() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BudgetError, match="65536 records"):
            codec.decode(MANY, template={"w": torch.ones(2)})
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
    state = {f"layer {i} with a long name, such as networks have": torch.ones(1, 1, 1, 1)
             for i in range(2000)}  # fmt: skip
    payload = codec.encode(state)
    assert codec.decode(payload, template=state).keys() == state.keys()
    del state["layer 7 with a long name, such as networks have"]
    with pytest.raises(TemplateError, match="layer 7"):
        codec.decode(payload, template=state)


def test_a_budget_is_for_records_and_elements_together() -> None:
    state = {str(i): torch.ones(1) for i in range(1000)}
    payload = codec.encode(state | {"large": torch.ones(2**18)})
    with pytest.raises(BudgetError, match="decodes to"):
        codec.decode(payload, max_bytes=2**20 + 4000)
    assert len(codec.decode(payload, max_bytes=2**21)) == 1001
    few = {str(i): torch.ones(1) for i in range(400)}
    assert len(codec.decode(codec.encode(few), max_bytes=1600)) == 400


def frame_of(blocks: int) -> bytes:
    """A frame of 2**17 bytes after empty blocks."""
    data = np.random.default_rng(0).integers(0, 9, 2**17, np.uint8)
    good = zstandard.ZstdCompressor(level=1).compress(data.tobytes())
    at = zstandard.frame_header_size(good)
    return good[:at] + bytes(3 * blocks) + good[at:]


def test_empty_blocks_are_refused_at_once() -> None:
    assert frames.reader(memoryview(frame_of(100)), 2**17)(2**17, True).size == 2**17
    with pytest.raises(FormatError, match="too many blocks"):
        frames.reader(memoryview(frame_of(10**6)), 2**17)


def test_frames_that_are_written_have_few_blocks() -> None:
    dice = np.random.default_rng(0)
    for size in (1, 100, 4096, 2**17 + 1, 2**21):
        for repeats in (False, True):
            plain = np.sort(dice.geometric(0.3, size).astype(np.uint8))
            frame = frames.compress(plain, repeats=repeats)
            found = frames.plane_reader(memoryview(frame), size)(size, True)
            assert np.array_equal(found, plain)
