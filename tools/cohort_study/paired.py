"""Intervals of differences between predictors that were measured on the same people."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

DRAWS = 4000
_LOW_HIGH = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A mean in years and its 95 % bootstrap interval (percentile method)."""

    mean: float
    low: float
    high: float


def difference(ours: Sequence[Doubles], theirs: Sequence[Doubles]) -> Interval:
    """Mean absolute error of theirs minus ours, paired by person, over seeds.

    Seeds are drawn with replacement, and within each drawn seed its people: the interval covers
    other cohorts and other starts of a network, as far as the few seeds tell.

    Parameters
    ----------
    ours, theirs : sequence of ndarray, (n,), float64
        Absolute errors in years of the same people, one array for each seed.

    Returns
    -------
    Interval
        Positive where ours is better.
    """
    return mean_interval([b - a for a, b in zip(ours, theirs, strict=True)])


def mean_interval(values: Sequence[Doubles], draws: int = DRAWS) -> Interval:
    """Mean over seeds of each seed's mean, with the interval that `difference` describes."""
    random = np.random.default_rng(0)
    seeds = len(values)
    chosen = random.integers(seeds, size=(draws, seeds))
    total = np.zeros(draws)
    for place in range(seeds):
        for seed, people in enumerate(values):
            rows = np.flatnonzero(chosen[:, place] == seed)
            picked = random.integers(len(people), size=(len(rows), len(people)), dtype=np.int32)
            total[rows] += people[picked].mean(axis=1)
    low, high = np.percentile(total / seeds, _LOW_HIGH)
    mean = float(np.mean([people.mean() for people in values]))
    return Interval(mean, float(low), float(high))
