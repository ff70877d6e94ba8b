"""The federation's algorithm as pure functions: plan a round, update at a site, aggregate.

Global pruning (``fedsparsify-global``, ``centralized``): the server averages, then keeps the
largest weights of the average. Local pruning (``fedsparsify-local``): each site keeps the largest
of its own trained weights, the server keeps what a majority kept and averages all sites there.
Both follow Stripelis et al., "Towards Sparsified Federated Neuroimaging Models via Weight
Pruning", and the released code where the paper is silent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sparsekit import prune
from sparsekit.codec import decode, decode_masks, encode, inspect
from sparsekit.codec.core import STEPS, Level, Values
from sparsekit.codec.wire import Buffer
from sparsekit.errors import CodecError, TemplateError, ValueRangeError
from sparsekit.fed import messages
from sparsekit.fed.config import RunConfig
from sparsekit.fed.merging import Merger, Update, pieces
from sparsekit.fed.plan import (
    TASK_EVALUATE,
    TASK_TRAIN,
    TrainPlan,
    build_model,
    plan_for,
    to_control,
    work_per_weight,
)
from sparsekit.fed.pruning import regrown_share, scheduled_sparsity
from sparsekit.fed.regrow import exchange, exchanged
from sparsekit.fed.seeds import derive_seed
from sparsekit.types import Masks, Size3, State


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round.

    Attributes
    ----------
    round : int
        Rounds completed.
    weights : dict of Tensor
        The model, float32 on the CPU; exactly 0 outside the masks.
    masks : dict of bool Tensor, or None
        Masks of the prunable tensors; None before the first pruning.
    mean_age : float
        Initial output of the network, years.
    first_voxel, in_shape : tuple of int
        The part of each scan that the network sees.
    sent : dict of Tensor, or None
        The model as the sites decoded it last; None before the first round. What is sent next may
        lean on it.
    """

    round: int
    weights: dict[str, Tensor]
    masks: dict[str, Tensor] | None
    mean_age: float
    first_voxel: Size3
    in_shape: Size3
    sent: dict[str, Tensor] | None = None


class NonFiniteUpdateError(CodecError):
    """An update holds NaN or infinity."""


class LargeUpdateError(CodecError):
    """An update is further from what was sent than the run allows."""


def initial_state(
    config: RunConfig, *, in_shape: Size3, mean_age: float, first_voxel: Size3 = (0, 0, 0)
) -> ServerState:
    """Draw the first model from the run's seed, and prune it where the run starts sparse."""
    plan = plan_for(
        config,
        round_number=1,
        task=TASK_TRAIN,
        first_voxel=first_voxel,
        in_shape=in_shape,
        mean_age=mean_age,
        masked=False,
        local_sparsity=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initial weights"))
        model = build_model(plan)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = None
    if config.sparse and config.initial_sparsity:
        masks = purge_masks(
            weights,
            config.initial_sparsity,
            paper=config.paper,
            scope=config.scope,
            min_per_filter=config.min_per_filter,
            within=None,
            work=_work(config.scope, config.width, in_shape),
            granularity=config.granularity,
        )
        prune.zero_outside(weights, masks)
    return ServerState(
        round=0,
        weights=weights,
        masks=masks,
        mean_age=mean_age,
        first_voxel=first_voxel,
        in_shape=in_shape,
    )


@dataclass(frozen=True)
class Order:
    """What the server sends in a round.

    Attributes
    ----------
    plan : TrainPlan
        The work.
    message : bytes
        Plan and model.
    based : bool
        Whether only a site that holds the model sent before can decode it.
    sent : ServerState
        The state as the sites decode it: the base of their replies.
    """

    plan: TrainPlan
    message: bytes
    based: bool
    sent: ServerState

    @property
    def payload(self) -> memoryview:
        """The model, a view of the message."""
        return messages.unpack(self.message).payload


def plan_round(state: ServerState, config: RunConfig) -> Order:
    """Return the work order of the next round and the payload that goes with it.

    After the last round the order is to evaluate only: the sites receive the final model.
    """
    number = state.round + 1
    last = number > config.rounds
    local = config.strategy == "fedsparsify-local" and not last
    plan = plan_for(
        config,
        round_number=number,
        task=TASK_EVALUATE if last else TASK_TRAIN,
        first_voxel=state.first_voxel,
        in_shape=state.in_shape,
        mean_age=state.mean_age,
        masked=state.masks is not None,
        local_sparsity=scheduled_sparsity(config, number) if local else None,
    )
    payload = encode_model(state.weights, plan, masks=state.masks, base=state.sent)
    weights = state.weights
    if config.values != "lossless":
        weights = decode(payload, base=state.sent, template=weights)
    based = inspect(payload).base_digest is not None
    message = messages.pack(to_control(plan), payload)
    return Order(plan, message, based, replace(state, weights=weights))


def whole_order(order: Order) -> Order:
    """Return an order of the same model that any site can decode."""
    if not order.based:
        return order
    payload = encode_whole(order.sent, order.plan)
    return replace(order, message=messages.pack(to_control(order.plan), payload), based=False)


def encode_whole(sent: ServerState, plan: TrainPlan) -> bytes:
    """Encode a model that the sites hold, for those that do not: no bit may change."""
    values = "lossless" if plan.values in STEPS else plan.values
    return encode_model(sent.weights, replace(plan, values=values), masks=sent.masks)


def encode_model(
    weights: State, plan: TrainPlan, *, masks: Masks | None, base: State | None = None
) -> bytes:
    """Encode a model as the round's work order says, losslessly if its numbers do not fit."""
    level = cast(Level, plan.level)
    values = cast(Values, plan.values)
    try:
        return encode(weights, masks=masks, base=base, round=plan.round, values=values, level=level)
    except ValueRangeError:
        return encode(weights, masks=masks, base=base, round=plan.round, level=level)


def local_masks(model_weights: State, plan: TrainPlan, within: Masks | None) -> dict[str, Tensor]:
    """Return the masks of a site's purge at ``plan.local_sparsity``."""
    assert plan.local_sparsity is not None
    depth, height, width = plan.in_shape
    return purge_masks(
        model_weights,
        plan.local_sparsity,
        paper=plan.paper,
        scope=plan.scope,
        min_per_filter=plan.min_per_filter,
        within=within,
        work=_work(plan.scope, plan.width, (depth, height, width)),
    )


def _work(scope: str, width: float, in_shape: Size3) -> Mapping[str, float] | None:
    return work_per_weight(width, in_shape) if scope == "flops" else None


def purge_masks(
    weights: State,
    sparsity: float,
    *,
    paper: bool,
    scope: str,
    min_per_filter: int,
    within: Masks | None,
    work: Mapping[str, float] | None,
    granularity: str = "weight",
) -> dict[str, Tensor]:
    """Choose the weights that survive a pruning to ``sparsity``, inside ``within``.

    Under ``paper`` every trainable tensor takes part, ties at the threshold all stay, and a kept
    weight that is 0 counts as pruned from then on, as in the released code.
    """
    if paper:
        kept = prune.paper_masks(weights, sparsity)
        return {name: mask & (weights[name] != 0) for name, mask in kept.items()}
    prunable = {name: weights[name] for name in maskable_names(weights, paper=False)}
    return dict(
        prune.magnitude_masks(
            prunable,
            sparsity,
            scope=scope,
            granularity=granularity,
            within=within,
            min_per_filter=min_per_filter,
            work=work,
        )
    )


def is_prunable(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of the network is a convolution or linear weight."""
    return name.endswith(".weight") and tensor.ndim >= 2


def maskable_names(weights: State, *, paper: bool) -> list[str]:
    """Return the tensors that pruning may touch: all under ``paper``, else the prunable ones."""
    return [name for name, tensor in weights.items() if paper or is_prunable(name, tensor)]


def read_update(payload: Buffer, *, plan: TrainPlan, sent: ServerState, n_train: int) -> Update:
    """Decode a site's payload against what it was sent, and refuse what must not be averaged.

    Raises
    ------
    CodecError
        If the payload is damaged, refers to another base, has other tensors than the model,
        holds NaN or infinity, or brings back weights that were pruned.
    """
    weights = decode(payload, base=sent.weights, template=sent.weights)
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteUpdateError(f"update: {name} holds NaN or infinity; reply dropped")
    for name, mask in (sent.masks or {}).items():
        back = _outside(weights[name], mask)
        if back > exchanged(mask, plan.regrow):
            raise TemplateError(f"update: {name} has {back} weights where the model is pruned")
    if plan.local_sparsity is None:
        return Update(weights=weights, masks=None, n_train=n_train)
    kept = decode_masks(payload, base=sent.weights)
    masks = {name: kept[name] for name in maskable_names(weights, paper=plan.paper)}
    if sent.masks is not None:
        masks = {name: mask & sent.masks[name] for name, mask in masks.items()}
    return Update(weights=weights, masks=masks, n_train=n_train)


def _outside(weights: Tensor, mask: Tensor) -> int:
    values, keep = weights.reshape(-1), mask.reshape(-1)
    outside = (values[piece].ne(0) & ~keep[piece] for piece in pieces(values.numel()))
    return sum(int(found.count_nonzero()) for found in outside)


def check_norm(update: Update, sent: ServerState, bound: float) -> None:
    """Refuse an update whose Euclidean distance from what was sent exceeds ``bound``.

    Pruned weights count with what they were before: to set one to 0 is a change too.

    Raises
    ------
    LargeUpdateError
        If it does.
    """
    squares = []
    for name, weights in update.weights.items():
        ours, theirs = (t.reshape(-1).numpy() for t in (weights, sent.weights[name]))
        for piece in pieces(len(ours)):
            change = ours[piece].astype(np.float64) - theirs[piece]
            # numpy's sums run on one thread: the same bits whatever torch may use.
            squares.append(float(np.square(change).sum()))
    norm = math.sqrt(math.fsum(squares))
    if norm > bound:
        raise LargeUpdateError(
            f"update: its distance from the model sent is {norm:.6g}, max_update_norm is {bound:g}"
        )


def guard_filters(
    masks: Masks, weights: State, within: Masks | None, least: int
) -> dict[str, Tensor]:
    """Give filters that a vote left with fewer than ``least`` weights their largest ones back.

    Sites that each keep a weight of a filter may keep different ones, none with a majority.
    """
    guarded = dict(masks)
    for name, mask in masks.items():
        if mask.ndim < 2 or least == 0:
            continue
        rows = mask.reshape(mask.shape[0], -1)
        starved = rows.sum(dim=1) < min(least, rows.shape[1])
        if bool(starved.any()):
            inside = None if within is None else within[name]
            best = _largest_of_filters(weights[name], inside, least)
            guarded[name] = mask | (best & starved.view(-1, *[1] * (mask.ndim - 1)))
    return guarded


def _largest_of_filters(weight: Tensor, within: Tensor | None, least: int) -> Tensor:
    size = weight.abs().reshape(weight.shape[0], -1)
    if within is not None:
        size = torch.where(within.reshape(size.shape), size, -1.0)
    # A stable sort: of equal weights the first wins.
    order = torch.sort(size, dim=1, descending=True, stable=True).indices[:, :least]
    chosen = torch.zeros_like(size, dtype=torch.bool).scatter_(1, order, True)
    return (chosen & (size >= 0)).reshape(weight.shape)


def aggregate(
    state: ServerState,
    updates: Merger,
    config: RunConfig,
    sent: State | None = None,
) -> ServerState:
    """Average one round's updates, and prune where the strategy says so.

    `sent` is the model as the sites decoded it, if rounding has changed it: what that took away
    is added again, so that it travels with a later round.
    """
    weights = updates.average()
    if sent is not None:
        for name, merged in weights.items():
            # In place and in pieces: of a large model there is no second copy.
            ours, theirs = state.weights[name].reshape(-1), sent[name].reshape(-1)
            for piece in pieces(merged.numel()):
                merged.view(-1)[piece] += ours[piece] - theirs[piece]
                merged.view(-1)[piece] += 0.0
    masks = state.masks
    number = state.round + 1
    sparsity = scheduled_sparsity(config, number)
    if sparsity is not None:
        if config.strategy == "fedsparsify-local":
            masks = prune.majority_vote(updates.votes)
            if not config.paper:
                masks = guard_filters(masks, weights, state.masks, config.min_per_filter)
        else:
            masks = purge_masks(
                weights,
                sparsity,
                paper=config.paper,
                scope=config.scope,
                min_per_filter=config.min_per_filter,
                within=masks,
                work=_work(config.scope, config.width, state.in_shape),
                granularity=config.granularity,
            )
        if config.paper:
            masks = {n: m & (weights[n] != 0) for n, m in masks.items()}
    regrow = regrown_share(config, number)
    if regrow is not None and masks is not None and state.masks is not None:
        before, least = state.masks, config.min_per_filter
        masks = exchange(weights, masks, before, regrow, min_per_filter=least)
        # What comes back starts at 0, as the site's optimizers will see it.
        weights = {
            n: torch.where(before[n], w, 0.0) if n in masks else w for n, w in weights.items()
        }
    if masks is not None:
        prune.zero_outside(weights, masks)
    return replace(state, round=number, weights=weights, masks=masks)
