"""Write docs/results/paper.json from a study's results, and its page.

    python tools/paper_table.py collect FOLDER   # of tools/paper_study.py
    python tools/paper_table.py write            # docs/results/paper.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from page_command import run

from sparsekit.fed.compare import bootstrap_mean
from sparsekit.fed.tables import format_bytes, format_flops

MARGIN = 0.30  # years: what a sparse model may be worse by, at most, to count as equal
PEOPLE, SEEDS = 1000, 3  # and on how many held-out people and seeds at least
BYTES, FLOPS = 20.0, 4.0  # times less than dense FedAvg

Row = dict[str, Any]


def collect(folder: Path) -> dict[str, Any]:
    """Return one row for each environment, strategy, sparsity and recipe, over its seeds."""
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "results").glob("*.json"))
    ]
    if not found:
        raise SystemExit(f"{folder / 'results'} holds no result; run tools/paper_study.py first")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for one in found:
        cell = one["cell"]
        key = tuple(cell[part] for part in ("environment", "strategy", "sparsity", "recipe"))
        groups.setdefault(key, []).append(one)
    rows = [_row(key, runs, found) for key, runs in sorted(groups.items())]
    return {"machine": found[0]["machine"], "rows": rows}


def _row(key: tuple[Any, ...], runs: Sequence[Row], found: Sequence[Row]) -> Row:
    runs = sorted(runs, key=lambda one: one["cell"]["seed"])
    environment, strategy, sparsity, recipe = key
    row: Row = {
        "environment": environment,
        "strategy": strategy,
        "sparsity": sparsity,
        "recipe": recipe,
        "settings": {k: v for k, v in runs[0]["settings"].items() if k != "seed"},
        "seeds": [one["cell"]["seed"] for one in runs],
        "test_mae": [one["accuracy"]["test_mae"] for one in runs],
        "held_out": [one["data"]["test_n"] for one in runs],
        "trained_on": runs[0]["data"]["train_n"],
        "ages": [runs[0]["data"]["age_min"], runs[0]["data"]["age_max"]],
        "synthetic": runs[0]["data"]["synthetic"],
        "yardsticks": {
            name: [one["yardsticks"][name]["test_mae"] for one in runs]
            for name in runs[0]["yardsticks"]
        },
        "final_sparsity": [one["sparsity"]["prunable"] for one in runs],
        "mean_density": [one["mean_density"] for one in runs],
        "payload_bytes": [_bytes(one, "payload") for one in runs],
        "transport_bytes": [_bytes(one, "transport") for one in runs],
        "flops_counted": [one["flops"]["counted"] for one in runs],
        "flops_executed": [one["flops"]["executed"] for one in runs],
        "seconds": [one["seconds"] for one in runs],
    }
    # Pooled training is compared with pooled training.
    reference = "centralized" if strategy == "centralized" else "fedavg"
    dense = {
        one["cell"]["seed"]: one
        for one in found
        if (one["cell"]["environment"], one["cell"]["strategy"]) == (environment, reference)
        and one["cell"]["recipe"] == "dense"
    }
    pairs = [(one, dense[one["cell"]["seed"]]) for one in runs if one["cell"]["seed"] in dense]
    if recipe == "dense" or not pairs:
        return row
    differences = [_paired(sparse, other) for sparse, other in pairs]
    pooled = bootstrap_mean(np.concatenate(differences))
    row["difference"] = {
        "seeds": [one["cell"]["seed"] for one, _ in pairs],
        "people": pooled.people,
        "mean": pooled.mean,
        "low": pooled.low,
        "high": pooled.high,
        "by_seed": [float(one.mean()) for one in differences],
    }
    for name in ("payload", "transport", "counted", "executed", "seconds"):
        row["difference"][f"{name}_times"] = [
            _cost(other, name) / _cost(sparse, name) if _cost(sparse, name) else None
            for sparse, other in pairs
        ]
    # Against 4 bytes for each weight of each message, which no codec has touched.
    row["difference"]["raw_times"] = [
        _bytes(other, "dense_equivalent") / _bytes(sparse, "transport")
        if _bytes(sparse, "transport")
        else None
        for sparse, other in pairs
    ]
    return row


def _cost(one: Row, name: str) -> float:
    if name in ("payload", "transport"):
        return _bytes(one, name)
    return float(one["seconds"] if name == "seconds" else one["flops"][name])


def _bytes(one: Row, level: str) -> int:
    return int(sum(one["bytes"][way][level] or 0 for way in ("down", "up")))


def _paired(sparse: Row, dense: Row) -> npt.NDArray[np.float64]:
    if sparse["participants"] != dense["participants"]:
        raise SystemExit(f"{sparse['cell']} and its dense run held out different people")
    ours, theirs = (np.array(one["errors"], np.float64) for one in (sparse, dense))
    return ours - theirs


def is_equal(row: Row) -> bool | None:
    """Whether the sparse model is as good as the dense one; None where too little was run."""
    difference = row.get("difference")
    if not difference or difference["people"] < PEOPLE or len(difference["seeds"]) < SEEDS:
        return None
    return bool(difference["high"] <= MARGIN)


def page(results: dict[str, Any]) -> str:
    """Return docs/results/paper.md."""
    rows = results["rows"]
    machine = results["machine"]
    ages = rows[0]["ages"]
    parts = [
        "# Sparse against dense, by sparsity, strategy and environment",
        "",
        "Written by `make paper` or `make paper-small` from docs/results/paper.json, not by hand.",
        "",
        f"{'Synthetic people' if rows[0]['synthetic'] else 'People'}, ages {ages[0]:.0f} to "
        f"{ages[1]:.0f}: {rows[0]['trained_on']} trained on, {rows[0]['held_out'][0]} held out per "
        "seed; every seed has another cohort, split and start. MAE in years on held-out people, "
        "mean over the seeds. *Difference*: sparse minus dense error of the same people, pooled "
        "over seeds, with its 95 % bootstrap interval over people, which does not hold the spread "
        "between starts: see the seeds. *Equal*: the upper end is at most "
        f"{MARGIN:.2f} years, on at least {PEOPLE} people, {SEEDS} seeds, else no verdict. "
        "*Bytes*: all application and framing bytes both ways, times less than those of the dense "
        "run with its lossless codec / than its weights as plain float32. *FLOPs*: of all training "
        "steps, dense gradients of regrowth included, counted from the masks and executed on the "
        "paths that were taken. Medians over seeds. Wall clock varies with the machine's load.",
        "",
        f"Measured on {machine['cores']} cores ({machine['processor']}), torch {machine['torch']}.",
    ]
    for environment in dict.fromkeys(row["environment"] for row in rows):
        own = [row for row in rows if row["environment"] == environment]
        parts += ["", f"## {environment}", "", *_table(own), "", *_yardsticks(own)]
    parts += ["", "## Bars", "", *_bars(rows), "", "## Settings", "", *_settings(rows), ""]
    return "\n".join(parts)


def _table(rows: Iterable[Row]) -> list[str]:
    lines = [
        "| strategy, recipe | sparsity | seeds | MAE | difference [95 %] | by seed | equal | bytes "
        "| FLOPs counted / executed | mean density | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = row.get("difference")
        cells = [
            f"{row['strategy']}, {row['recipe']}",
            f"{statistics.mean(row['final_sparsity']):.1%}",
            str(len(row["seeds"])),
            f"{statistics.mean(row['test_mae']):.2f}",
        ]
        if difference is None:
            moved = statistics.median(row["transport_bytes"])
            counted, executed = (
                format_flops(statistics.median(row[f"flops_{kind}"]))
                for kind in ("counted", "executed")
            )
            cells += ["-", "-", "-", format_bytes(moved), f"{counted} / {executed}"]
        else:
            interval = f"[{difference['low']:+.2f}, {difference['high']:+.2f}]"
            verdict = {None: "no verdict", True: "yes", False: "no"}[is_equal(row)]
            cells += [
                f"{difference['mean']:+.2f} {interval}",
                ", ".join(f"{one:+.2f}" for one in difference["by_seed"]),
                verdict,
                f"{_times(difference['transport_times'])} / {_times(difference['raw_times'])}",
                f"{_times(difference['counted_times'])} / {_times(difference['executed_times'])}",
            ]
        cells += [
            f"{statistics.mean(row['mean_density']):.3f}",
            f"{statistics.median(row['seconds']):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}x" if known else "-"


def _yardsticks(rows: Sequence[Row]) -> list[str]:
    means = [
        f"{name} {statistics.mean(values):.2f}" for name, values in rows[0]["yardsticks"].items()
    ]
    return [f"Beside them, on the same people: {', '.join(means)}."]


def _bars(rows: Iterable[Row]) -> list[str]:
    lines = []
    for row in rows:
        if row.get("difference") is None or row["strategy"] == "centralized":
            continue
        if row["sparsity"] != 0.95:
            continue
        moved, raw, executed = (
            statistics.median(row["difference"][f"{kind}_times"])
            for kind in ("transport", "raw", "executed")
        )
        equal = {None: "no verdict, too few people or seeds", True: "yes", False: "no"}
        lines.append(
            f"- {row['environment']}, {row['strategy']}, {row['recipe']} at 95 %: equal error "
            f"{equal[is_equal(row)]}; bytes {raw:.1f}x under plain float32 ({_met(raw >= BYTES)} "
            f"{BYTES:g}x), {moved:.1f}x under the coded dense run ({_met(moved >= BYTES)}); "
            f"executed FLOPs {executed:.1f}x ({_met(executed >= FLOPS)} {FLOPS:g}x)."
        )
    return lines or ["No sparse run at 95 % is there yet."]


def _met(holds: bool) -> str:
    return "meets" if holds else "misses"


def _settings(rows: Iterable[Row]) -> list[str]:
    shown: dict[str, str] = {}
    for row in rows:
        text = ", ".join(
            f"{name} = {value}"
            for name, value in sorted(row["settings"].items())
            if name not in ("strategy", "sparsity", "initial_sparsity", "max_steps")
        )
        shown.setdefault(row["recipe"], text)
    text = "a start at the final sparsity where it says *sparse-start*; centralized runs see as "
    return [
        *(f"- {recipe}: {text}" for recipe, text in shown.items()),
        f"- {text}many scans a round as all sites together.",
    ]


if __name__ == "__main__":
    sys.exit(run(__doc__, "paper", collect, page))
