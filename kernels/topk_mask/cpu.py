"""Exact selection over a list of tensors on the CPU: README.md has the algorithm."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels import parallel
from sparsekit.kernels.blocks import LANES
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.topk_mask import passes

Table = npt.NDArray[np.uint64]

# Below this many entries all of them are candidates: a sample would cost more than it saves.
_FEW_ENTRIES = 1 << 16
# Two threads pay off from this many entries each.
_ENTRIES_PER_THREAD = 1 << 15
# The bracket reaches this many standard deviations to both sides; one in 370 misses.
_DEVIATIONS = 3.0
# Sampled entries are this times the number of entries to the power of 2/3: then the sample and the
# candidates that it leaves cost about the same.
_SAMPLE_FACTOR = 1.0
# Brackets from the sample before the range is halved blindly.
_SAMPLED_TRIES = 3


# Fresh memory comes page by page, which takes longer than the whole selection: ask for huge pages
# from this size on, as NumPy does.
_LARGE_BYTES = 1 << 22
_PAGE_BYTES = mmap.PAGESIZE
_HUGE_PAGES = 14
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class _Range:
    """Keys between which the threshold lies, and how many lie above and between them."""

    lowest: int
    highest: int
    above: int
    inside: int


def topk_mask(
    tensors: Sequence[Tensor], names: Sequence[str], keep: int, within: Sequence[Tensor] | None
) -> list[Tensor]:
    """Masks of the `keep` largest magnitudes; arguments are those that `sparsekit.ops` checked."""
    values = [t.detach().to(device="cpu", dtype=torch.float32).contiguous() for t in tensors]
    allowed = None if within is None else [m.detach().cpu().contiguous() for m in within]
    masks = [_new_mask(v.shape) for v in values]
    _Selection(values, allowed, masks, names).run(keep)
    return [mask.to(tensor.device) for mask, tensor in zip(masks, tensors, strict=True)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """How tensors of certain sizes are cut into parts; no part is of two tensors."""

    tensor: npt.NDArray[np.int64]
    """Number of each part's tensor."""
    lengths: Table
    begins: Table
    """First entry of each part in its tensor."""
    clusters: Table
    """Clusters of the sample up to and including each part's."""

    @property
    def count(self) -> int:
        """Number of parts."""
        return self.tensor.size


@lru_cache(maxsize=16)
def _cut(sizes: tuple[int, ...]) -> _Parts:
    counts = np.array([-(-size // passes.PART) for size in sizes], np.int64)
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.cumsum(counts) - counts
    begins = (np.arange(tensor.size) - first[tensor]).astype(np.uint64) * np.uint64(passes.PART)
    left = np.array(sizes, np.uint64)[tensor] - begins
    lengths = np.minimum(left, np.uint64(passes.PART))
    entries = max(1, sum(sizes))
    clusters = _SAMPLE_FACTOR * entries ** (2 / 3) / passes.SAMPLED
    ends = np.rint(np.cumsum(lengths) * (clusters / entries))
    of_part = np.diff(ends, prepend=0.0).astype(np.uint64)
    of_part[lengths < passes.SAMPLED] = 0
    return _Parts(tensor, lengths, begins, np.cumsum(of_part))


class _Selection:
    """One call: the tables of its parts and the memory of its candidates."""

    def __init__(
        self,
        values: Sequence[Tensor],
        allowed: Sequence[Tensor] | None,
        masks: Sequence[Tensor],
        names: Sequence[str],
    ) -> None:
        sizes = tuple(v.numel() for v in values)
        self.entries = sum(sizes)
        self.names = names
        self.parts = parts = _cut(sizes)
        self.values = _addresses(values)[parts.tensor] + parts.begins * np.uint64(4)
        self.masks = _addresses(masks)[parts.tensor] + parts.begins
        self.within: Table = np.zeros(parts.count, np.uint64)
        if allowed is not None:
            self.within = _addresses(allowed)[parts.tensor] + parts.begins
        # Bits wait in the first eighth of the mask that they become, if they fit.
        self.short: Table = np.empty(parts.count, np.uint64)
        short = self.short.ctypes.data + 8 * np.arange(parts.count, dtype=np.uint64)
        self.words = np.where(parts.lengths >= LANES, self.masks, short)
        self.above, self.inside, self.nan, self.starts = np.zeros((4, parts.count), np.uint64)
        self.cursor: Table = np.zeros(1, np.uint64)
        self.capacity = max(_FEW_ENTRIES, self.entries // 16)
        self.keys = np.empty(self.capacity, np.uint32)
        self.positions = np.empty(self.capacity, np.uint16)
        self.threads = parallel.thread_count(self.entries, _ENTRIES_PER_THREAD)

    def run(self, keep: int) -> None:
        known = _Range(0, passes.INFINITY, 0, self.entries)
        sampled: npt.NDArray[np.int32] | None = None
        tries = 0
        while True:
            if keep == 0:
                # Nothing is above the largest key: only the search for NaN is left.
                lowest, highest = passes.INFINITY + 1, passes.INFINITY
            elif self.entries <= _FEW_ENTRIES:
                lowest, highest = 0, passes.INFINITY
            else:
                if sampled is None:
                    sampled = self._sample()
                lowest, highest = _bracket(sampled, known, keep, tries, self.capacity)
            above, inside = self._compare(lowest, highest)
            tries += 1
            stored = inside <= self.capacity
            if above >= keep > 0:
                known = _Range(highest + 1, known.highest, known.above, above - known.above)
            elif above + inside < keep:
                between = known.above + known.inside - above - inside
                known = _Range(known.lowest, lowest - 1, above + inside, between)
            elif stored or lowest == highest:
                self._finish(lowest, keep - above, stored)
                return
            else:
                known = _Range(lowest, highest, above, inside)

    def _compare(self, lowest: int, highest: int) -> tuple[int, int]:
        """Numbers of allowed keys above and inside a bracket; candidates are stored if they fit."""
        self.cursor[0] = 0
        self._call(
            passes.bracket,
            lowest=lowest,
            highest=highest,
            above=self.above,
            inside=self.inside,
            nan=self.nan,
            starts=self.starts,
            cursor=self.cursor,
            capacity=self.capacity,
            keys=self.keys,
            positions=self.positions,
        )
        if self.nan.any():
            name = self.names[int(self.parts.tensor[np.argmax(self.nan != 0)])]
            raise ArgumentError(
                f"tensors: {name} holds NaN, which has no magnitude; "
                "find the step that made it before pruning"
            )
        return int(self.above.sum()), int(self.inside.sum())

    def _finish(self, threshold: int, wanted: int, stored: bool) -> None:
        """Write the masks, with `wanted` of the candidates."""
        if stored:
            candidates = self.keys[: int(self.cursor[0])]
            threshold, wanted = _threshold(candidates, wanted)
            quotas = self._quotas_of_stored(candidates == threshold, wanted)
        else:
            quotas = _first_come(self.inside, wanted)
        self._call(
            passes.finish,
            masks=self.masks,
            threshold=threshold,
            quotas=quotas,
            stored=int(stored),
            inside=self.inside,
            starts=self.starts,
            keys=self.keys,
            positions=self.positions,
        )

    def _quotas_of_stored(self, is_tie: npt.NDArray[np.bool_], wanted: int) -> Table:
        ties = np.flatnonzero(is_tie)
        if ties.size == wanted:
            # The usual case: all are kept, and nobody needs to count them by part.
            return self.inside
        # Threads stored their parts' candidates in any order. Of parts that start at one place, all
        # but the last have none.
        order = np.lexsort((self.inside, self.starts))
        owners = order[np.searchsorted(self.starts[order], ties, side="right") - 1]
        counts = np.bincount(owners, minlength=self.parts.count).astype(np.uint64)
        return _first_come(counts, wanted)

    def _sample(self) -> npt.NDArray[np.int32]:
        """Keys of clusters spread evenly over all entries, (clusters, 16)."""
        ends = self.parts.clusters
        found = np.empty((int(ends[-1]), passes.SAMPLED), np.int32)
        self._call(passes.sample, ends=ends, sample=found)
        return found

    def _call(self, kernel: Kernel, **fields: int | npt.NDArray[Any]) -> None:
        tables = {
            "values": self.values,
            "within": self.within,
            "lengths": self.parts.lengths,
            "words": self.words,
        }
        numbers = {
            name: field.ctypes.data if isinstance(field, np.ndarray) else field
            for name, field in (tables | fields).items()
        }
        job = kernel.job(parts=self.parts.count, **numbers)
        parallel.run(kernel.address, job, self.threads)


def _new_mask(shape: torch.Size) -> Tensor:
    mask = torch.empty(shape, dtype=torch.bool, device="cpu")
    if mask.numel() >= _LARGE_BYTES:
        begin = -(-mask.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
        size = (mask.data_ptr() + mask.numel() - begin) // _PAGE_BYTES * _PAGE_BYTES
        _madvise(begin, size, _HUGE_PAGES)
    return mask


def _addresses(tensors: Sequence[Tensor]) -> Table:
    return np.array([t.data_ptr() for t in tensors], np.uint64)


def _first_come(ties: Table, wanted: int) -> Table:
    """How many ties each part keeps when the first in order are kept."""
    before = np.cumsum(ties) - ties
    return np.minimum(np.maximum(wanted - before.astype(np.int64), 0).astype(np.uint64), ties)


def _threshold(candidates: npt.NDArray[np.uint32], wanted: int) -> tuple[int, int]:
    """The `wanted`-th largest candidate, and how many equal to it are among the `wanted`."""
    if wanted == 0:
        return passes.INFINITY + 1, 0
    rank = candidates.size - wanted
    ordered = np.partition(candidates, rank)
    threshold = int(ordered[rank])
    return threshold, wanted - int(np.count_nonzero(ordered[rank:] > threshold))


def _bracket(
    sampled: npt.NDArray[np.int32], known: _Range, keep: int, tries: int, capacity: int
) -> tuple[int, int]:
    """Keys between which the threshold very probably lies, by the sample or halfway."""
    if tries == 0:
        # With the entries that are not allowed, which `known` counts as well.
        keys = sampled.reshape(-1)
    else:
        keys = sampled[(sampled >= known.lowest) & (sampled <= known.highest)]
    if tries >= _SAMPLED_TRIES or keys.size == 0:
        return (known.lowest + known.highest + 1) // 2, known.highest
    rank = (keep - known.above) / known.inside * keys.size
    guess = _largest(keys, int(rank), known)
    # How much the number of larger keys differs from cluster to cluster says how far the rank may
    # be off: neighbours are often alike, so that the sample is worth less than its size.
    larger = (sampled > guess) & (sampled <= known.highest)
    per_cluster = larger.astype(np.float32) @ np.ones(passes.SAMPLED, np.float32)
    # Small whole numbers, so that neither sum is rounded.
    mean = float(per_cluster.sum()) / per_cluster.size
    variance = max(0.0, float(per_cluster @ per_cluster) / per_cluster.size - mean * mean)
    spread = _DEVIATIONS * math.sqrt(per_cluster.size * variance) + 2
    lowest = _largest(keys, int(rank + spread), known)
    highest = _largest(keys, math.floor(rank - spread), known)
    share = np.count_nonzero((keys >= lowest) & (keys <= highest)) / keys.size
    if share * known.inside > capacity:
        # One value is so frequent that it must be the guess.
        return guess, guess
    return lowest, highest


def _largest(keys: npt.NDArray[np.int32], rank: int, known: _Range) -> int:
    """The key that `rank` others are above, or an end of the range if there is none."""
    if not 0 <= rank < keys.size:
        return known.highest if rank < 0 else known.lowest
    index = keys.size - 1 - rank
    # NumPy is quick for one index, but not for several at once.
    return max(int(np.partition(keys, index)[index]), known.lowest)
