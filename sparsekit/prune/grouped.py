"""Selection of whole groups of weights: the selector of single weights, run on their scores."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.errors import EmptiedLayerWarning
from sparsekit.ops import topk_mask
from sparsekit.prune.groups import Groups


def guarded(groups: Mapping[str, Groups], keep: int, least: int) -> dict[str, Tensor]:
    """Choose the groups of largest scores that together keep at most `keep` weights.

    Parameters
    ----------
    groups : mapping of Groups
    keep : int
        Weights.
    least : int
        Each output channel of a tensor with 2 or more axes keeps so many weights, as far as they
        may be kept; where filters are kept or pruned whole, each tensor keeps one if this is not 0.

    Returns
    -------
    dict of Tensor, (rows, columns), bool
        Of equal scores the first ones; as many groups as `keep` has room for, in the order of
        their scores.
    """
    chosen = _most(groups, keep, None)
    if least == 0 or not any(_starved(g, chosen[name], least) for name, g in groups.items()):
        return chosen
    forced = {name: _best_of_rows(g, least) for name, g in groups.items()}
    needed = _weights(groups, forced)
    if needed > keep:
        warnings.warn(
            f"{keep} kept weights are too few to give each filter of {', '.join(groups)} its "
            f"share (that needs groups of {needed} weights); choose a lower sparsity",
            EmptiedLayerWarning,
            stacklevel=4,
        )
        return _most(groups, keep, forced)
    rest = _most(groups, keep - needed, {name: ~mask for name, mask in forced.items()})
    return {name: forced[name] | rest[name] for name in groups}


def _most(
    groups: Mapping[str, Groups], keep: int, candidates: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Choose the groups of largest scores, as many as keep at most `keep` weights."""
    open_groups = {
        name: g.sizes > 0 if candidates is None else (g.sizes > 0) & candidates[name]
        for name, g in groups.items()
    }
    sizes = torch.cat([g.sizes[open_groups[name]].cpu() for name, g in groups.items()])
    scores = {name: g.scores for name, g in groups.items()}
    if not sizes.numel():
        return topk_mask(scores, 0)
    # One number of groups if all have one size; else it is searched for between two.
    low = min(sizes.numel(), keep // int(sizes.max()))
    high = min(sizes.numel(), keep // int(sizes.min()))
    chosen = topk_mask(scores, low, within=open_groups)
    while low < high:
        middle = (low + high + 1) // 2
        tried = topk_mask(scores, middle, within=open_groups)
        if _weights(groups, tried) <= keep:
            low, chosen = middle, tried
        else:
            high = middle - 1
    return chosen


def _weights(groups: Mapping[str, Groups], chosen: Mapping[str, Tensor]) -> int:
    """Weights that a choice of groups keeps."""
    return sum(int((g.sizes * chosen[name]).sum()) for name, g in groups.items())


def _starved(groups: Groups, chosen: Tensor, least: int) -> bool:
    """Whether a channel keeps fewer weights than the guard grants it, or a tensor none at all."""
    layout = groups.layout
    if len(layout.shape) < 2:
        return False
    if layout.form.whole_filter:
        return bool(groups.alive.any()) and not bool(chosen.any())
    kept = (groups.alive * chosen[:, :, None]).sum(1)
    return bool((kept < groups.alive.sum(1).clamp(max=least)).any())


def _best_of_rows(groups: Groups, least: int) -> Tensor:
    """Choose the best groups of each row until each of its channels has its share."""
    scores, alive = groups.scores, groups.alive
    if len(groups.layout.shape) < 2:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Groups without a weight come last, where they add nothing.
    ranked = torch.where(groups.sizes > 0, scores, -1.0)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    counts = alive.gather(1, order[:, :, None].expand_as(alive)).cumsum(1)
    before = torch.cat([torch.zeros_like(counts[:, :1]), counts[:, :-1]], 1)
    share = 1 if groups.layout.form.whole_filter else least
    wanted = (before < counts[:, -1:].clamp(max=share)).any(2)
    return torch.zeros_like(wanted).scatter(1, order, wanted) & (groups.sizes > 0)
