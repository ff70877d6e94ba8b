"""Tensors large enough for the compiled bitmap kernels: the same bytes as without, as safe."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit import codec
from sparsekit.codec import flags, records, rice, sections, split
from sparsekit.errors import FormatError

N = flags.KERNEL_ELEMENTS + 77
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]


def make(dtype: torch.dtype, density: float) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    mask = torch.rand((N // 7, 7), generator=random) < density
    values = torch.randn((N // 7, 7), generator=random).mul(9)
    return values.to(dtype) * mask, mask


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(flags, "kernels_pay_off", lambda _: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.6])
@pytest.mark.parametrize("encoding", ["bitmap", "csr"])
def test_the_same_bytes_and_values(
    dtype: torch.dtype, density: float, encoding: str, without_kernels: Callable[[], None]
) -> None:
    values, mask = make(dtype, density)

    def encode() -> bytes:
        return codec.encode({"w": values}, masks={"w": mask}, mask_encoding=encoding)  # type: ignore[arg-type]

    payload = encode()
    decoded = codec.decode(payload)["w"]
    assert torch.equal(decoded, values)
    assert torch.equal(codec.decode_masks(payload)["w"], mask)
    without_kernels()
    assert encode() == payload
    plain = codec.decode(payload)["w"]
    assert plain.dtype == decoded.dtype
    assert torch.equal(plain, decoded)


def test_kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    take = flags.bitmap_kernel

    def note(function: str) -> object:
        taken.append(function)
        return take(function)

    monkeypatch.setattr(flags, "bitmap_kernel", note)
    monkeypatch.setattr(sections, "bitmap_kernel", note)
    values, mask = make(torch.float32, 0.3)
    codec.decode(codec.encode({"w": values}, masks={"w": mask}, level="fast"))
    assert taken == ["nonzero", "count", "pack", "compact", "count", "expand"]

    def refuse(*_: object) -> None:
        raise AssertionError("NumPy was asked")

    monkeypatch.setattr(rice, "pack", refuse)
    monkeypatch.setattr(rice, "positions", refuse)
    monkeypatch.setattr(split, "reader", refuse)
    sparse = {"w": torch.randn(N) * (torch.rand(N) < 0.1)}
    payload = codec.encode(sparse)
    assert torch.equal(codec.decode(payload)["w"], sparse["w"])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_bitmap_that_disagrees_with_its_count_is_refused(change: int) -> None:
    mask = np.zeros(N, np.bool_)
    mask[: 1000 + change] = True
    packed = np.packbits(mask, bitorder="little")
    values = np.ones(1000, "<f4")
    with pytest.raises(FormatError, match=f"keeps {1000 + change} elements, its record says 1000"):
        sections.expand_bitmap(
            packed.data, values.view(np.uint8).data, records.DTYPE_BY_NAME["float32"], N, 1000
        )


def test_bits_after_the_last_element_are_refused() -> None:
    packed = np.zeros(-(-N // 8), np.uint8)
    packed[-1] = 128
    with pytest.raises(FormatError, match="unused bits"):
        sections.expand_bitmap(packed.data, memoryview(b""), records.DTYPE_BY_NAME["float32"], N, 0)
