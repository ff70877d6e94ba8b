"""Exact selection over a list of tensors on a GPU: README.md has the algorithm.

Tensors are read where they lie. One table row describes a part of one tensor; addresses in it are
distances from the tensor that the launch is given, so that one launch serves all tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.bitmap.triton import lanes_of, pack_lanes
from sparsekit.kernels.triton_launch import flat_bits, on_device_of


@dataclass(frozen=True, slots=True)
class Tiles:
    """How launches cut their work; tests take small ones, so that little data has many parts."""

    part: int = 1 << 14
    """Entries of a row of the table; a multiple of `block` and of 128."""
    block: int = 1 << 11
    """Entries that a program holds at a time; a power of two, at least 16."""
    programs: int = 1024
    """Most programs of a launch: each adds its whole histogram to the joint one, once."""
    warps: int = 8


TILES = Tiles()

# How keys are read: the dtypes' places in this tuple are the kernels' KIND.
_KINDS = (torch.float32, torch.bfloat16, torch.float16)

# Digits of a key from the highest: position of the lowest bit, and number of bits.
DIGITS = ((20, 11), (10, 10), (0, 10))
# Keys of 16-bit floats end in 13 zeros.
_HALF_DIGITS = DIGITS[:2]

_COLUMNS: tl.constexpr = tl.constexpr(8)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)

# The state: the threshold so far, how many keys with it are wanted, which tensor holds NaN; then a
# histogram for each digit, at a multiple of 16 bytes.
_NAN = 2
_STATE_SIZE = 4
_BINS = 1 << 11

@triton.jit
def _keys(bits, KIND: tl.constexpr):
    """Bits of ``|w|`` as float32, from the bits of float32, bfloat16 or float16."""
    if KIND == 0:
        keys = bits & 0x7FFFFFFF
    elif KIND == 1:
        keys = (bits & 0x7FFF).to(tl.int32) << 16
    else:
        size = (bits & 0x7FFF).to(tl.int32)
        # The exponent's bias is 15 instead of 127; that of infinity and NaN is all ones.
        normal = (size << 13) + tl.where(size >= 0x7C00, 224 << 23, 112 << 23)
        # Below 2**-14 it is a multiple of 2**-24, which float32 holds with an exponent of its own.
        counted = size.to(tl.float32).to(tl.int32, bitcast=True) - (24 << 23)
        keys = tl.where(size >= 0x0400, normal, tl.where(size == 0, 0, counted))
    return keys


@triton.jit
def _read(
    values, within, start, length,
    KIND: tl.constexpr, WITHIN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys of a block of a part, and whether each may be selected."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        keys = _keys(tl.load(values + start + lanes), KIND)
        allowed = tl.full([BLOCK], True, tl.int1)
        if WITHIN:
            allowed = tl.load(within + start + lanes) != 0
    else:
        allowed = start + lanes < length
        keys = _keys(tl.load(values + start + lanes, mask=allowed, other=0), KIND)
        if WITHIN:
            allowed = tl.load(within + start + lanes, mask=allowed, other=0) != 0
    return keys, allowed


@triton.jit
def _at(base, offset, ALIGN: tl.constexpr):
    """Address of a row's tensor; with `ALIGN` the compiler sees that it divides the offset."""
    return base + offset // ALIGN * ALIGN


@triton.jit
def _whole(entry, length, BLOCK: tl.constexpr):
    """Entries in whole blocks, if all is at multiples of 16 bytes, as the wide loads need."""
    return tl.where(tl.load(entry + 7) != 0, length // BLOCK * BLOCK, 0)


@triton.jit(do_not_specialize=["row", "rows", "tensors"])
def histogram_kernel(
    values, within, table, state, counts, row, rows, tensors,
    KIND: tl.constexpr, WITHIN: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the keys by one digit, of those that have the digits found so far."""
    FIRST: tl.constexpr = SHIFT + BITS == 31
    ALIGN: tl.constexpr = 4 if KIND == 0 else 8
    found = tl.zeros([1 << BITS], tl.int32)
    prefix = tl.load(state).to(tl.int32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * _COLUMNS
        offset, allowed_offset = tl.load(entry), tl.load(entry + 1)
        length = tl.load(entry + 4).to(tl.int32)
        whole = _whole(entry, length, BLOCK)
        highest = tl.zeros([BLOCK], tl.int32)
        at, allowed_at = _at(values, offset, ALIGN), _at(within, allowed_offset, 16)
        for start in range(0, whole, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, True)
            if FIRST:
                highest = tl.maximum(highest, keys)
            else:
                allowed = allowed & (keys >> (SHIFT + BITS) == prefix)
            digits = (keys >> SHIFT) & ((1 << BITS) - 1)
            found += tl.histogram(digits, 1 << BITS, mask=allowed)
        at, allowed_at = values + offset, within + allowed_offset
        for start in range(whole, length, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            if FIRST:
                highest = tl.maximum(highest, keys)
            else:
                allowed = allowed & (keys >> (SHIFT + BITS) == prefix)
            digits = (keys >> SHIFT) & ((1 << BITS) - 1)
            found += tl.histogram(digits, 1 << BITS, mask=allowed)
        if FIRST:
            if tl.max(highest) > _INFINITY:
                # The first tensor has the largest number; 0 stands for none.
                tl.atomic_max(state + 2, tensors - tl.load(entry + 6), sem="relaxed")
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(counts + bins, found.to(tl.int64), mask=found != 0, sem="relaxed")


@triton.jit(do_not_specialize=["keep"])
def digit_kernel(state, counts, keep, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Append the threshold's next digit, and see how many are wanted of the keys that have it."""
    bins = tl.arange(0, 1 << BITS)
    count = tl.load(counts + bins)
    if FIRST:
        wanted = keep.to(tl.int64)
        prefix = wanted * 0
    else:
        wanted = tl.load(state + 1)
        prefix = tl.load(state)
    at_least = tl.cumsum(count, 0, reverse=True)
    digit = tl.max(tl.where(at_least >= wanted, bins, 0))
    tl.store(state, (prefix << BITS) | digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, count, 0)))


@triton.jit(do_not_specialize=["row", "rows"])
def classify_kernel(
    values, within, table, state, bits, ties, row, rows,
    KIND: tl.constexpr, WITHIN: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of the keys above the threshold, and count each part's keys equal to it."""
    ALIGN: tl.constexpr = 4 if KIND == 0 else 8
    threshold = tl.load(state).to(tl.int32) << LOW
    octets = tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * _COLUMNS
        offset, allowed_offset = tl.load(entry), tl.load(entry + 1)
        length = tl.load(entry + 4).to(tl.int32)
        whole = _whole(entry, length, BLOCK)
        bits_at = bits + tl.load(entry + 2)
        equal = tl.zeros([BLOCK], tl.int32)
        at, allowed_at = _at(values, offset, ALIGN), _at(within, allowed_offset, 16)
        for start in range(0, whole, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, True)
            equal += (allowed & (keys == threshold)).to(tl.int32)
            tl.store(bits_at + start // 8 + octets, pack_lanes(allowed & (keys > threshold), BLOCK))
        at, allowed_at = values + offset, within + allowed_offset
        for start in range(whole, length, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            equal += (allowed & (keys == threshold)).to(tl.int32)
            packed = pack_lanes(allowed & (keys > threshold), BLOCK)
            tl.store(bits_at + start // 8 + octets, packed, mask=start + octets * 8 < length)
        tl.store(ties + tl.load(entry + 5), tl.sum(equal).to(tl.int64))


@triton.jit(do_not_specialize=["parts"])
def quota_kernel(state, ties, parts, BLOCK: tl.constexpr):
    """Replace each part's number of ties by how many of them are selected: the first ones."""
    left = tl.load(state + 1)
    for start in range(0, parts, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        count = tl.load(ties + lanes, mask=lanes < parts, other=0)
        before = tl.cumsum(count, 0) - count
        quota = tl.minimum(tl.maximum(left - before, 0), count)
        tl.store(ties + lanes, quota, mask=lanes < parts)
        left -= tl.sum(count)


@triton.jit(do_not_specialize=["row", "rows"])
def ties_kernel(
    values, within, table, state, bits, quotas, row, rows,
    KIND: tl.constexpr, WITHIN: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of the ties that are selected; parts without any are not looked at."""
    threshold = tl.load(state).to(tl.int32) << LOW
    octets = tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * _COLUMNS
        quota = tl.load(quotas + tl.load(entry + 5)).to(tl.int32)
        length = tl.load(entry + 4).to(tl.int32)
        at, allowed_at = values + tl.load(entry), within + tl.load(entry + 1)
        bits_at = bits + tl.load(entry + 2)
        for start in range(0, tl.where(quota > 0, length, 0), BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            equal = (allowed & (keys == threshold)).to(tl.int32)
            chosen = tl.where(tl.cumsum(equal, 0) <= quota, equal, 0)
            quota -= tl.sum(chosen)
            inside = start + octets * 8 < length
            packed = tl.load(bits_at + start // 8 + octets, mask=inside, other=0)
            packed = packed | pack_lanes(chosen, BLOCK)
            tl.store(bits_at + start // 8 + octets, packed, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def masks_kernel(bits, table, masks, rows, BLOCK: tl.constexpr):
    """Write the bits of all parts as the bytes of bools."""
    lanes, octets = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + i * _COLUMNS
        # Both start at multiples of 16 bytes: the bits were laid out so, masks are torch's own.
        bits_at = bits + tl.load(entry + 2) // 16 * 16
        masks_at = masks + tl.load(entry + 3) // 16 * 16
        length = tl.load(entry + 4).to(tl.int32)
        whole = length // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            flags = lanes_of(tl.load(bits_at + start // 8 + octets), BLOCK)
            tl.store(masks_at + start + lanes, flags.to(tl.int8))
        for start in range(whole, length, BLOCK):
            inside = start + octets * 8 < length
            flags = lanes_of(tl.load(bits_at + start // 8 + octets, mask=inside, other=0), BLOCK)
            tl.store(masks_at + start + lanes, flags.to(tl.int8), mask=start + lanes < length)


@dataclass(frozen=True, slots=True)
class _Group:
    """The tensors of one dtype: what a launch is given, and its rows of the table."""

    kind: int
    values: Tensor
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Bits:
    """A selection as bits, every tensor's from a multiple of 16 bytes on."""

    packed: Tensor
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def of(self, i: int) -> Tensor:
        """Bits of tensor number `i`, in the form of `sparsekit.kernels.bitmap`."""
        return self.packed[self.starts[i] : self.starts[i] + -(-self.sizes[i] // 8)]


def topk_mask(
    tensors: Sequence[Tensor], names: Sequence[str], keep: int, within: Sequence[Tensor] | None
) -> list[Tensor]:
    """Masks of the `keep` largest magnitudes; the contract is in README.md.

    All tensors are on one device.
    """
    masks = [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    select(tensors, names, keep, within, masks)
    return masks


def select(
    tensors: Sequence[Tensor],
    names: Sequence[str],
    keep: int,
    within: Sequence[Tensor] | None,
    masks: Sequence[Tensor],
    tiles: Tiles = TILES,
) -> Bits:
    """Select, as bits and into the given masks; waits for the device once, for NaN.

    Parameters
    ----------
    tensors, names, keep, within
        As for `topk_mask`.
    masks : sequence of Tensor, bool
        Contiguous, of the tensors' shapes, at addresses that 16 divides; overwritten.
    tiles : Tiles

    Raises
    ------
    ArgumentError
        A tensor holds NaN; the masks hold anything then.
    """
    sizes = tuple(t.numel() for t in tensors)
    starts = np.concatenate([[0], np.cumsum([-(-size // 128) * 16 for size in sizes])])
    filled = [i for i, size in enumerate(sizes) if size]
    if not filled:
        return Bits(torch.empty(0, dtype=torch.uint8), (0,) * len(sizes), sizes)
    device = tensors[filled[0]].device
    values = {i: flat_bits(tensors[i]) for i in filled}
    allowed = {} if within is None else {i: flat_bits(within[i].to(device)) for i in filled}
    outputs = {i: masks[i].reshape(-1).view(torch.int8) for i in filled}
    rows, groups = _table(tensors, values, allowed, outputs, starts, tiles.part)
    table = torch.from_numpy(rows).to(device)
    parts = len(rows)
    digits = DIGITS if any(group.kind == 0 for group in groups) else _HALF_DIGITS
    low = digits[-1][0]
    state = torch.zeros(_STATE_SIZE + len(digits) * _BINS, dtype=torch.int64, device=device)
    ties = torch.empty(parts, dtype=torch.int64, device=device)
    bits = torch.empty(int(starts[-1]), dtype=torch.uint8, device=device)
    inside = _base(allowed) if allowed else values[filled[0]]
    common = {"WITHIN": bool(allowed), "BLOCK": tiles.block, "num_warps": tiles.warps}

    with on_device_of(state):
        for d, (shift, width) in enumerate(digits):
            counts = state[_STATE_SIZE + d * _BINS :]
            for g in groups:
                histogram_kernel[(min(g.rows, tiles.programs),)](
                    g.values, inside, table, state, counts, g.row, g.rows, len(tensors),
                    KIND=g.kind, SHIFT=shift, BITS=width, **common,
                )  # fmt: skip
            digit_kernel[(1,)](state, counts, keep, BITS=width, FIRST=d == 0)
        for g in groups:
            classify_kernel[(min(g.rows, tiles.programs),)](
                g.values, inside, table, state, bits, ties, g.row, g.rows,
                KIND=g.kind, LOW=low, **common,
            )  # fmt: skip
        quota_kernel[(1,)](state, ties, parts, BLOCK=tiles.block)
        for g in groups:
            ties_kernel[(min(g.rows, tiles.programs),)](
                g.values, inside, table, state, bits, ties, g.row, g.rows,
                KIND=g.kind, LOW=low, **common,
            )  # fmt: skip
        masks_kernel[(min(parts, tiles.programs),)](
            bits, table, _base(outputs), parts, BLOCK=tiles.block, num_warps=tiles.warps
        )
        with_nan = int(state[_NAN])
    if with_nan:
        raise ArgumentError(
            f"tensors: {names[len(tensors) - with_nan]} holds NaN, which has no magnitude; "
            "find the step that made it before pruning"
        )
    return Bits(bits, tuple(int(start) for start in starts[:-1]), sizes)


def _base(tensors: dict[int, Tensor]) -> Tensor:
    """The tensor that distances are counted from: at a multiple of 16 bytes if one is."""
    return min(tensors.values(), key=lambda t: t.data_ptr() % 16)


def _table(
    tensors: Sequence[Tensor],
    values: dict[int, Tensor],
    allowed: dict[int, Tensor],
    outputs: dict[int, Tensor],
    starts: npt.NDArray[np.int64],
    part: int,
) -> tuple[npt.NDArray[np.int64], list[_Group]]:
    """One row for each part, those of one dtype together, and in order within a dtype."""
    rows, groups = [], []
    firsts = np.concatenate([[0], np.cumsum([-(-t.numel() // part) for t in tensors])])
    inside = _base(allowed).data_ptr() if allowed else 0
    masks = _base(outputs).data_ptr()
    for kind, dtype in enumerate(_KINDS):
        members = {i: v for i, v in values.items() if tensors[i].dtype == dtype}
        if not members:
            continue
        base, row = _base(members), sum(map(len, rows))
        for i, v in members.items():
            n, size = v.numel(), v.element_size()
            places = np.arange(0, n, part)
            within_at = allowed[i].data_ptr() if allowed else 0
            mask_at = outputs[i].data_ptr()
            assert mask_at % 16 == 0
            block = np.empty((len(places), _COLUMNS.value), np.int64)
            block[:, 0] = (v.data_ptr() - base.data_ptr()) // size + places
            block[:, 1] = within_at - inside + places
            block[:, 2] = starts[i] + places // 8
            block[:, 3] = mask_at - masks + places
            block[:, 4] = np.minimum(part, n - places)
            block[:, 5] = firsts[i] + np.arange(len(places))
            block[:, 6] = i
            block[:, 7] = v.data_ptr() % 16 == 0 and within_at % 16 == 0
            rows.append(block)
        groups.append(_Group(kind, base, row, sum(map(len, rows)) - row))
    return np.concatenate(rows), groups
