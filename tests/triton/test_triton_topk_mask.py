"""Exact selection in Triton against NumPy, bit for bit."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels import implementations
from sparsekit.kernels.topk_mask import reference, triton
from sparsekit.kernels.triton_launch import launch
from sparsekit.ops import explain, topk_mask
from tests.triton.arenas import Arena, in_arena

TILES = triton.Tiles(part=256, counted=128, block=64, programs=3, warps=4)
SHAPES = [(7, 13), (0, 3), (), (600,), (1,), (3, 3, 3), (513,)]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def names_of(tensors: list[Tensor]) -> list[str]:
    return [f"number {i}" for i in range(len(tensors))]


def selected(
    tensors: list[Tensor],
    keep: int,
    within: list[Tensor] | None,
    device: str,
    *,
    tiles: triton.Tiles = TILES,
    skewed: bool = False,
) -> list[Tensor]:
    """Masks from arenas, in which nothing but the masks was written; their bits are the same."""
    room = Arena(torch.bool, sum(t.numel() + 32 for t in tensors) + 1, True, device)
    masks = [room.take(t.shape) for t in tensors]
    here = in_arena(tensors, float("nan"), device, skewed=skewed)
    allowed = None if within is None else in_arena(within, True, device, skewed=skewed)
    bits = triton.select(here, names_of(tensors), keep, allowed, masks, tiles)
    assert room.gaps_are_untouched()
    for i, mask in enumerate(masks):
        packed = np.packbits(mask.cpu().reshape(-1).numpy(), bitorder="little")
        assert (bits.of(i).cpu().numpy() == packed).all()
    return [mask.cpu() for mask in masks]


def check(
    tensors: list[Tensor], keep: int, within: list[Tensor] | None, *rest: Any, **more: Any
) -> None:
    expected = reference.topk_mask(tensors, names_of(tensors), keep, within)
    masks = selected(tensors, keep, within, *rest, **more)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


def continuous(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    scale = 10.0 ** int(torch.randint(-5, 4, (), generator=random))
    return torch.randn(shape, generator=random) * scale


def rounded(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=random) * 2).round() / 2


def zero(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random) * 0.0


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("make", [continuous, rounded, zero])
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16, BF16), (F32, F16, BF16)])
def test_masks_are_those_of_the_reference(
    dtypes: tuple[torch.dtype, ...],
    make: Callable[[tuple[int, ...], torch.Generator], Tensor],
    skewed: bool,
    device: str,
) -> None:
    random = torch.Generator().manual_seed(len(dtypes))
    tensors = [make(shape, random).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)]
    within = [torch.rand(t.shape, generator=random) < 0.5 for t in tensors]
    total = sum(t.numel() for t in tensors)
    alive = sum(int(m.sum()) for m in within)
    for keep in (total // 3, total - 1):
        check(tensors, keep, None, device, skewed=skewed)
    for keep in (1, alive // 3):
        check(tensors, keep, within, device, skewed=skewed)


@pytest.mark.parametrize("keep", [0, 1233])
def test_nothing_and_everything(keep: int, device: str) -> None:
    random = torch.Generator().manual_seed(5)
    tensors = [continuous(shape, random) for shape in SHAPES]
    masks = selected(tensors, keep, None, device)
    assert all(bool(m.all()) if keep else not bool(m.any()) for m in masks)


def test_lists_without_entries(device: str) -> None:
    assert topk_mask([], 0) == []
    empty = [torch.empty(0, 3, device=device), torch.empty(0, device=device)]
    masks = triton.topk_mask(empty, names_of(empty), 0, None)
    assert [tuple(m.shape) for m in masks] == [(0, 3), (0,)]
    assert all(m.dtype == torch.bool for m in masks)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_keys_of_all_numbers_of_16_bits_are_those_of_float32(
    dtype: torch.dtype, device: str
) -> None:
    # Beside the same numbers as float32, which tie: one wrong key changes a mask.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = patterns[~patterns.isnan()]
    tensors = [numbers, numbers.float().flip(0)]
    tiles = triton.Tiles(part=1 << 14, counted=1 << 12, block=1 << 12, programs=4, warps=4)
    for share in (0.001, 0.3, 0.5, 0.97, 0.999):
        check(tensors, int(2 * numbers.numel() * share), None, device, tiles=tiles)


def test_extreme_float32_are_in_order(device: str) -> None:
    numbers = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, 1.0, -1.0000001, 3.4028235e38,
         float("inf"), -float("inf"), 65504.0, 2.0**-14, 2.0**-24]
    )  # fmt: skip
    for keep in range(numbers.numel() + 1):
        check([numbers, numbers.flip(0)], keep, None, device)


def test_ties_go_to_the_first_over_tensors_and_dtypes(device: str) -> None:
    # In the table, rows of one dtype stand together: float16 and bfloat16 come after float32.
    tensors = [torch.ones(300).to(t) for t in (F16, F32, BF16, F32, F16)]
    for keep in (1, 299, 300, 301, 777, 1200, 1499):
        masks = torch.cat(selected(tensors, keep, None, device))
        assert masks.tolist() == [True] * keep + [False] * (1500 - keep)


@pytest.mark.parametrize(
    "tiles",
    [
        triton.Tiles(part=128, counted=128, block=16, programs=1, warps=1),
        triton.Tiles(part=512, counted=256, block=128, programs=100, warps=4),
        triton.TILES,
    ],
)
def test_tiles_do_not_matter(tiles: triton.Tiles, device: str) -> None:
    random = torch.Generator().manual_seed(9)
    tensors = [rounded((1111,), random), continuous((50, 7), random)]
    check(tensors, 500, None, device, tiles=tiles)


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("keep", [0, 5])
def test_nan_is_refused_by_the_first_name(dtype: torch.dtype, keep: int, device: str) -> None:
    tensors = [torch.ones(10), torch.ones(3, 67).to(dtype), torch.ones(5).to(BF16), torch.ones(9)]
    within = [torch.ones(t.shape, dtype=torch.bool) for t in tensors]
    within[1][2, 66] = False
    for at in (3, 1):
        tensors[at].view(-1)[-1] = float("nan")
        for allowed in (None, within):
            with pytest.raises(ArgumentError, match=f"tensors: number {at} holds NaN"):
                selected(tensors, keep, allowed, device)


def test_infinity_is_no_nan(device: str) -> None:
    tensors = [torch.tensor([1.0, -float("inf")]).to(t) for t in (F32, F16, BF16)]
    check(tensors, 3, None, device)


@pytest.mark.skipif("ttsem" in sys.modules, reason="ttsem takes tensors of other memory for errors")
def test_tensors_anywhere_by_the_public_op(device: str) -> None:
    random = torch.Generator().manual_seed(3)
    tensors = {
        "strided": continuous((9, 8), random).t(),
        "half": continuous((201,), random).half(),
        "view": continuous((40,), random)[3:37],
    }
    within = {name: torch.rand(t.shape, generator=random) < 0.7 for name, t in tensors.items()}
    keep = sum(int(m.sum()) for m in within.values()) // 2
    masks = topk_mask(
        {name: t.to(device) for name, t in tensors.items()}, keep,
        within={name: m.to(device) for name, m in within.items()}, backend="triton",
    )  # fmt: skip
    expected = topk_mask(tensors, keep, within=within, backend="reference")
    assert list(masks) == list(tensors)
    for name, mask in masks.items():
        assert mask.device.type == device
        assert mask.is_contiguous()
        assert torch.equal(mask.cpu(), expected[name])
    assert "triton" in str(explain())


@pytest.mark.parametrize(("dtypes", "launches"), [((F32,), 12), ((BF16,), 8), ((F16,), 10),
                                                  ((F32, F16, BF16), 24)])  # fmt: skip
@pytest.mark.parametrize("tensors", [3, 30])
def test_launches_do_not_depend_on_the_number_of_tensors(
    dtypes: tuple[torch.dtype, ...],
    launches: int,
    tensors: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = []

    def counting(kernel: Any, *arguments: Any, **constants: Any) -> None:
        counted.append(kernel)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(triton, "launch", counting)
    values = [torch.full((20,), float(i)).to(dtypes[i % len(dtypes)]) for i in range(tensors)]
    check(values, 30, None, device)
    assert len(counted) == launches


def test_the_table_has_the_kernels_in_their_place() -> None:
    assert implementations.available("topk_mask", "cuda")[0].backend == "triton"
    for function in ("pack", "nonzero", "unpack", "count", "compact", "expand"):
        assert implementations.available(f"bitmap_{function}", "cuda")[0].backend == "triton"
        assert implementations.available(f"bitmap_{function}", "cpu")[0].backend == "cpu"
