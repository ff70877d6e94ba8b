"""One mask out of many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.masks import check_mask
from sparsekit.types import Masks


def majority_vote(masks_of_clients: Sequence[Masks]) -> dict[str, Tensor]:
    """Keep what at least half of the clients keep (rounded down, at least one).

    Parameters
    ----------
    masks_of_clients : sequence of mapping of bool Tensor
        All with the same names and shapes.

    Returns
    -------
    dict of Tensor, bool
        True where ``votes >= max(1, n // 2)`` for n clients, so that a tie keeps.
    """
    if not masks_of_clients:
        raise ArgumentError("masks_of_clients: expected at least one client's masks, got none")
    first = masks_of_clients[0]
    for i, masks in enumerate(masks_of_clients):
        if masks.keys() != first.keys():
            differing = sorted(masks.keys() ^ first.keys())
            raise ArgumentError(f"masks_of_clients: client {i} differs from 0 in {differing}")
        for name, mask in masks.items():
            check_mask(f"{name} of client {i}", mask, first[name])
    needed = max(1, len(masks_of_clients) // 2)
    return {
        name: sum((m[name].to(torch.int32) for m in masks_of_clients), torch.tensor(0)) >= needed
        for name in first
    }
