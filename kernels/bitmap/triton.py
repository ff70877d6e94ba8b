"""Masks as bits on a GPU: the functions of `reference` on tensors instead of NumPy arrays.

README.md says what each launch reads and writes.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.triton_launch import INTEGERS, flat_bits, on_device_of


@dataclass(frozen=True, slots=True)
class Tiles:
    """How launches cut their work; tests take small ones, so that little data has many parts."""

    part: int = 1 << 14
    """Entries of a program that counts bits or moves values; a multiple of `block`."""
    block: int = 1 << 11
    """Entries that a program holds at a time; a power of two, at least 16."""
    warps: int = 8


TILES = Tiles()


@triton.jit
def pack_lanes(flags, LANES: tl.constexpr):
    """Bytes of flags that are 0 or 1: flag i is bit i % 8, from the lowest, of byte i // 8."""
    octets = tl.reshape(flags.to(tl.int32), [LANES // 8, 8])
    return tl.sum(octets << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def lanes_of(octets, LANES: tl.constexpr):
    """Flags, 0 or 1 as int32, of the bits of bytes."""
    bits = (octets.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [LANES])


@triton.jit
def nonzero_kernel(values, bits, n, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of the entries that have one of the bits of `WANTED`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = start + tl.arange(0, BLOCK)
    octets = start // 8 + tl.arange(0, BLOCK // 8)
    # Without a mask, loads and stores are 16 bytes wide.
    if start + BLOCK <= n:
        tl.store(bits + octets, pack_lanes((tl.load(values + lanes) & WANTED) != 0, BLOCK))
    else:
        items = tl.load(values + lanes, mask=lanes < n, other=0)
        packed = pack_lanes((items & WANTED) != 0, BLOCK)
        tl.store(bits + octets, packed, mask=octets < (n + 7) // 8)


@triton.jit
def unpack_kernel(bits, bools, n, BLOCK: tl.constexpr):
    """Write the first `n` bits as bytes 0 and 1."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = start + tl.arange(0, BLOCK)
    octets = start // 8 + tl.arange(0, BLOCK // 8)
    if start + BLOCK <= n:
        tl.store(bools + lanes, lanes_of(tl.load(bits + octets), BLOCK).to(tl.int8))
    else:
        packed = tl.load(bits + octets, mask=octets < (n + 7) // 8, other=0)
        tl.store(bools + lanes, lanes_of(packed, BLOCK).to(tl.int8), mask=lanes < n)


@triton.jit
def _ones(octets):
    """Bits that are set in bytes held as int32."""
    pairs = octets - ((octets >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return tl.sum((fours & 0x0F) + (fours >> 4))


@triton.jit
def count_kernel(bits, counts, n, PART: tl.constexpr):
    """Count the bits of each part that are set, leaving out those beyond `n`."""
    part = tl.program_id(0).to(tl.int64)
    octets = tl.arange(0, PART // 8)
    bits += part * (PART // 8)
    if (part + 1) * PART <= n:
        found = _ones(tl.load(bits + octets).to(tl.int32))
    else:
        # Entries of each byte, fewer than 8 in the last one.
        left = tl.minimum(tl.maximum((n - part * PART).to(tl.int32) - octets * 8, 0), 8)
        packed = tl.load(bits + octets, mask=left > 0, other=0).to(tl.int32)
        found = _ones(packed & ((1 << left) - 1))
    tl.store(counts + part, found.to(tl.int64))


@triton.jit
def _flags(bits, start, n, BLOCK: tl.constexpr):
    """Flags of a block of entries, 0 for those beyond `n`, and how many entries it has."""
    size = tl.minimum(n - start, BLOCK).to(tl.int32)
    octets = tl.arange(0, BLOCK // 8)
    packed = tl.load(bits + start // 8 + octets, mask=octets * 8 < size, other=0)
    return tl.where(tl.arange(0, BLOCK) < size, lanes_of(packed, BLOCK), 0), size


@triton.jit
def compact_kernel(values, bits, ends, kept, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Move the entries whose bits are set to the front; `ends` counts up to the end of a part."""
    part = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    done = tl.load(ends + part - 1, mask=part > 0, other=0)
    for start in range(part * PART, tl.minimum((part + 1) * PART, n), BLOCK):
        flags, _ = _flags(bits, start, n, BLOCK)
        places = tl.cumsum(flags, 0) - 1
        items = tl.load(values + start + lanes, mask=flags != 0)
        tl.store(kept + done + places, items, mask=flags != 0)
        done += tl.sum(flags)


@triton.jit
def expand_kernel(kept, bits, ends, values, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Undo `compact_kernel`; entries whose bits are not set are 0."""
    part = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    done = tl.load(ends + part - 1, mask=part > 0, other=0)
    for start in range(part * PART, tl.minimum((part + 1) * PART, n), BLOCK):
        flags, size = _flags(bits, start, n, BLOCK)
        places = tl.cumsum(flags, 0) - 1
        items = tl.load(kept + done + places, mask=flags != 0, other=0)
        if size == BLOCK:
            tl.store(values + start + lanes, items)
        else:
            tl.store(values + start + lanes, items, mask=lanes < size)
        done += tl.sum(flags)


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
        with on_device_of(values):
            nonzero_kernel[(triton.cdiv(n, tiles.block),)](
                flat_bits(values), packed, n,
                WANTED=signed, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
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
        with on_device_of(packed):
            unpack_kernel[(triton.cdiv(n, tiles.block),)](
                packed.contiguous(), mask.view(torch.int8), n,
                BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
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
        with on_device_of(values):
            compact_kernel[(ends.numel(),)](
                flat_bits(values), bits, ends, flat_bits(kept), n,
                PART=tiles.part, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
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
        with on_device_of(values):
            expand_kernel[(ends.numel(),)](
                flat_bits(values), bits, ends, flat_bits(whole), n,
                PART=tiles.part, BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
    return whole


def _ends(bits: Tensor, n: int, tiles: Tiles) -> Tensor:
    """Bits set up to the end of each part."""
    counts = torch.empty(triton.cdiv(n, tiles.part), dtype=torch.int64, device=bits.device)
    if n:
        with on_device_of(bits):
            count_kernel[(counts.numel(),)](
                bits, counts, n, PART=tiles.part, num_warps=tiles.warps
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
