"""Write docs/results/values.json from runs that differ in `--values` alone, and its page.

    python tools/values_table.py collect FOLDER   # holds one run for each precision
    python tools/values_table.py write            # docs/results/values.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from page_command import run

from sparsekit.codec.core import Values
from sparsekit.fed.compare import load_result, paired_difference

BASELINE = "lossless"
BARS = {"lossless": 5.0, "bf16": 10.0, "int8": 14.0, "int4": 30.0}


def collect(folder: Path) -> dict[str, Any]:
    """Return what the page needs of every run."""
    runs = {}
    for values in get_args(Values):
        if not (folder / values).exists():
            continue
        result = load_result(folder / values)
        difference = paired_difference(folder / values, folder / BASELINE)
        changes = [entry["weight_change"] for entry in result["history"] if entry["round"]]
        purges = [
            (mask_bits, entry["round"])
            for entry in result["history"]
            if (mask_bits := entry.get("mask_bits_per_weight")) is not None
        ]
        runs[values] = {
            "bytes": result["bytes"],
            "test_mae": result["accuracy"]["test_mae"],
            "difference": [difference.mean, difference.low, difference.high],
            "sparsity": result["sparsity"]["prunable"],
            "mean_weight_change": sum(changes) / len(changes),
            "most_mask_bits": max(purges, default=None),
        }
    settings = {
        k: v for k, v in result["config"].items() if k not in ("cohort", "values", "strategy")
    }
    return {
        "machine": result["machine"],
        "strategy": result["config"]["strategy"],
        "people": [result["data"]["train_n"], result["data"]["test_n"], result["data"]["sites"]],
        "settings": settings,
        "runs": runs,
    }


def _times(run: dict[str, Any], level: str) -> float:
    both = (run["bytes"]["down"], run["bytes"]["up"])
    return float(sum(d["dense_equivalent"] for d in both) / sum(d[level] for d in both))


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _legend(results: dict[str, Any]) -> str:
    train, test, sites = results["people"]
    machine = results["machine"]
    return (
        f"One {results['strategy']} run each on the same synthetic cohort: {train} people trained "
        f"on, {test} held out, {sites} sites. All rounds, both directions, the first model and the "
        "final one included. Dense float32: 4 bytes for each weight of each message that carries "
        "a model. Change of the weights: norm of a round's change of the average over the norm of "
        f"the kept weights. {machine['processor']}, torch {machine['torch']}."
    )


def page(results: dict[str, Any]) -> str:
    """Return docs/results/values.md."""
    rows: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "payload, times less than dense float32": lambda _, r: f"{_times(r, 'payload'):.2f}x",
        "with headers and framing": lambda _, r: f"{_times(r, 'transport'):.2f}x",
        "wanted": lambda name, _: f"{BARS[name]:g}x" if name in BARS else "",
        "final sparsity, prunable weights": lambda _, r: f"{r['sparsity']:.2%}",
        "largest mask of a download (bits a weight)": lambda _, r: (
            "" if r["most_mask_bits"] is None else f"{r['most_mask_bits'][0]:.3f}"
        ),
        "test MAE (years)": lambda _, r: f"{r['test_mae']:.2f}",
        "difference to lossless [95 %, paired]": lambda _, r: _interval(r["difference"]),
        "mean change of the weights in a round": lambda _, r: f"{r['mean_weight_change']:.1%}",
    }
    runs = results["runs"]
    settings = ", ".join(f"{name} = {value}" for name, value in results["settings"].items())
    return "\n".join(
        [
            "# Bytes of a whole run by the precision of what travels",
            "",
            "Written by `make values` from docs/results/values.json; not by hand.",
            "",
            "| `--values` | " + " | ".join(runs) + " |",
            "|---|" + "---|" * len(runs),
            *(
                f"| {title} | " + " | ".join(cell(n, r) for n, r in runs.items()) + " |"
                for title, cell in rows.items()
            ),
            "",
            _legend(results),
            "",
            f"Settings: {settings}.",
            "",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(__doc__, "values", collect, page))
