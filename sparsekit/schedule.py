"""How sparsity grows over the rounds of a training run."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sparsekit.errors import ArgumentError, ArgumentTypeError, ScheduleWarning

Schedule: TypeAlias = Callable[[int], float]
"""Sparsity to prune to at the end of a round; rounds are counted from 1."""


@dataclass(frozen=True)
class PolynomialSchedule:
    """Sparsity that rises from `initial` to `final` along a polynomial.

    ``s(t) = final + (initial - final) * (1 - (every * floor(t / every) - start) / (rounds - start))
    ** exponent``: the gradual schedule of Zhu and Gupta (arXiv 1710.01878) in the form that
    FedSparsify uses (arXiv 2204.12430).

    Parameters
    ----------
    final : float
        Sparsity at the last round, from 0 to 1.
    rounds : int
        Last round, T; rounds are counted from 1.
    start : int
        Round at which the curve leaves `initial`. Before it nothing is pruned: ``s(t) = 0.0``.
    every : int
        The sparsity changes only at multiples of this many rounds, F.
    exponent : float
        Degree of the polynomial, n. Larger values prune earlier.
    initial : float
        Sparsity at round `start`, from 0 to `final`.

    Raises
    ------
    ArgumentError
        A value is out of range, or ``rounds <= start``.

    Warns
    -----
    ScheduleWarning
        `every` does not divide `rounds`, so the last round stays below `final`.

    Examples
    --------
    >>> schedule = PolynomialSchedule(0.95, rounds=40)
    >>> round(schedule(10), 6), schedule(40), schedule(0)
    (0.517592, 0.95, 0.0)
    """

    final: float
    rounds: int
    start: int = 1
    every: int = 1
    exponent: float = 3
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if not (math.isfinite(self.exponent) and self.exponent > 0):
            raise ArgumentError(f"exponent: expected a positive number, got {self.exponent}")
        _warn_if_short(self)

    def __call__(self, t: int) -> float:
        """Sparsity to prune to at the end of round `t`.

        Parameters
        ----------
        t : int
            Round, counted from 1; rounds past the last one give the last one's value.

        Returns
        -------
        float
            From 0 to `final`; 0.0 (nothing is pruned) while the formula has not started.
        """
        progress = _progress(self, t)
        if progress is None:
            return 0.0
        left = 1.0 - progress
        return float(self.final + (self.initial - self.final) * left**self.exponent)


@dataclass(frozen=True)
class ExponentialSchedule:
    """Sparsity under which the density falls by the same factor each round.

    ``s(t) = 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** p``, where p is the share of the
    way from `start` to `rounds`, taken at multiples of `every`. Every pruning then takes the same
    share of the weights that are left, also the last one.

    Parameters
    ----------
    final : float
        Sparsity at round `rounds`, from 0 to below 1.
    rounds, start, every, initial
        As of `PolynomialSchedule`. For a ramp that ends early, `rounds` is its end.

    Raises
    ------
    ArgumentError
        A value is out of range, or ``rounds <= start``.

    Warns
    -----
    ScheduleWarning
        `every` does not divide `rounds`, so the last round stays below `final`.

    Examples
    --------
    >>> schedule = ExponentialSchedule(0.96, rounds=3)
    >>> [round(schedule(t), 6) for t in range(5)]
    [0.0, 0.0, 0.8, 0.96, 0.96]
    """

    final: float
    rounds: int
    start: int = 1
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if self.final == 1.0:
            raise ArgumentError(
                "final: expected a sparsity below 1, got 1.0; no factor leads there"
            )
        _warn_if_short(self)

    def __call__(self, t: int) -> float:
        """Sparsity to prune to at the end of round `t`, from 0 to `final`; see the class."""
        progress = _progress(self, t)
        if progress is None:
            return 0.0
        if progress == 1.0:
            return self.final
        left = (1.0 - self.final) / (1.0 - self.initial)
        return float(1.0 - (1.0 - self.initial) * left**progress)


@dataclass(frozen=True)
class OneShotSchedule:
    """Dense until round `at`, whose end prunes to `final` at once.

    Parameters
    ----------
    final : float
        From 0 to 1.
    at : int
        Round, from 1.

    Raises
    ------
    ArgumentError
        A value is out of range.

    Examples
    --------
    >>> [OneShotSchedule(0.95, at=3)(t) for t in range(5)]
    [0.0, 0.0, 0.0, 0.95, 0.95]
    """

    final: float
    at: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.final <= 1.0:
            raise ArgumentError(f"final: expected a sparsity from 0 to 1, got {self.final}")
        if isinstance(self.at, bool) or not isinstance(self.at, int):
            raise ArgumentTypeError(f"at: expected an int, got {self.at!r}")
        if self.at < 1:
            raise ArgumentError(f"at: expected a round >= 1, got {self.at}")

    def __call__(self, t: int) -> float:
        """Sparsity to prune to at the end of round `t`: 0.0 or `final`."""
        if t < 0:
            raise ArgumentError(f"t: expected a round >= 0, got {t}")
        return self.final if t >= self.at else 0.0


def mean_density(schedule: Schedule, rounds: int) -> float:
    """Average share of weights with which a run of so many rounds trains.

    Round t trains what the end of round t - 1 left. Bytes of values and FLOPs (under a scope
    that prunes all layers alike) go with it.

    Parameters
    ----------
    schedule : callable
        One of this module, or any function of the round that gives a sparsity.
    rounds : int
        From 1.

    Examples
    --------
    >>> round(mean_density(PolynomialSchedule(0.95, rounds=40), 40), 4)
    0.3173
    """
    if rounds < 1:
        raise ArgumentError(f"rounds: expected at least 1, got {rounds}")
    return 1.0 - math.fsum(schedule(t) for t in range(rounds)) / rounds


_Ramp: TypeAlias = PolynomialSchedule | ExponentialSchedule


def _check(ramp: _Ramp) -> None:
    if not 0.0 <= ramp.final <= 1.0:
        raise ArgumentError(f"final: expected a sparsity from 0 to 1, got {ramp.final}")
    if not 0.0 <= ramp.initial <= ramp.final:
        raise ArgumentError(
            f"initial: expected a sparsity from 0 to final = {ramp.final}, got {ramp.initial}"
        )
    for name in ("rounds", "start", "every"):
        value = getattr(ramp, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name}: expected an int, got {value!r}")
    if ramp.start < 0:
        raise ArgumentError(f"start: expected a round >= 0, got {ramp.start}")
    if ramp.every < 1:
        raise ArgumentError(f"every: expected at least 1 round, got {ramp.every}")
    if ramp.rounds <= ramp.start:
        raise ArgumentError(
            f"rounds: expected more than start = {ramp.start}, got {ramp.rounds}; "
            "choose an earlier start or more rounds"
        )


def _warn_if_short(ramp: _Ramp) -> None:
    if ramp.rounds % ramp.every:
        warnings.warn(
            f"every = {ramp.every} does not divide rounds = {ramp.rounds}: the last round "
            f"reaches sparsity {ramp(ramp.rounds):.4f}, not final = {ramp.final}",
            ScheduleWarning,
            stacklevel=4,
        )


def _progress(ramp: _Ramp, t: int) -> float | None:
    """Share of the way from start to end at round t; None before the start."""
    if t < 0:
        raise ArgumentError(f"t: expected a round >= 0, got {t}")
    step = ramp.every * (min(t, ramp.rounds) // ramp.every)
    if step < ramp.start:
        return None
    return (step - ramp.start) / (ramp.rounds - ramp.start)
