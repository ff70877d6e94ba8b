"""Selecting the weights to keep, beside what else selects: NumPy, torch.topk, torch's own pruning.

All sides get the same values, made outside the timed call, and give masks; ``read`` is one sum
over the weights, below which nothing can select. What NumPy and torch.topk need first, all weights
in one array, is not counted. torch's pruning replaces parameters of modules: fresh ones are made
for every call, and what that takes is part of its time (a copy of the weights).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit.bench.pairs import OURS, Case
from sparsekit.errors import DisagreementError
from sparsekit.ops import topk_mask

SIZES = (3_000_000, 30_000_000)
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
READ, PARTITION, TOPK, PRUNE = "read", "np.partition", "torch.topk", "global_unstructured"
# As different in size as the tensors of a network.
_SHARES = (0.02, 0.08, 0.3, 0.6)
# Ties are few among normal numbers, but NumPy keeps all of them and torch others.
_MOST_TIES = 20


def weights_of(size: int) -> list[Tensor]:
    """Normal weights in four tensors."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    parts = values.split([round(share * size) for share in _SHARES])
    return [part.clone() for part in parts]


def topk_case(weights: list[Tensor], sparsity: float, slow_every: int) -> Case:
    """Keep a share of the weights; the two slowest sides run in every `slow_every`-th round."""
    size = sum(w.numel() for w in weights)
    pruned = int(sparsity * size)
    keep = size - pruned
    joint = torch.cat(weights)
    array = joint.numpy()

    def partition() -> Any:
        magnitudes = np.abs(array)
        return magnitudes >= np.partition(magnitudes, pruned)[pruned]

    def topk() -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[joint.abs().topk(keep, sorted=False).indices] = True
        return mask

    def unstructured() -> list[Tensor]:
        modules = []
        for weight in weights:
            module = nn.Module()
            module.weight = nn.Parameter(weight.clone())
            modules.append(module)
        torch_prune.global_unstructured(
            [(module, "weight") for module in modules], torch_prune.L1Unstructured, amount=pruned
        )
        return [module.get_buffer("weight_mask").bool() for module in modules]

    def ours() -> list[Tensor]:
        return topk_mask(weights, keep)

    _check(torch.cat(ours()), torch.from_numpy(partition()), keep)
    _check(torch.cat(ours()), topk(), keep)
    labels = {"what": "topk_mask", "weights": size, "sparsity": sparsity}
    sides = {
        PRUNE: unstructured,
        TOPK: topk,
        PARTITION: partition,
        READ: lambda: [w.sum() for w in weights],
        OURS: ours,
    }
    return Case(labels, sides, every={PRUNE: slow_every, TOPK: slow_every})


def _check(ours: Tensor, theirs: Tensor, keep: int) -> None:
    if int(ours.sum()) != keep:
        raise DisagreementError(f"topk_mask: expected {keep} entries, got {int(ours.sum())}")
    different = int((ours != theirs).sum())
    if different > _MOST_TIES:
        raise DisagreementError(f"topk_mask: {different} entries differ from the other side's")
