"""A run's line items in words, shared by the terminal and the HTML report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsekit.fed.compare import load_result, paired_difference


def format_bytes(count: float) -> str:
    """Return a count of bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def format_flops(count: float) -> str:
    """Return a count of floating-point operations with a decimal unit."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.2f} {unit}FLOP"
        count /= 1000
    return f"{count:.2f} EFLOP"


def line_items(result: Mapping[str, Any]) -> dict[str, str]:
    """Return what a finished run's table says, in order."""
    accuracy, sparsity = result["accuracy"], result["sparsity"]
    down, up = result["bytes"]["down"], result["bytes"]["up"]
    data = result["data"]
    yardsticks = result["yardsticks"]
    mean_mae = yardsticks["mean predictor"]["test_mae"] if yardsticks else None
    origins = {True: "synthetic", False: "as given", None: "of the sites, not seen here"}
    items = {
        "strategy": result["config"]["strategy"],
        "seed": f"{result['config']['seed']} (one run)",
        "data": origins[data["synthetic"]],
        "test MAE": f"{accuracy['test_mae']:.2f} years",
    }
    for name, one in yardsticks.items():
        items[f"  beside it: {name}"] = f"{one['test_mae']:.2f} years"
    items |= {
        # Where all people are of one age, the mean predictor makes no error.
        "  test MAE / mean predictor's": (
            f"{accuracy['test_mae'] / mean_mae:.3f}" if mean_mae else "-"
        ),
        "people trained on / held out": f"{data['train_n']} / {data['test_n']}",
        "scans left out": "-" if data["skipped"] is None else str(data["skipped"]),
        "sites": str(data["sites"]),
        "ages": (
            "-" if data["age_min"] is None else f"{data['age_min']:.0f} to {data['age_max']:.0f}"
        ),
        "final sparsity, prunable weights": f"{sparsity['prunable']:.2%}",
        "final sparsity, all weights": f"{sparsity['all']:.2%}",
        "payload down": format_bytes(down["payload"]),
        "payload up": format_bytes(up["payload"]),
        "  dense float32 equivalent": format_bytes(
            down["dense_equivalent"] + up["dense_equivalent"]
        ),
        "transport (payload, control, framing)": (
            "not visible through this engine"
            if down["transport"] is None or up["transport"] is None
            else format_bytes(down["transport"] + up["transport"])
        ),
        "training FLOPs counted": format_flops(result["flops"]["counted"]),
        "training FLOPs executed": format_flops(result["flops"]["executed"]),
        "wall clock of the rounds": f"{result['seconds']:.1f} s",
    }
    return items


def difference_cells(runs: Sequence[Path]) -> list[str]:
    """Return each run's paired difference to the first, as text."""
    # Of people on other machines only sums are known, and nothing can be paired.
    here = [load_result(run)["data"]["age_min"] is not None for run in runs]
    cells = ["-"]
    for run, known in zip(runs[1:], here[1:], strict=True):
        if not (known and here[0]):
            cells.append("-")
            continue
        found = paired_difference(run, runs[0])
        cells.append(f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}] years")
    return cells


def saving_cells(runs: Sequence[Path]) -> dict[str, list[str]]:
    """Return how many times less each run sent and computed than the first."""
    results = [load_result(run) for run in runs]

    def payload(result: Mapping[str, Any]) -> int:
        return int(result["bytes"]["down"]["payload"] + result["bytes"]["up"]["payload"])

    def ratio(first: float, other: float) -> str:
        return f"{first / other:.2f}x" if first and other else "-"

    first = results[0]
    return {
        "payload: times less than the first": [
            ratio(payload(first), payload(result)) for result in results
        ],
        "FLOPs counted: times less": [
            ratio(first["flops"]["counted"], result["flops"]["counted"]) for result in results
        ],
        "wall clock: times less": [
            ratio(first["seconds"], result["seconds"]) for result in results
        ],
    }
