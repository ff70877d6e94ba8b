"""When a run prunes, and how much: its schedule, its sparse start and its regrowth."""

import math
from typing import TYPE_CHECKING

from sparsekit.errors import ArgumentError, UsageError
from sparsekit.fed.checks import choice, in_range
from sparsekit.prune.groups import N_OF_M, parse
from sparsekit.schedule import (
    ExponentialSchedule,
    OneShotSchedule,
    PolynomialSchedule,
    Schedule,
)

if TYPE_CHECKING:
    from sparsekit.fed.config import RunConfig

SCHEDULES = ("polynomial", "exponential", "one-shot")


def check(config: "RunConfig") -> None:
    """Refuse settings of the pruning that are out of range or exclude each other.

    Raises
    ------
    UsageError
        With what to do.
    """
    choice("schedule", config.schedule, SCHEDULES)
    in_range("initial_sparsity", config.initial_sparsity, 0.0, 1.0, open_above=True)
    in_range("regrow", config.regrow, 0.0, 1.0, open_above=True)
    for name in ("regrow_every", "regrow_scans"):
        in_range(name, getattr(config, name), 1, None)
    in_range("prune_end", config.prune_end, 0, config.rounds)
    in_range("regrow_end", config.regrow_end, 0, None)
    _check_granularity(config)
    if not config.sparse:
        return
    if config.rounds <= config.prune_start:
        raise UsageError(
            f"rounds: expected more than prune_start = {config.prune_start}, got {config.rounds}: "
            "the first pruning comes at the end of the round after it. Raise --rounds."
        )
    if 0 < config.prune_end <= config.prune_start:
        raise UsageError(
            f"prune_end: expected more than prune_start = {config.prune_start}, or 0 for the last "
            f"round; got {config.prune_end}"
        )
    if config.initial_sparsity > config.sparsity:
        raise UsageError(
            f"initial_sparsity: expected at most sparsity = {config.sparsity}, "
            f"got {config.initial_sparsity}"
        )
    if config.paper and (config.initial_sparsity or config.regrow):
        raise UsageError(
            "paper: the released code starts dense and regrows nothing; leave initial_sparsity "
            "and regrow out"
        )
    if config.regrow and config.strategy == "fedsparsify-local":
        raise UsageError(
            "regrow: not with fedsparsify-local, where the sites vote on what stays; choose "
            "fedsparsify-global or centralized"
        )


def _check_granularity(config: "RunConfig") -> None:
    try:
        parse(config.granularity)
    except ArgumentError as error:
        raise UsageError(str(error)) from None
    if config.granularity == "weight":
        return
    alone = {
        "paper": config.paper,
        "fedsparsify-local": config.strategy == "fedsparsify-local",
        "regrow": bool(config.regrow),
    }
    for other, chosen in alone.items():
        if chosen:
            raise UsageError(
                f"granularity: {other} chooses weight by weight, got {config.granularity!r}; leave "
                "one of the two out"
            )
    if config.granularity == N_OF_M and config.sparse:
        once = config.schedule == "one-shot" or config.rounds == config.prune_start + 1
        if config.sparsity != 0.5 or config.initial_sparsity not in (0.0, 0.5) or not once:
            raise UsageError(
                "granularity: 2:4 prunes half of the weights at once; expected sparsity = 0.5, "
                f"schedule = one-shot and initial_sparsity = 0 or 0.5, got {config.sparsity}, "
                f"{config.schedule} and {config.initial_sparsity}"
            )


def schedule_of(config: "RunConfig") -> Schedule:
    """Return the run's schedule; it holds its last value after ``prune_end``."""
    if config.schedule == "one-shot":
        return OneShotSchedule(config.sparsity, config.prune_start + 1)
    end = config.prune_end or config.rounds
    if config.schedule == "exponential":
        return ExponentialSchedule(
            config.sparsity,
            end,
            start=config.prune_start,
            every=config.prune_every,
            initial=config.initial_sparsity,
        )
    return PolynomialSchedule(
        config.sparsity,
        end,
        start=config.prune_start,
        every=config.prune_every,
        exponent=config.exponent,
        initial=config.initial_sparsity,
    )


def scheduled_sparsity(config: "RunConfig", round_number: int) -> float | None:
    """Return the sparsity to prune to at the end of a round, None where nothing is pruned.

    The first pruning comes one round after ``prune_start``, as in the released code.
    """
    if not config.sparse or round_number <= config.prune_start:
        return None
    sparsity = schedule_of(config)(round_number)
    # What the start has pruned already is no new pruning.
    return sparsity if sparsity > config.initial_sparsity else None


def regrown_share(config: "RunConfig", round_number: int) -> float | None:
    """Return which share of each layer's weights to replace in a round, None for no regrowth.

    It falls along half a cosine from ``regrow`` to 0 at ``regrow_end``, as in RigL.
    """
    end = config.regrow_end or 3 * config.rounds // 4
    if not (config.sparse and config.regrow) or round_number >= end:
        return None
    if round_number % config.regrow_every:
        return None
    return config.regrow * 0.5 * (1 + math.cos(math.pi * round_number / end))
