"""Adding up what sites send back, one update at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE = 1 << 20


@dataclass(frozen=True)
class Update:
    """A site's decoded and checked reply."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor] | None
    n_train: int


class Merger:
    """Adds up updates one after the other, so that none has to wait for the others in memory.

    The order of `add` decides the last bits: callers go by the sites' names.
    """

    def __init__(self) -> None:
        self.votes: list[dict[str, Tensor]] = []
        """Masks of the sites that chose some."""
        self._sums: dict[str, Tensor] = {}
        self._scans = 0

    def add(self, update: Update) -> None:
        """Add a site's weights, times its number of training scans, to float64 sums."""
        for name, weights in update.weights.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(weights.shape, dtype=torch.float64)
            sums, flat = self._sums[name].view(-1), weights.reshape(-1)
            for piece in pieces(len(flat)):
                # No rounding here: 24 bits times the number of scans fit into float64's 53.
                sums[piece] += flat[piece].double() * update.n_train
        self._scans += update.n_train
        if update.masks is not None:
            self.votes.append(update.masks)

    def average(self) -> dict[str, Tensor]:
        """Return the average by number of training scans, float32, and let go of the sums."""
        assert self._scans, "a round without updates must end before aggregation"
        merged: dict[str, Tensor] = {}
        for name in list(self._sums):
            sums = self._sums.pop(name)
            merged[name] = torch.empty(sums.shape)
            for piece in pieces(sums.numel()):
                # + 0.0 turns -0.0 into +0.0, which is all that the codec would change.
                merged[name].view(-1)[piece] = sums.view(-1)[piece] / self._scans + 0.0
        return merged


def pieces(count: int) -> Iterator[slice]:
    """Cut a tensor of ``count`` elements, so that its float64 copy never is there as a whole."""
    for first in range(0, count, _PIECE):
        yield slice(first, min(count, first + _PIECE))
