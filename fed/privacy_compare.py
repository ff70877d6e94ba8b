"""Attack success against sparsity: at the same round, and where train and test differ as much.

A sparser run may leak less only because it has learned less by heart. At one round both differ; at
one gap between the errors on members and on others, only the sparsity does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.errors import RunError, UsageError
from sparsekit.fed.attack_scores import Array, interval
from sparsekit.fed.compare import run_names
from sparsekit.fed.privacy_files import load_audit, load_draws

MEASURES = ("auc", "accuracy")
GAPS = 3
_MOST_WITHOUT = 0.05
_MAY_DIFFER = frozenset({"sparsity", "seed", "strategy", "cohort", "engine", "threads"})


@dataclass(frozen=True)
class _Audited:
    """One run's audit: by moment, and in every draw of people."""

    name: str
    audit: dict[str, Any]
    draws: dict[str, Array]

    @property
    def rounds(self) -> list[int]:
        return [moment["round"] for moment in self.audit["moments"]]

    @property
    def gaps(self) -> Array:
        return np.array([moment["gap"][0] for moment in self.audit["moments"]])

    def values(self, attack: str, measure: str) -> Array:
        return np.array([m["attacks"][attack][measure][0] for m in self.audit["moments"]])


def compare_audits(runs: Sequence[Path], attacks: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare audited runs by their sparsity.

    Parameters
    ----------
    runs : sequence of Path
        At least two, of at least two sparsities. Runs of one sparsity are averaged.
    attacks : sequence of str, optional
        By default all that every run was audited with.

    Returns
    -------
    dict
        Of plain values: ``runs``, ``differing`` settings, ``same_people``, and by attack
        ``same_round`` and ``same_gap``, lists of rows. A row has for each sparsity the measures
        with intervals, their differences from the least sparse, and a verdict.

    Raises
    ------
    UsageError
        If the runs or attacks cannot be compared.
    RunError
        If a run has not been audited.
    """
    audited = [
        _Audited(name, audit, load_draws(run, audit))
        for name, run, audit in zip(run_names(runs), runs, map(load_audit, runs), strict=True)
    ]
    groups: dict[float, list[_Audited]] = {}
    for one in sorted(audited, key=lambda one: one.audit["sparsity"]):
        groups.setdefault(one.audit["sparsity"], []).append(one)
    if len(groups) < 2:
        raise UsageError(
            f"compare: all runs have sparsity {next(iter(groups)):g}; expected two or more"
        )
    ensembles = {one.audit["ensemble"] for one in audited}
    if len(ensembles) > 1:
        raise UsageError(
            f"compare: audits with --ensemble {', '.join(map(str, sorted(ensembles)))} cannot be "
            "compared; audit all runs with the same"
        )
    shared = [
        a for a in audited[0].audit["attacks"] if all(a in o.audit["attacks"] for o in audited)
    ]
    wanted = list(attacks or shared)
    if not wanted or not set(wanted) <= set(shared):
        raise UsageError(
            f"attack: expected some of {', '.join(shared) or 'none'}, which all runs were audited "
            f"with; got {', '.join(wanted) or 'none'}"
        )
    rounds = sorted(set.intersection(*(set(one.rounds) for one in audited)))
    if not rounds:
        raise RunError(
            "compare: the runs were audited at no common round; give them the same --rounds and "
            "audit them with the same --moments"
        )
    people = {
        sparsity: sorted(
            tuple(site["people"] for site in one.audit["sites"].values()) for one in group
        )
        for sparsity, group in groups.items()
    }
    levels = _common_gaps(audited)
    return {
        "runs": [
            {
                "name": one.name,
                "sparsity": one.audit["sparsity"],
                "seed": one.audit["config"].get("seed"),
                "synthetic": one.audit["synthetic"],
            }
            for one in audited
        ],
        "differing": _differing(audited),
        "same_people": len(set(map(str, people.values()))) == 1,
        "attacks": {
            attack: {
                "same_round": [_at_round(groups, attack, number) for number in rounds],
                "same_gap": [_at_gap(groups, attack, level) for level in levels],
            }
            for attack in wanted
        },
    }


def _differing(audited: Sequence[_Audited]) -> list[str]:
    """Name settings, other than those that a comparison is about, that the runs do not share."""
    configs = [one.audit["config"] for one in audited]
    names = {name for config in configs for name in config} - _MAY_DIFFER
    return sorted(n for n in names if len({repr(config.get(n)) for config in configs}) > 1)


def _common_gaps(audited: Sequence[_Audited]) -> list[float]:
    """Return gaps, years, that every run passes on its way; none if there are none."""
    lowest = max(float(one.gaps.min()) for one in audited)
    highest = min(float(one.gaps.max()) for one in audited)
    if lowest >= highest:
        return []
    return [float(level) for level in np.linspace(lowest, highest, GAPS + 2)[1:-1]]


def _at_round(
    groups: Mapping[float, Sequence[_Audited]], attack: str, number: int
) -> dict[str, Any]:
    def look(one: _Audited, measure: str) -> tuple[float, Array]:
        place = one.rounds.index(number)
        draws = one.draws["gap" if measure == "gap" else f"{attack}/{measure}"][place]
        if measure == "gap":
            return float(one.gaps[place]), draws
        return float(one.values(attack, measure)[place]), draws

    row: dict[str, Any] = {"round": number, "sparsities": _by_sparsity(groups, look, "gap")}
    for sparsity, cell in zip(groups, row["sparsities"], strict=True):
        pruned = [o.audit["moments"][o.rounds.index(number)]["sparsity"] for o in groups[sparsity]]
        cell["sparsity_then"] = float(np.mean(pruned))
    return row


def _at_gap(
    groups: Mapping[float, Sequence[_Audited]], attack: str, level: float
) -> dict[str, Any]:
    def look(one: _Audited, measure: str) -> tuple[float, Array]:
        draws = one.draws[f"{attack}/{measure}"]
        value = at_level(one.gaps[:, None], one.values(attack, measure)[:, None], level)
        return float(value[0]), at_level(one.draws["gap"], draws, level)

    return {"gap": level, "sparsities": _by_sparsity(groups, look)}


def _by_sparsity(groups: Mapping[float, Sequence[_Audited]], look: Any, *more: str) -> list[Any]:
    """Average what ``look`` finds over the runs of each sparsity, and subtract the first's."""
    cells: list[dict[str, Any]] = []
    first: dict[str, tuple[float, Array]] = {}
    for sparsity, group in groups.items():
        cell: dict[str, Any] = {"sparsity": sparsity, "runs": len(group)}
        for measure in (*MEASURES, *more):
            looks = [look(one, measure) for one in group]
            value = float(np.mean([one[0] for one in looks]))
            draws = np.mean([one[1] for one in looks], axis=0)
            cell[measure] = _with_interval(value, draws)
            cell[f"{measure}_by_run"] = [one[0] for one in looks]
            if measure not in first:
                first[measure] = value, draws
            else:
                before, drawn_before = first[measure]
                cell[f"{measure}_minus_first"] = _with_interval(
                    value - before, draws - drawn_before
                )
        if cells:
            cell["verdict"] = verdict(cell["auc_minus_first"])
        cells.append(cell)
    return cells


def at_level(gaps: Array, values: Array, level: float) -> Array:
    """Return values where the gap first passes a level on the way from moment to moment.

    Parameters
    ----------
    gaps, values : ndarray, (moments, draws)
        In the order of the rounds.
    level : float

    Returns
    -------
    ndarray, (draws,)
        Interpolated linearly between the two moments; NaN where the gap never passes the level.
    """
    found = np.full(gaps.shape[1], np.nan)
    for before, after in zip(range(len(gaps) - 1), range(1, len(gaps)), strict=True):
        low, high = gaps[before] - level, gaps[after] - level
        here = np.isnan(found) & (low * high <= 0) & (low != high)
        share = low[here] / (low[here] - high[here])
        found[here] = values[before][here] * (1 - share) + values[after][here] * share
    return found


def _with_interval(value: float, draws: Array) -> list[float] | None:
    """Return value, low and high; None where too many draws never came to the gap."""
    known = draws[~np.isnan(draws)]
    if not np.isfinite(value) or len(known) < (1 - _MOST_WITHOUT) * len(draws):
        return None
    return [value, *interval(known)]


def verdict(difference: Sequence[float] | None) -> str:
    """Say what a difference of AUC from the least sparse runs' allows to be said."""
    if difference is None:
        return "cannot tell: the gap is not reached surely enough"
    _, low, high = difference
    if high < 0:
        return "leaked less"
    if low > 0:
        return "leaked more"
    return "cannot tell"
