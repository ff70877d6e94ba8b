"""Exact selection over a list of tensors on a GPU: README.md has the algorithm.

Tensors are read where they lie: the table of their parts has distances from one of them, so that
one launch serves all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.topk_mask import triton_passes as passes
from sparsekit.kernels.triton_launch import flat_bits, launch


@dataclass(frozen=True, slots=True)
class Tiles:
    """How launches cut their work; tests take small ones, so that little data has many parts."""

    part: int = 1 << 14
    """Entries of a row of the table; a multiple of the two below and of 128."""
    counted: int = 1 << 12
    """Entries that a program counts at a time; more of them share the histogram's overhead. Of
    16-bit floats half as many, and of float32 on AMD a quarter: gfx942 has few scalar registers."""
    block: int = 1 << 11
    """Entries that a program holds at a time otherwise; a power of two, at least 16."""
    programs: int = 1024
    """Most programs of a launch: each adds its whole histogram to the joint one, once."""
    warps: int = 8

    def counted_of(self, kind: int, *, amd: bool) -> int:
        """Entries of a dtype that a program counts at a time."""
        return self.counted // (2 if kind else 4 if amd else 1)

    @property
    def tied(self) -> int:
        """Entries that a program holds where ties are chosen: of more, registers spill."""
        return max(16, self.block // 2)


TILES = Tiles()


# By their place here, the kernels' KIND.
_KINDS = (torch.float32, torch.bfloat16, torch.float16)
ZEROS = (0, 16, 13)
"""Bits that keys of each kind end in, all 0."""

DIGITS = {
    0: ((23, 8), (15, 8), (7, 8), (0, 7)),
    13: ((25, 6), (19, 6), (13, 6)),
    16: ((23, 8), (16, 7)),
}
"""By the zeros that all keys end in, the digits that matter, from the highest: position of the
lowest bit, and number of bits. A histogram's work grows with its bins."""

# Numbers in the state before the histograms, one after the other.
_STATE_SIZE = 4
_BINS = 1 << 8

QUOTAS = 1 << 10
"""Parts of which the one program of `quota_kernel` takes care at a time."""


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
    low = min(ZEROS[group.kind] for group in groups)
    digits = DIGITS[low]
    state = torch.zeros(_STATE_SIZE + len(digits) * _BINS, dtype=torch.int64, device=device)
    ties = torch.empty(parts, dtype=torch.int64, device=device)
    bits = torch.empty(int(starts[-1]), dtype=torch.uint8, device=device)
    inside = _base(allowed) if allowed else values[filled[0]]
    common = {"WITHIN": int(bool(allowed)), "warps": tiles.warps}
    amd = torch.version.hip is not None

    for d, (shift, width) in enumerate(digits):
        counts = state[_STATE_SIZE + d * _BINS :]
        for g in groups:
            launch(
                passes.histogram_kernel, min(g.rows, tiles.programs),
                g.values, inside, table, state, counts, g.row, g.rows, len(tensors),
                KIND=g.kind, SHIFT=shift, BITS=width, BLOCK=tiles.counted_of(g.kind, amd=amd),
                **common,
            )  # fmt: skip
        launch(passes.digit_kernel, 1, state, counts, keep, BITS=width, FIRST=d == 0)
    for g in groups:
        launch(
            passes.classify_kernel, min(g.rows, tiles.programs),
            g.values, inside, table, state, bits, ties, g.row, g.rows,
            KIND=g.kind, LOW=low, BLOCK=tiles.block, **common,
        )  # fmt: skip
    launch(passes.quota_kernel, 1, state, ties, parts, BLOCK=QUOTAS)
    for g in groups:
        launch(
            passes.ties_kernel, min(g.rows, tiles.programs),
            g.values, inside, table, state, bits, ties, g.row, g.rows,
            KIND=g.kind, LOW=low, BLOCK=tiles.tied, **common,
        )  # fmt: skip
    launch(
        passes.masks_kernel, min(parts, tiles.programs), bits, table, _base(outputs), parts,
        BLOCK=tiles.block, warps=tiles.warps,
    )  # fmt: skip
    with_nan = int(state[passes.NAN.value])
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
    rows: list[npt.NDArray[np.int64]] = []
    groups = []
    firsts = np.concatenate([[0], np.cumsum([-(-t.numel() // part) for t in tensors])])
    inside = _base(allowed).data_ptr() if allowed else 0
    masks = _base(outputs).data_ptr()
    for kind, dtype in enumerate(_KINDS):
        members = {i: v for i, v in values.items() if tensors[i].dtype == dtype}
        if not members:
            continue
        base, row = _base(members), sum(len(block) for block in rows)
        for i, v in members.items():
            n, size = v.numel(), v.element_size()
            places = np.arange(0, n, part)
            within_at = allowed[i].data_ptr() if allowed else 0
            mask_at = outputs[i].data_ptr()
            assert mask_at % 16 == 0
            block = np.empty((len(places), passes.COLUMNS.value), np.int64)
            block[:, 0] = (v.data_ptr() - base.data_ptr()) // size + places
            block[:, 1] = within_at - inside + places
            block[:, 2] = starts[i] + places // 8
            block[:, 3] = mask_at - masks + places
            block[:, 4] = np.minimum(part, n - places)
            block[:, 5] = firsts[i] + np.arange(len(places))
            block[:, 6] = i
            block[:, 7] = v.data_ptr() % 16 == 0 and within_at % 16 == 0
            rows.append(block)
        groups.append(_Group(kind, base, row, sum(len(block) for block in rows) - row))
    return np.concatenate(rows), groups
