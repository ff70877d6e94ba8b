"""How well an attack did: AUC, accuracy, true positives at few false ones, and their intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import beta, norm, rankdata

from sparsekit.fed.seeds import derive_seed

Array = npt.NDArray[np.float64]

DRAWS = 2000
LEVEL = 0.95
LEAST_FOR_ONE_IN_1000 = 3000
"""Fewest non-members with which a false positive rate of 0.1 % means anything."""

RECIPROCITY = math.sqrt(2.0)
"""How much wider intervals of means over pairs are made.

An attack of A on B and one of B on A look at the same two groups of people, and by chance both go
right or both go wrong. Drawing victims anew with the trained attackers held fixed takes them for
independent; fully dependent, their mean varies the square root of 2 as much.
"""

_SPLIT = 100  # draws at a time
_CORNER = 1e-9
_Z = float(norm.ppf(0.5 + LEVEL / 2))


def auc(members: Array, others: Array) -> float:
    """Return the probability that a member scores above a non-member, ties counting half."""
    ranks = rankdata(np.concatenate([members, others]))
    m, n = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))


def placements(members: Array, others: Array) -> tuple[Array, Array]:
    """Return for each person the share of the other side that it is ranked rightly against.

    The mean of either is the AUC, and what each person adds to it moves it to first order.
    """
    m, n = len(members), len(others)
    together = rankdata(np.concatenate([members, others]))
    above = (together[:m] - rankdata(members)) / n
    below = 1.0 - (together[m:] - rankdata(others)) / m
    return above, below


def _root(of: Callable[[float], float], low: float, high: float) -> float:
    # A number, as no report is asked for; the stubs leave that open.
    root: Any = brentq(of, low, high)
    return float(root)


def auc_interval(value: float, members: int, others: int) -> tuple[float, float]:
    """Return the 95 % score interval of one AUC (Newcombe 2006, method 5).

    It holds all values that lie within 1.96 of their own standard errors (Hanley and McNeil 1982)
    of the one found, so that it keeps a width at 0 and 1; at 0.5 it is the rank test.
    """
    more = (members + others) / 2 - 1

    def beyond(true: float) -> float:
        spread = 1 + more * ((1 - true) / (2 - true) + true / (1 + true))
        return (value - true) ** 2 - _Z**2 * true * (1 - true) * spread / (members * others)

    # 0 and 1 solve the equation for themselves, and bound nothing.
    inside = min(max(value, _CORNER), 1 - _CORNER)
    low = 0.0 if value <= 0 else _root(beyond, 0.0, inside)
    high = 1.0 if value >= 1 else _root(beyond, inside, 1.0)
    return low, high


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - LEVEL) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, count - hits + 1))
    high = 1.0 if hits == count else float(beta.ppf(1 - tail, hits + 1, count - hits))
    return low, high


def accuracy(members: Array, others: Array) -> float:
    """Return the share of people on the right side of 0, both sides weighing the same."""
    return float(((members > 0).mean() + (others <= 0).mean()) / 2)


def true_positives(members: Array, others: Array, rate: float) -> tuple[int, int]:
    """Count members above the threshold that lets at most ``rate`` of the non-members through.

    Returns
    -------
    hits : int
    allowed : int
        Non-members that may lie above it: 0 where there are fewer than ``1 / rate``.
    """
    allowed = allowed_false_positives(len(others), rate)
    threshold = np.sort(others)[::-1][allowed]
    return int((members > threshold).sum()), allowed


def allowed_false_positives(others: int, rate: float) -> int:
    """Return how many of the non-members may be taken for members."""
    return math.floor(rate * others + 1e-9)


@dataclass(frozen=True)
class Draws:
    """Draws with replacement of one site's people, members and non-members apart.

    Attributes
    ----------
    members, others : ndarray, (draws, n), float64
        How often each person is in each draw.
    """

    members: Array
    others: Array


def draw_people(members: int, others: int, digest: str) -> Draws:
    """Draw a site's people; the same ones for the same people, whatever the run.

    Two runs on the same people are then compared person by person, and runs on different people
    as independent ones.
    """
    random = np.random.default_rng(derive_seed(0, "people", digest))
    two = [
        random.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
        for n in (members, others)
    ]
    return Draws(*two)


def drawn_mean(values: Array, counts: Array) -> Array:
    """Return the mean of values (n,) in each draw, (draws,)."""
    mean: Array = counts @ values / len(values)
    return mean


def drawn_auc(members: Array, others: Array, draws: Draws) -> Array:
    """Return the AUC in each draw to first order, (draws,)."""
    above, below = placements(members, others)
    both: Array = drawn_mean(above, draws.members) + drawn_mean(below, draws.others)
    both -= auc(members, others)
    return both


def drawn_accuracy(members: Array, others: Array, draws: Draws) -> Array:
    """Return the accuracy in each draw, (draws,)."""
    inside = drawn_mean((members > 0).astype(np.float64), draws.members)
    outside = drawn_mean((others <= 0).astype(np.float64), draws.others)
    return 0.5 * (inside + outside)


def drawn_true_positives(members: Array, others: Array, draws: Draws, rate: float) -> Array:
    """Return the rate of true positives in each draw, with that draw's own threshold, (draws,)."""
    allowed = allowed_false_positives(len(others), rate)
    falling = np.argsort(-others, kind="stable")
    ordered = others[falling]
    found = np.empty(len(draws.members))
    for start in range(0, len(found), _SPLIT):
        part = slice(start, start + _SPLIT)
        through = np.cumsum(draws.others[part][:, falling], axis=1)
        # The first non-member who is one too many is the threshold.
        threshold = ordered[(through > allowed).argmax(axis=1)]
        hits = (draws.members[part] * (members > threshold[:, None])).sum(axis=1)
        found[part] = hits / len(members)
    return found


def widened(value: float, draws: Array) -> Array:
    """Return draws of a mean over pairs, moved away from it; see `RECIPROCITY`."""
    wide: Array = value + RECIPROCITY * (draws - draws.mean())
    return wide


def interval(draws: Array, *, least: float = -math.inf, most: float = math.inf) -> Sequence[float]:
    """Return the middle 95 % of draws, cut to what is possible."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(np.clip(low, least, most)), float(np.clip(high, least, most))
