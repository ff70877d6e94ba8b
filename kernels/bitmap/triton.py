"""Masks as bits on a GPU: the functions of `reference` on tensors instead of NumPy arrays.

README.md says what each launch reads and writes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.bitmap import triton_passes as passes
from sparsekit.kernels.triton_launch import INTEGERS, flat_bits, launch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How launches cut their work; tests take small ones, so that little data has many parts."""

    part: int = 1 << 14
    """Entries of a program that counts bits or moves values; a multiple of `block`."""
    block: int = 1 << 11
    """Entries that a program holds at a time; a power of two, at least 16."""
    warps: int = 8


TILES = Tiles()


def pack(mask: Tensor, tiles: Tiles = TILES) -> Tensor:
    """Bits of a flat bool tensor: entry i is bit i % 8 (from the lowest) of byte i // 8.

    Parameters
    ----------
    mask : Tensor, (n,), bool

    Returns
    -------
    Tensor, (ceil(n / 8),), uint8
        On the same device.

    Raises
    ------
    ArgumentError
        `mask` is not flat or not bool.
    """
    if mask.dtype != torch.bool or mask.ndim != 1:
        raise ArgumentError(
            f"mask: expected flat bools, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return nonzero(mask, -1, tiles)


def nonzero(values: Tensor, wanted: int, tiles: Tiles = TILES) -> Tensor:
    """Bits of a flat tensor: set where one of the wanted bits of the element is.

    Parameters
    ----------
    values : Tensor, (n,)
        Elements of 1, 2, 4 or 8 bytes, taken as bits.
    wanted : int
        Non-negative, or -1 for all bits of an element.

    Returns
    -------
    Tensor, (ceil(n / 8),), uint8
    """
    _check_values(values)
    n = values.numel()
    packed = torch.empty(-(-n // 8), dtype=torch.uint8, device=values.device)
    if n:
        width = 8 * values.element_size()
        # As a signed number, which is how Triton knows the elements.
        signed = wanted - (1 << width) if wanted >> (width - 1) == 1 else wanted
        launch(
            passes.nonzero_kernel,
            -(-n // tiles.block),
            flat_bits(values),
            packed,
            n,
            WANTED=signed,
            BLOCK=tiles.block,
            warps=tiles.warps,
        )
    return packed


def unpack(packed: Tensor, n: int, tiles: Tiles = TILES) -> Tensor:
    """Flat bool tensor of `n` entries; bits after the last are ignored.

    Raises
    ------
    ArgumentError
        `packed` is not the flat bytes of `n` entries, here and in all functions below.
    """
    _check_bits(packed, n)
    mask = torch.empty(n, dtype=torch.bool, device=packed.device)
    if n:
        launch(
            passes.unpack_kernel,
            -(-n // tiles.block),
            packed.contiguous(),
            mask.view(torch.int8),
            n,
            BLOCK=tiles.block,
            warps=tiles.warps,
        )
    return mask


def count(packed: Tensor, n: int, tiles: Tiles = TILES) -> int:
    """Number of bits that are set among the first `n`; waits for the device."""
    _check_bits(packed, n)
    ends = _ends(packed.contiguous(), n, tiles)
    return int(ends[-1]) if n else 0


def compact(values: Tensor, packed: Tensor, tiles: Tiles = TILES) -> Tensor:
    """Values whose bit is set, in order; waits for the device once, to know how many they are.

    Parameters
    ----------
    values : Tensor, (n,)
        Elements of 1, 2, 4 or 8 bytes.
    packed : Tensor, (ceil(n / 8),), uint8

    Returns
    -------
    Tensor, (k,)
        Of the dtype of `values`, for k bits that are set.
    """
    _check_values(values)
    n = values.numel()
    _check_bits(packed, n)
    bits = packed.contiguous()
    ends = _ends(bits, n, tiles)
    kept = torch.empty(int(ends[-1]) if n else 0, dtype=values.dtype, device=values.device)
    if kept.numel():
        launch(
            passes.compact_kernel,
            ends.numel(),
            flat_bits(values),
            bits,
            ends,
            flat_bits(kept),
            n,
            PART=tiles.part,
            BLOCK=tiles.block,
            warps=tiles.warps,
        )
    return kept


def expand(values: Tensor, packed: Tensor, n: int, tiles: Tiles = TILES) -> Tensor:
    """Put values at the bits that are set, in order; the other of the `n` entries are 0.

    Waits for the device once, to compare their numbers.

    Raises
    ------
    ArgumentError
        There are more or fewer values than bits that are set.
    """
    _check_values(values)
    _check_bits(packed, n)
    bits = packed.contiguous()
    ends = _ends(bits, n, tiles)
    kept = int(ends[-1]) if n else 0
    if values.numel() != kept:
        raise ArgumentError(
            f"values: expected {kept}, one per bit that is set, got {values.numel()}"
        )
    whole = torch.empty(n, dtype=values.dtype, device=values.device)
    if n:
        launch(
            passes.expand_kernel,
            ends.numel(),
            flat_bits(values),
            bits,
            ends,
            flat_bits(whole),
            n,
            PART=tiles.part,
            BLOCK=tiles.block,
            warps=tiles.warps,
        )
    return whole


def _ends(bits: Tensor, n: int, tiles: Tiles) -> Tensor:
    """Bits set up to the end of each part."""
    counts = torch.empty(-(-n // tiles.part), dtype=torch.int64, device=bits.device)
    if n:
        launch(
            passes.count_kernel, counts.numel(), bits, counts, n, PART=tiles.part, warps=tiles.warps
        )
    return counts.cumsum(0)


def _check_bits(packed: Tensor, n: int) -> None:
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-n // 8),):
        raise ArgumentError(
            f"packed: expected {-(-n // 8)} bytes for {n} entries, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )


def _check_values(values: Tensor) -> None:
    if values.ndim != 1 or values.element_size() not in INTEGERS:
        raise ArgumentError(
            "values: expected one axis and elements of 1, 2, 4 or 8 bytes, "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
