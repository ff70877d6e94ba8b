"""Every site attacks every other one: training on its own people, asking about theirs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparsekit.fed.attack_features import Features
from sparsekit.fed.attack_models import ATTACKS, train_attack
from sparsekit.fed.attack_scores import (
    LEAST_FOR_ONE_IN_1000,
    Array,
    Draws,
    accuracy,
    auc,
    auc_interval,
    drawn_accuracy,
    drawn_auc,
    drawn_true_positives,
    interval,
    share_interval,
    true_positives,
    widened,
)
from sparsekit.fed.membership import Asked
from sparsekit.fed.seeds import derive_seed

Pair = tuple[str, str]
"""Attacker and victim, by the names of their sites."""

Load = Callable[[str, Sequence[str]], Features]
"""From a site and kinds of feature to its people's features, (n, rounds, width)."""


@dataclass(frozen=True)
class PairScores:
    """What all attacks gave on one moment's models.

    Attributes
    ----------
    logits : dict
        By attack and pair, one number for each of the victim's people.
    shuffled : dict
        By attack, the mean AUC over all pairs of each play with membership dealt out anew.
    """

    logits: dict[str, dict[Pair, Array]] = field(default_factory=dict)
    shuffled: dict[str, list[float]] = field(default_factory=dict)


def play_attacks(
    people: Mapping[str, Asked],
    load: Load,
    attacks: Sequence[str],
    *,
    shuffles: int = 0,
    step: Callable[[], None] = lambda: None,
) -> PairScores:
    """Let every site attack every other one with each attack.

    Parameters
    ----------
    people : dict of Asked
        By site, at least two.
    load : callable
        Called again and again, so that no more than two sites' features are in memory.
    attacks : sequence of str
        Names in `ATTACKS`.
    shuffles : int
        How often all of it is played again with membership shuffled within sites and age groups,
        for attackers and victims alike: what an attack gives where there is nothing to find.
    step : callable, optional
        Called when an attacker is done with an attack.
    """
    found = PairScores()
    for attack in attacks:
        groups = ATTACKS[attack]
        logits: dict[Pair, Array] = {}
        by_shuffle: list[list[float]] = [[] for _ in range(shuffles)]
        for attacker, own in people.items():
            features = load(attacker, groups)
            seed = derive_seed(0, attack, attacker)
            scorer = train_attack(attack, features, own.member, seed=seed)
            blind = [
                train_attack(attack, features, own.shuffled(number), seed=derive_seed(seed, number))
                for number in range(shuffles)
            ]
            del features
            for victim, theirs in people.items():
                if victim == attacker:
                    continue
                asked = load(victim, groups)
                logits[attacker, victim] = scorer(asked)
                for number, guess in enumerate(blind):
                    given, member = guess(asked), theirs.shuffled(number)
                    by_shuffle[number].append(auc(given[member], given[~member]))
            step()
        found.logits[attack] = logits
        found.shuffled[attack] = [float(np.mean(values)) for values in by_shuffle]
    return found


def summarize_attack(
    logits: Mapping[Pair, Array],
    shuffled: Sequence[float],
    people: Mapping[str, Asked],
    draws: Mapping[str, Draws],
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Turn one attack's logits into its rows, means and intervals.

    Returns
    -------
    summary : dict
        Of plain values: ``auc``, ``accuracy``, ``tpr_1pct`` and ``tpr_01pct`` (None with too few
        non-members) with their intervals, ``pairs``, ``above_half`` and ``shuffled``.
    draws : dict of ndarray
        ``auc`` and ``accuracy`` in each draw of people, for comparisons.
    """
    rows: list[dict[str, Any]] = []
    drawn: dict[str, list[Array]] = {"auc": [], "accuracy": []}
    for (attacker, victim), given in logits.items():
        member = people[victim].member
        inside, outside = given[member], given[~member]
        rows.append({"attacker": attacker, "victim": victim, **pair_row(inside, outside)})
        drawn["auc"].append(drawn_auc(inside, outside, draws[victim]))
        drawn["accuracy"].append(drawn_accuracy(inside, outside, draws[victim]))
    summary: dict[str, Any] = {}
    wide: dict[str, Array] = {}
    for measure, values in drawn.items():
        mean = float(np.mean([row[measure] for row in rows]))
        wide[measure] = widened(mean, np.mean(values, axis=0))
        summary[measure] = [mean, *interval(wide[measure], least=0.0, most=1.0)]
    summary["tpr_1pct"] = _true_positive_rate(logits, people, draws, 0.01)
    fewest = min(len(given) for given in _pooled(logits, people, False).values())
    enough = fewest >= LEAST_FOR_ONE_IN_1000
    summary["tpr_01pct"] = _true_positive_rate(logits, people, draws, 0.001) if enough else None
    summary["above_half"] = sum(row["accuracy"] > 0.5 for row in rows)
    summary["shuffled"] = _against_shuffles(summary["auc"][0], shuffled)
    summary["pairs"] = rows
    return summary, wide


def pair_row(inside: Array, outside: Array) -> dict[str, Any]:
    """Return one pair's measures from the logits of the victim's members and non-members."""
    value = auc(inside, outside)
    right = int((inside > 0).sum() + (outside <= 0).sum())
    hits, allowed = true_positives(inside, outside, 0.01)
    return {
        "members": len(inside),
        "non_members": len(outside),
        "auc": value,
        "auc_interval": list(auc_interval(value, len(inside), len(outside))),
        "accuracy": accuracy(inside, outside),
        # Both sides are as large as each other, so that this is a share of all people.
        "accuracy_interval": list(share_interval(right, len(inside) + len(outside))),
        "tpr_1pct": hits / len(inside),
        "tpr_1pct_interval": list(share_interval(hits, len(inside))),
        "false_positives_allowed": allowed,
    }


def _pooled(
    logits: Mapping[Pair, Array], people: Mapping[str, Asked], member: bool
) -> dict[str, Array]:
    """Put the logits of all of an attacker's victims together, members or non-members."""
    of: dict[str, list[Array]] = {}
    for (attacker, victim), given in logits.items():
        of.setdefault(attacker, []).append(given[people[victim].member == member])
    return {attacker: np.concatenate(parts) for attacker, parts in of.items()}


def _true_positive_rate(
    logits: Mapping[Pair, Array],
    people: Mapping[str, Asked],
    draws: Mapping[str, Draws],
    rate: float,
) -> list[float]:
    """Return the mean over attackers, each with one threshold for all of its victims."""
    inside, outside = (_pooled(logits, people, member) for member in (True, False))
    values, drawn = [], []
    for attacker in inside:
        victims = [pair[1] for pair in logits if pair[0] == attacker]
        together = Draws(
            np.concatenate([draws[victim].members for victim in victims], axis=1),
            np.concatenate([draws[victim].others for victim in victims], axis=1),
        )
        hits, _ = true_positives(inside[attacker], outside[attacker], rate)
        values.append(hits / len(inside[attacker]))
        drawn.append(drawn_true_positives(inside[attacker], outside[attacker], together, rate))
    mean = float(np.mean(values))
    wide = widened(mean, np.mean(drawn, axis=0))
    return [mean, *interval(wide, least=0.0, most=1.0)]


def _against_shuffles(value: float, shuffled: Sequence[float]) -> dict[str, Any] | None:
    """Say what shuffled membership gave, and how often that was as good as the real one."""
    if not shuffled:
        return None
    as_good = sum(one >= value for one in shuffled)
    return {
        "plays": len(shuffled),
        "mean": float(np.mean(shuffled)),
        "lowest": min(shuffled),
        "highest": max(shuffled),
        "p": (1 + as_good) / (1 + len(shuffled)),
    }
