"""Masks that keep the weights of largest magnitude."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.errors import ArgumentError, EmptiedLayerWarning
from sparsekit.masks import check_mask, prunable_parameters
from sparsekit.ops import topk_mask
from sparsekit.prune.counts import check_work, erk_counts, flops_counts
from sparsekit.prune.grouped import guarded
from sparsekit.prune.groups import N_OF_M, Form, groups_of, parse, two_of_four
from sparsekit.types import Masks, State

SCOPES = ("global", "layer", "erk", "flops")


def magnitude_masks(
    model_or_tensors: nn.Module | State,
    sparsity: float,
    *,
    scope: str = "global",
    granularity: str = "weight",
    within: Masks | None = None,
    min_per_filter: int = 1,
    work: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Masks that keep the weights of largest magnitude, with exact counts.

    Of N entries, ``min(N - int(sparsity * N), alive)`` are kept, alive being what `within` keeps.
    Of equal magnitudes the first in order wins.

    Parameters
    ----------
    model_or_tensors : Module or mapping of Tensor
        A model stands for the weights of its convolutions and linear layers
        (`prunable_parameters`); of a mapping every tensor is pruned.
    sparsity : float
        Share of entries to prune, from 0 to 1.
    scope : {"global", "layer", "erk", "flops"}
        Compare magnitudes over all tensors together; or prune each tensor to `sparsity`; or give
        each tensor a density in proportion to the sum of its sizes over their product
        (Erdos-Renyi-Kernel, Evci et al., arXiv 1911.11134), dense tensors passing their surplus
        on, with the same exact total; or, with that total too, weigh what each weight adds to its
        tensor's energy against the work that it causes (`sparsekit.prune.counts.flops_counts`).
    granularity : {"weight", "vector:V", "block:VxW", "filter", "2:4"}
        What is kept or pruned as one: a weight; the weights of V output channels (axis 0) at one
        input channel (axis 1) and tap, or of V by W at one tap, counted from channel 0, fewer at
        the end; a slice along axis 0. Groups compete by the mean magnitude of their weights,
        a float32 sum in a fixed order (`sparsekit.prune.groups`), and as many are kept, in the
        order of these, as the exact count has room for. "2:4" keeps the 2 largest of every 4
        consecutive input channels; `sparsity` must be 0.5, and `scope` has no say.
    within : mapping of bool Tensor, optional
        An earlier mask with the same names; the new one lies inside it.
    min_per_filter : int
        Keep at least this many weights in each slice along axis 0 of tensors with 2 or more axes,
        as far as `within` has them; the smallest weights elsewhere give way, so that the total
        stays exact. With "filter", each such tensor keeps one slice. 0 turns the guard off.
    work : mapping of float, optional
        For ``scope="flops"``: operations that one weight of each tensor causes, in any unit;
        `sparsekit.flops.work_per_weight` counts them.

    Returns
    -------
    dict of Tensor, bool
        By parameter name.

    Raises
    ------
    ArgumentError
        A value is out of range or not in this release, or a tensor holds NaN.
    ArgumentTypeError
        A dtype is not supported (see `sparsekit.topk_mask`).

    Warns
    -----
    EmptiedLayerWarning
        Too few weights are kept for the guard, or a tensor keeps none.

    Examples
    --------
    >>> masks = magnitude_masks({"w": torch.tensor([[1.0, -4.0], [3.0, 2.0]])}, 0.5)
    >>> masks["w"]
    tensor([[False,  True],
            [ True, False]])
    """
    if scope not in SCOPES:
        raise ArgumentError(f"scope: expected one of {', '.join(map(repr, SCOPES))}, got {scope!r}")
    form = parse(granularity)
    if not 0.0 <= sparsity <= 1.0:
        raise ArgumentError(f"sparsity: expected a number from 0 to 1, got {sparsity}")
    if granularity == N_OF_M and sparsity != 0.5:
        raise ArgumentError(f"sparsity: '2:4' prunes 2 of 4, expected 0.5, got {sparsity}")
    if min_per_filter < 0:
        raise ArgumentError(f"min_per_filter: expected a count >= 0, got {min_per_filter}")
    tensors = _tensors_of(model_or_tensors)
    if scope == "flops":
        check_work(tensors, work)
    elif work is not None:
        raise ArgumentError(f"work: only for scope='flops', and scope is {scope!r}; leave it out")
    if within is None:
        alive = {name: t.numel() for name, t in tensors.items()}
    else:
        if within.keys() != tensors.keys():
            differing = sorted(within.keys() ^ tensors.keys())
            raise ArgumentError(
                f"within: expected one mask per tensor; without a partner: {differing}"
            )
        for name, tensor in tensors.items():
            check_mask(name, within[name], tensor)
        alive = {name: int(within[name].count_nonzero()) for name in tensors}

    total = sum(t.numel() for t in tensors.values())
    keep = min(total - int(sparsity * total), sum(alive.values()))
    if granularity == N_OF_M:
        masks = two_of_four(tensors, within)
    elif scope == "global":
        masks = _selected(tensors, keep, within, min_per_filter, form)
    else:
        if scope == "layer":
            counts = {
                name: min(t.numel() - int(sparsity * t.numel()), alive[name])
                for name, t in tensors.items()
            }
        elif scope == "erk":
            counts = erk_counts(tensors, keep, alive)
        else:
            assert work is not None
            counts = flops_counts(tensors, keep, within, work)
        masks = {}
        for name, tensor in tensors.items():
            inside = None if within is None else {name: within[name]}
            masks |= _selected({name: tensor}, counts[name], inside, min_per_filter, form)
    _warn_if_emptied(masks, alive)
    return masks


def _tensors_of(model_or_tensors: nn.Module | State) -> dict[str, Tensor]:
    if isinstance(model_or_tensors, nn.Module):
        tensors: dict[str, Tensor] = dict(prunable_parameters(model_or_tensors))
        if not tensors:
            raise ArgumentError(
                "model_or_tensors: the model has no convolution or linear layer to prune"
            )
        return tensors
    return dict(model_or_tensors)


def _selected(
    tensors: State, keep: int, within: Masks | None, min_per_filter: int, form: Form | None
) -> dict[str, Tensor]:
    if form is None:
        return _guarded_topk(tensors, keep, within, min_per_filter)
    groups = groups_of(tensors, within, form)
    masks = {
        name: groups[name].layout.spread(chosen)
        for name, chosen in guarded(groups, keep, min_per_filter).items()
    }
    if within is None:
        return masks
    return {name: m & within[name].to(m.device) for name, m in masks.items()}


def _guarded_topk(
    tensors: State, keep: int, within: Masks | None, min_per_filter: int
) -> dict[str, Tensor]:
    masks = topk_mask(tensors, keep, within=within)
    if min_per_filter == 0 or not _starved(masks, within, min_per_filter):
        return masks
    forced = {
        name: _best_per_filter(t, None if within is None else within[name], min_per_filter)
        for name, t in tensors.items()
    }
    forced_count = sum(int(m.count_nonzero()) for m in forced.values())
    if forced_count >= keep:
        if forced_count > keep:
            warnings.warn(
                f"{keep} kept weights are too few to give each filter of "
                f"{', '.join(tensors)} {min_per_filter} (that needs {forced_count}): "
                f"{forced_count - keep} are missing; choose a lower sparsity",
                EmptiedLayerWarning,
                stacklevel=4,
            )
        return topk_mask(tensors, keep, within=forced)
    free = {name: ~m if within is None else within[name] & ~m for name, m in forced.items()}
    rest = topk_mask(tensors, keep - forced_count, within=free)
    return {name: forced[name] | rest[name] for name in tensors}


def _filters(tensor: Tensor) -> Tensor | None:
    """One row per filter, or None where the guard does not apply."""
    if tensor.ndim < 2 or tensor.numel() == 0:
        return None
    return tensor.reshape(tensor.shape[0], -1)


def _starved(masks: Masks, within: Masks | None, least: int) -> bool:
    """Whether a filter keeps fewer weights than the guard grants it."""
    for name, mask in masks.items():
        rows = _filters(mask)
        if rows is None:
            continue
        granted = torch.full((rows.shape[0],), min(least, rows.shape[1]), device=rows.device)
        if within is not None:
            granted = granted.minimum(within[name].reshape(rows.shape).sum(dim=1))
        if bool((rows.sum(dim=1) < granted).any()):
            return True
    return False


def _best_per_filter(tensor: Tensor, within: Tensor | None, least: int) -> Tensor:
    rows = _filters(tensor)
    if rows is None:
        return torch.zeros_like(tensor, dtype=torch.bool)
    size = rows.detach().abs().float().cpu().numpy()
    if within is not None:
        size = np.where(within.reshape(size.shape).cpu().numpy(), size, -1.0)
    # Both keep the order of equal magnitudes: the first wins, as in topk_mask.
    if least == 1:
        best = size.argmax(axis=1)[:, None]
    else:
        best = np.argsort(-size, axis=1, kind="stable")[:, :least]
    chosen = np.zeros(size.shape, np.bool_)
    np.put_along_axis(chosen, best, np.take_along_axis(size, best, axis=1) >= 0.0, axis=1)
    return torch.from_numpy(chosen.reshape(tensor.shape)).to(tensor.device)


def _warn_if_emptied(masks: Masks, alive: Mapping[str, int]) -> None:
    emptied = [name for name, m in masks.items() if alive[name] and not bool(m.any())]
    if emptied:
        warnings.warn(
            f"no weight is left in {', '.join(emptied)}; choose a lower sparsity, "
            "scope='layer' or scope='erk'",
            EmptiedLayerWarning,
            stacklevel=3,
        )


def paper_masks(tensors: State, sparsity: float) -> dict[str, Tensor]:
    """Masks by the rule of the released FedSparsify code, for comparison with it.

    One threshold over all given tensors (the authors take every trainable one, biases included):
    the value at index ``int(sparsity * N)`` of the sorted magnitudes. Everything at or above it
    is kept, so ties are all kept and the count is not exact.

    Parameters
    ----------
    tensors : mapping of Tensor
        float32, float16 or bfloat16.
    sparsity : float
        From 0 to below 1.

    Returns
    -------
    dict of Tensor, bool
        By name.

    Warns
    -----
    EmptiedLayerWarning
        A tensor keeps nothing.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ArgumentError(f"sparsity: expected a number from 0 to below 1, got {sparsity}")
    total = sum(t.numel() for t in tensors.values())
    if total == 0:
        return {name: torch.zeros_like(t, dtype=torch.bool) for name, t in tensors.items()}
    # The threshold is the smallest of the N - int(s * N) largest magnitudes.
    largest = topk_mask(tensors, total - int(sparsity * total))
    threshold = min(
        float(t.detach()[largest[name]].abs().min()) for name, t in tensors.items()
        if bool(largest[name].any())
    )  # fmt: skip
    masks = {name: t.detach().float().abs() >= threshold for name, t in tensors.items()}
    _warn_if_emptied(masks, {name: t.numel() for name, t in tensors.items()})
    return masks
