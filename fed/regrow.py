"""Regrowth: pruned weights with large gradients take the places of the smallest kept ones.

After RigL (Evci et al., arXiv 1911.11134), across sites. A site trains, then finds the gradients of
all weights, pruned ones too, on a few of its scans, and adds the pruned weights with the largest
ones to its update. The server averages these like weights, ranks them, and lets the best come back
as 0. A gradient of pruned weights costs dense work, which the site's report counts.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit import flops, prune
from sparsekit.fed.plan import TrainPlan, build_model
from sparsekit.fed.seeds import derive_seed
from sparsekit.fed.training import Cancelled, Scans, load_batch
from sparsekit.ops import topk_mask
from sparsekit.types import Masks, State


def exchanged(mask: Tensor, share: float | None) -> int:
    """Return how many weights of a tensor a round may replace; None stands for no regrowth."""
    kept = int(mask.count_nonzero())
    return 0 if share is None else min(int(share * kept), mask.numel() - kept)


def dense_gradients(
    model: nn.Module,
    data: Scans,
    plan: TrainPlan,
    *,
    site: str,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Tensor], int]:
    """Find the gradients of all weights on ``plan.regrow_scans`` of a site's scans.

    Parameters
    ----------
    model : Module
        Trained, with masks; not changed.

    Returns
    -------
    dict of Tensor, int
        Gradients by parameter name on the CPU, and the number of scans that were used.

    Raises
    ------
    Cancelled
        Between two batches, once ``cancelled()`` is true.
    """
    # Without masks, whose kernels leave pruned weights out.
    dense = build_model(plan).to(device)
    parameters = dict(dense.named_parameters())
    with torch.no_grad():
        for name, trained in model.named_parameters():
            parameters[name].copy_(trained)
    dense.train()
    random = np.random.default_rng(derive_seed(plan.seed, "regrow", site))
    generator = torch.Generator(device).manual_seed(derive_seed(plan.seed, "regrow dropout", site))
    order = random.permutation(len(data))[: plan.regrow_scans]
    for start in range(0, len(order), plan.batch):
        if cancelled():
            raise Cancelled
        x, y = load_batch(data, order[start : start + plan.batch], plan, device)
        error = (dense(x, generator=generator) - y) / plan.age_scale
        error.square().sum().backward()
    found = {
        # A gradient that has overflowed says nothing about its weight.
        name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu().nan_to_num_(0, 0, 0)
        for name, p in parameters.items()
    }
    return found, len(order)


def gradient_flops(model: nn.Module, plan: TrainPlan) -> tuple[int, int]:
    """Return the operations of one scan's dense gradients: those needed, and those done.

    Needed are the forward pass and the gradients of inputs with the unpruned weights, and the
    gradients of all weights. Done is a dense training step.
    """
    report = flops.count(model, (1, 1, *plan.in_shape))
    needed = sum(
        layer.forward + layer.dense_weight_grad + layer.input_grad
        for layer in report.by_layer.values()
    )
    return needed, report.dense_train_step


def propose(
    updated: State, received: State, masks: Masks, gradients: State, share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add the pruned weights with the largest gradients to an update.

    Their values are steps against the gradient, scaled so that each layer's largest is as large as
    its largest change in this round: a coarse coding of changes then holds them too.

    Parameters
    ----------
    updated, received : mapping of Tensor
        The site's weights after and before its training.
    masks : mapping of bool Tensor
        Of both.
    gradients : mapping of Tensor
        Of all weights, at `updated`.
    share : float
        Of each layer's kept weights, how many to propose.

    Returns
    -------
    weights, masks : dict of Tensor
        The update to send.
    """
    weights, widened = dict(updated), dict(masks)
    for name, mask in masks.items():
        free = ~mask & (gradients[name] != 0)
        size = {name: gradients[name].abs()}
        count = min(exchanged(mask, share), int(free.count_nonzero()))
        if count == 0:
            continue
        chosen = topk_mask(size, count, within={name: free})[name]
        change = float((updated[name] - received[name]).abs().max())
        step = gradients[name] / size[name][chosen].max() * -change
        weights[name] = torch.where(chosen, step, updated[name])
        widened[name] = mask | chosen
    return weights, widened


def exchange(
    weights: State,
    masks: Masks,
    before: Masks,
    share: float,
    *,
    min_per_filter: int,
) -> dict[str, Tensor]:
    """Let the best proposals take the places of each tensor's smallest weights.

    Parameters
    ----------
    weights : mapping of Tensor
        Averaged updates: outside of `before` they are the sites' proposals.
    masks : mapping of bool Tensor
        What this round's pruning keeps, inside `before`. Every tensor's count stays.
    before : mapping of bool Tensor
        Masks that the round trained with.
    share : float
        Of each tensor's kept weights, how many to replace, as far as there are proposals.
    min_per_filter : int
        As many weights of each filter are not replaced.

    Returns
    -------
    dict of bool Tensor
    """
    changed: dict[str, Tensor] = {}
    for name, mask in masks.items():
        proposals = ~before[name] & (weights[name] != 0)
        spare = int(mask.count_nonzero()) - _guarded(mask, min_per_filter)
        count = min(exchanged(mask, share), int(proposals.count_nonzero()), spare)
        stay = _largest({name: weights[name]}, {name: mask}, count, min_per_filter)[name]
        size = {name: weights[name].abs()}
        changed[name] = stay | topk_mask(size, count, within={name: proposals})[name]
    return changed


def _guarded(mask: Tensor, least: int) -> int:
    """Return how many weights of a tensor the guard of its filters holds."""
    if mask.ndim < 2:
        return 0
    return int(mask.flatten(1).sum(1).clamp(max=least).sum())


def _largest(
    weights: Mapping[str, Tensor], within: Masks, dropped: int, min_per_filter: int
) -> dict[str, Tensor]:
    """Keep all but ``dropped`` of the weights inside one tensor's mask."""
    (name,) = within
    entries = within[name].numel()
    pruned = entries - int(within[name].count_nonzero()) + dropped
    # A share that gives this count, however it is rounded.
    share = min(1.0, (pruned + 0.5) / entries)
    return prune.magnitude_masks(weights, share, within=within, min_per_filter=min_per_filter)
