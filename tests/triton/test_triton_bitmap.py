"""Masks as bits in Triton, bit for bit against NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.bitmap import reference, triton

TILES = triton.Tiles(part=128, block=32, warps=4)
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 127, 128, 129, 257, 301]
DTYPES = [torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64]


def masks(n: int) -> list[Tensor]:
    """Densities 0, one entry, half and all."""
    random = torch.Generator().manual_seed(n)
    one = torch.zeros(n, dtype=torch.bool)
    one[n // 3 : n // 3 + 1] = True
    half = torch.rand(n, generator=random) < 0.5
    return [torch.zeros_like(one), one, half, torch.ones_like(one)]


def values(n: int, dtype: torch.dtype) -> Tensor:
    """Random bits, NaN and -0.0 among them."""
    random = torch.Generator().manual_seed(n + 1)
    width = torch.empty(0, dtype=dtype).element_size()
    octets = torch.randint(0, 256, (n * width,), generator=random, dtype=torch.uint8)
    return octets.view(dtype)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.cpu().view(torch.uint8)


@pytest.mark.parametrize("n", SIZES)
def test_bits_and_bools_are_those_of_numpy(n: int, device: str) -> None:
    for mask in masks(n):
        expected = reference.pack(mask.numpy())
        packed = triton.pack(mask.to(device), TILES)
        assert (packed.cpu().numpy() == expected).all()
        assert packed.shape == expected.shape
        assert torch.equal(triton.unpack(packed, n, TILES).cpu(), mask)
        assert triton.count(packed, n, TILES) == int(mask.sum())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_move_as_bits(n: int, dtype: torch.dtype, device: str) -> None:
    whole = values(n, dtype)
    for mask in masks(n):
        packed = triton.pack(mask.to(device), TILES)
        kept = triton.compact(whole.to(device), packed, TILES)
        assert kept.dtype == dtype
        assert torch.equal(bits_of(kept), bits_of(whole[mask]))
        expanded = triton.expand(kept, packed, n, TILES)
        expected = torch.zeros_like(whole)
        expected[mask] = whole[mask]
        assert torch.equal(bits_of(expanded), bits_of(expected))


@pytest.mark.parametrize("wanted", ["magnitude", "all"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_nonzero_looks_at_the_wanted_bits(dtype: torch.dtype, wanted: str, device: str) -> None:
    width = 8 * torch.empty(0, dtype=dtype).element_size()
    bits = 2**width - 1 if wanted == "all" else 2 ** (width - 1) - 1
    whole = values(77, dtype)
    whole[::3] = 0
    if dtype.is_floating_point:
        whole[1::6] = -0.0
    expected = reference.nonzero(whole.view(torch.uint8).numpy().view(f"u{width // 8}"), bits)
    assert (triton.nonzero(whole.to(device), bits, TILES).cpu().numpy() == expected).all()


def test_bits_after_the_last_entry_are_ignored(device: str) -> None:
    packed = torch.full((2,), 255, dtype=torch.uint8, device=device)
    assert triton.count(packed, 11, TILES) == 11
    assert triton.unpack(packed, 11, TILES).tolist() == [True] * 11
    whole = torch.arange(11, dtype=torch.int32, device=device)
    assert torch.equal(triton.compact(whole, packed, TILES), whole)
    assert torch.equal(triton.expand(whole, packed, 11, TILES), whole)


def test_strided_input_is_read_in_order(device: str) -> None:
    mask = (torch.arange(120) % 5 < 2).to(device)
    whole = torch.arange(240, dtype=torch.float32).to(device)
    packed = triton.pack(mask[::2], TILES)
    assert torch.equal(triton.unpack(packed, 60, TILES), mask[::2])
    assert torch.equal(triton.compact(whole[::4], packed, TILES), whole[::4][mask[::2]])
    doubled = packed.repeat_interleave(2)[::2]
    assert torch.equal(triton.unpack(doubled, 60, TILES), mask[::2])


def test_the_tiles_that_ship_give_the_same(device: str) -> None:
    mask = torch.from_numpy(np.arange(40_003) % 7 < 3)
    packed = triton.pack(mask.to(device))
    assert (packed.cpu().numpy() == reference.pack(mask.numpy())).all()
    whole = torch.arange(40_003, dtype=torch.float32)
    kept = triton.compact(whole.to(device), packed)
    assert torch.equal(kept.cpu(), whole[mask])
    assert torch.equal(triton.expand(kept, packed, 40_003).cpu(), whole * mask)
    assert torch.equal(triton.unpack(packed, 40_003).cpu(), mask)


def test_what_does_not_fit_is_refused(device: str) -> None:
    packed = torch.zeros(2, dtype=torch.uint8, device=device)
    whole = torch.zeros(9, device=device)
    with pytest.raises(ArgumentError, match="mask: expected flat bools"):
        triton.pack(whole)
    with pytest.raises(ArgumentError, match="packed: expected 3 bytes for 17 entries"):
        triton.unpack(packed, 17)
    with pytest.raises(ArgumentError, match=r"packed: expected 2 bytes .* got torch\.int8"):
        triton.count(packed.view(torch.int8), 9)
    with pytest.raises(ArgumentError, match="values: expected one axis"):
        triton.compact(whole.view(3, 3), packed)
    with pytest.raises(ArgumentError, match="values: expected one axis and elements of 1, 2, 4"):
        triton.nonzero(torch.zeros(9, dtype=torch.complex128, device=device), -1)
    with pytest.raises(ArgumentError, match="values: expected 0, one per bit that is set, got 9"):
        triton.expand(whole, packed, 9)
