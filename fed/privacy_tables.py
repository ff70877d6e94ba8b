"""What an audit, or a comparison of audits, says in words: for terminal, report and pages."""

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]
"""Cells by line; the first line holds the headings."""

CHANCE = "0.5 is chance for AUC and accuracy"


def with_interval(three: Sequence[float] | None, digits: int = 3) -> str:
    """Return a value with its 95 % interval, e.g. ``0.612 [0.580, 0.644]``."""
    if three is None:
        return "-"
    value, low, high = (f"{number:.{digits}f}" for number in three)
    return f"{value} [{low}, {high}]"


def signed(three: Sequence[float] | None, digits: int = 3) -> str:
    """Return a difference with its 95 % interval and signs."""
    if three is None:
        return "-"
    value, low, high = (f"{number:+.{digits}f}" for number in three)
    return f"{value} [{low}, {high}]"


def training_rows(audit: Mapping[str, Any]) -> Rows:
    """Return the moments: how much better the models were on members, and the attacks' AUC."""
    attacks = audit["attacks"]
    rows = [["round", "pruned", "MAE members", "MAE others", "gap (years)", *attacks]]
    rows += [
        [
            str(moment["round"]),
            f"{moment['sparsity']:.1%}",
            f"{moment['member_mae']:.2f}",
            f"{moment['non_member_mae']:.2f}",
            with_interval(moment["gap"], 2),
            *(with_interval(moment["attacks"][attack]["auc"]) for attack in attacks),
        ]
        for moment in audit["moments"]
    ]
    return rows


def attack_rows(audit: Mapping[str, Any]) -> Rows:
    """Return every attack on the last moment's models, means over all pairs."""
    last = audit["moments"][-1]["attacks"]
    heads = ["attack", "AUC", "accuracy", "TPR at 1 % FPR", "TPR at 0.1 % FPR"]
    rows = [[*heads, "pairs above half", "AUC, shuffled", "p"]]
    for attack, one in last.items():
        blind = one["shuffled"]
        few = one["tpr_01pct"] is None
        rows.append(
            [
                attack,
                with_interval(one["auc"]),
                with_interval(one["accuracy"]),
                with_interval(one["tpr_1pct"]),
                "too few people" if few else with_interval(one["tpr_01pct"], 4),
                f"{one['above_half']} of {len(one['pairs'])}",
                "-" if blind is None else f"{blind['lowest']:.3f} to {blind['highest']:.3f}",
                "-" if blind is None else f"{blind['p']:.3f}",
            ]
        )
    return rows


def pair_rows(audit: Mapping[str, Any], attack: str) -> Rows:
    """Return all ordered pairs of one attack at the last moment."""
    rows = [["attacker", "victim", "people", "AUC", "accuracy", "TPR at 1 % FPR"]]
    rows += [
        [
            pair["attacker"],
            pair["victim"],
            f"{pair['members']} + {pair['non_members']}",
            with_interval([pair["auc"], *pair["auc_interval"]], 2),
            with_interval([pair["accuracy"], *pair["accuracy_interval"]], 2),
            with_interval([pair["tpr_1pct"], *pair["tpr_1pct_interval"]], 2),
        ]
        for pair in audit["moments"][-1]["attacks"][attack]["pairs"]
    ]
    return rows


def audit_note(audit: Mapping[str, Any]) -> str:
    """Return what a reader must know beside the tables."""
    sizes = [site["members"] for site in audit["sites"].values()]
    kind = "synthetic people" if audit["synthetic"] else "people"
    text = (
        f"{len(sizes)} sites attack each other, each with {min(sizes)} to {max(sizes)} members and "
        f"as many held-out {kind} of like ages; models of {audit['ensemble']} rounds together. "
        f"{CHANCE}. Means are over all pairs; intervals are 95 % over people, not over other "
        "trainings."
    )
    if audit["left_out"]:
        text += f" Too few people at: {', '.join(audit['left_out'])}."
    return text


def round_rows(compared: Mapping[str, Any], attack: str) -> Rows:
    """Return a comparison at the same rounds."""
    rows = [["round", "final sparsity", "pruned then", "gap (years)", *_MEASURED]]
    for row in compared["attacks"][attack]["same_round"]:
        for cell in row["sparsities"]:
            then, gap = f"{cell['sparsity_then']:.1%}", with_interval(cell["gap"], 2)
            rows.append([str(row["round"]), f"{cell['sparsity']:g}", then, gap, *_measured(cell)])
    return rows


def gap_rows(compared: Mapping[str, Any], attack: str) -> Rows:
    """Return a comparison at the same gaps; only the headings where there is no common gap."""
    rows = [["gap (years)", "final sparsity", *_MEASURED]]
    for row in compared["attacks"][attack]["same_gap"]:
        rows += [
            [f"{row['gap']:.2f}", f"{cell['sparsity']:g}", *_measured(cell)]
            for cell in row["sparsities"]
        ]
    return rows


_MEASURED = ["AUC", "accuracy", "AUC minus the least sparse", "so"]


def _measured(cell: Mapping[str, Any]) -> list[str]:
    return [
        with_interval(cell["auc"]),
        with_interval(cell["accuracy"]),
        signed(cell.get("auc_minus_first")),
        cell.get("verdict", ""),
    ]


def conclusion(compared: Mapping[str, Any], attack: str) -> list[str]:
    """Say in sentences what the comparison allows to be said, and no more."""
    found = compared["attacks"][attack]
    last = found["same_round"][-1]
    lines = [
        f"Sparsity {cell['sparsity']:g} at round {last['round']}: {_SAYS[cell['verdict']]}"
        for cell in last["sparsities"][1:]
    ]
    if not found["same_gap"]:
        lines.append(
            "No gap is common to all runs, so that nothing can be said about sparsity apart from "
            "how much was learned by heart."
        )
        return lines
    for place, cell in enumerate(found["same_gap"][0]["sparsities"]):
        if not place:
            continue
        words = [row["sparsities"][place]["verdict"] for row in found["same_gap"]]
        lines.append(f"Sparsity {cell['sparsity']:g} at the same gap: {_over_gaps(words)}")
    return lines


_SAYS = {
    "leaked less": "attacked less successfully than the least sparse.",
    "leaked more": "attacked more successfully than the least sparse.",
    "cannot tell": "the data cannot tell; the interval of the difference holds 0.",
}


def _over_gaps(verdicts: Sequence[str]) -> str:
    """Join the verdicts at several gaps."""
    if len(set(verdicts)) == 1 and verdicts[0] in _SAYS:
        return _SAYS[verdicts[0]]
    if all(word.startswith("cannot tell") for word in verdicts):
        return "the data cannot tell."
    counts = [f"{word} at {verdicts.count(word)}" for word in dict.fromkeys(verdicts)]
    return f"not the same everywhere; of {len(verdicts)} gaps, {', '.join(counts)}."


def comparison_note(compared: Mapping[str, Any]) -> str:
    """Return what a reader must know beside a comparison's tables."""
    runs: dict[float, int] = {}
    for run in compared["runs"]:
        runs[run["sparsity"]] = runs.get(run["sparsity"], 0) + 1
    counts = ", ".join(f"{count} at {sparsity:g}" for sparsity, count in runs.items())
    text = (
        f"Runs by final sparsity: {counts}. {CHANCE}. Intervals are 95 % over people; what another "
        "training would give is not in them"
    )
    text += ", and few runs cannot show it." if min(runs.values()) < 3 else "."
    if not compared["same_people"]:
        text += " The sparsities have different people, so that differences are not paired."
    if compared["differing"]:
        text += f" The runs also differ in: {', '.join(compared['differing'])}."
    return text
