"""The codec on tensors that are compacted where they are: the same bytes, the same values."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import codec
from sparsekit.codec import crossing, on_device, wire
from sparsekit.errors import ArgumentError, FormatError
from sparsekit.ops import explain

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16,
          torch.int32, torch.int64, torch.uint8]  # fmt: skip


@contextmanager
def compacting(there: bool) -> Iterator[None]:
    """Let every tensor be compacted where it is, or none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "takes", lambda _device, _n: there)
        yield


def state_of(density: float) -> dict[str, Tensor]:
    """Every dtype, with NaN and -0.0; extents 0, 1 and odd; bools of any byte; strides."""
    random = torch.Generator().manual_seed(1)
    state = {}
    for dtype in DTYPES:
        numbers = (torch.randn(13, 7, 3, generator=random) * 40).to(dtype)
        numbers[torch.rand(numbers.shape, generator=random) >= density] = 0
        if dtype.is_floating_point:
            numbers.view(-1)[:4] = torch.tensor([-0.0, float("nan"), -float("inf"), -0.0])
        state[str(dtype)] = numbers
    state["flags"] = (torch.arange(65) % 3).to(torch.uint8).view(torch.bool)
    state["none"] = torch.empty(0, 3)
    state["one"] = torch.tensor(2.0)
    state["strided"] = state["torch.float32"].permute(2, 0, 1)
    state["imaginary"] = torch.conj(torch.complex(torch.zeros(9), torch.arange(9.0))).imag
    return state


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(
        a.cpu().contiguous().view(-1).view(torch.uint8),
        b.cpu().contiguous().view(-1).view(torch.uint8),
    )


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("level", ["fast", "balanced"])
def test_the_bytes_are_the_same(level: Any, density: float, device: str) -> None:
    state = state_of(density)
    masks = {name: t != 0 for name, t in state.items() if "float" in name or name == "flags"}
    for mask in masks.values():
        # A kept weight may be 0.
        mask.view(-1)[-1:] = True
    base = {name: t.clone() for name, t in state.items()}
    base["torch.float32"][3] = 5.0
    there = {name: t.to(device) for name, t in state.items()}
    options: list[dict[str, Any]] = [{}, {"masks": masks}, {"base": base}, {"mask_encoding": "csr"}]
    for option in options:
        with compacting(False):
            expected = codec.encode(state, level=level, **option)
        with compacting(True):
            assert codec.encode(there, level=level, **option) == expected


def test_masks_and_tensors_may_be_on_different_sides(device: str) -> None:
    weight = torch.tensor([0.0, 1.0, 0.0, 0.0, 2.0] * 20)
    mask = weight != 0
    with compacting(False):
        expected = codec.encode({"w": weight}, masks={"w": mask}, level="fast")
    for tensor_there, mask_there in ((True, False), (False, True)):
        answers = iter((tensor_there, mask_there))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(on_device, "takes", lambda _d, _n, answers=answers: next(answers))
            payload = codec.encode(
                {"w": weight.to(device)}, masks={"w": mask.to(device)}, level="fast"
            )
        assert payload == expected


def test_a_value_outside_its_mask_is_refused(device: str) -> None:
    weight = torch.arange(200.0).to(device)
    with compacting(True), pytest.raises(ArgumentError, match="'w' has 1 non-zero values outside"):
        codec.encode({"w": weight}, masks={"w": (torch.arange(200) > 1).to(device)})


@pytest.mark.parametrize("level", ["fast", "balanced"])
def test_decoding_to_a_device_gives_the_same_bits(level: Any, device: str) -> None:
    state = state_of(0.1)
    with compacting(False):
        payload = codec.encode(state, level=level)
        expected = codec.decode(payload)
    with compacting(True):
        decoded = codec.decode(payload, device=device)
    assert list(decoded) == list(expected)
    for name, tensor in decoded.items():
        assert tensor.device.type == device
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert equal_bits(tensor, expected[name])


def test_a_wrong_count_is_refused(device: str) -> None:
    payload = memoryview(codec.encode({"w": torch.tensor([1.0, 0.0, 0.0] * 19)}, level="fast"))
    placed = wire.parse(payload).records[0]
    mask = bytearray(payload[placed.mask_at : placed.mask_at + placed.record.mask_len])
    values = bytes(payload[placed.value_at : placed.value_at + placed.record.value_len])
    mask[3] ^= 1
    checksum = wire.section_checksum(memoryview(mask), memoryview(values))
    record = dataclasses.replace(placed.record, checksum=checksum)
    header = wire.pack_header([record], round=0, base_digest=wire.NO_BASE)
    damaged = header + b"".join(
        section.ljust(wire.padded(len(section)), b"\0") for section in (bytes(mask), values)
    )
    with compacting(True), pytest.raises(FormatError, match="tensor 'w': its mask keeps"):
        codec.decode(damaged, device=device)


def test_large_tensors_cross_as_bits_and_kept_elements(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = on_device.LEAST_ELEMENTS
    assert not on_device.takes(torch.device("cpu"), n)
    assert on_device.takes(torch.device("cuda"), n)
    assert not on_device.takes(torch.device("cuda"), n - 1)

    def whole(_: Any) -> Any:
        raise AssertionError("all of a sparse tensor is copied")

    monkeypatch.setattr(on_device.DeviceSource, "whole", whole)
    monkeypatch.setattr(crossing, "elements_of", whole)
    weight = torch.zeros(n)
    weight[::100] = 1.5
    with compacting(True):
        payload = codec.encode({"w": weight.to(device)}, masks={"w": (weight != 0).to(device)})
    monkeypatch.undo()
    assert torch.equal(codec.decode(payload)["w"], weight)
    assert "bitmap_compact" in str(explain())
