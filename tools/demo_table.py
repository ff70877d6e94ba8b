"""Write docs/results/demo.json from finished demo runs, and the tables made from it.

    python tools/demo_table.py collect RUNS...   # folders holding fedavg/ and fedsparsify/
    python tools/demo_table.py write             # docs/results/demo.md and the README's table

`write --check` changes nothing and exits with 1 if a table differs from what it would write.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.fed.compare import bootstrap_mean, load_result, paired_difference
from sparsekit.fed.result import read_predictions
from sparsekit.fed.tables import format_bytes, format_flops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"
PAGE = ROOT / "docs" / "results" / "demo.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo table: begin -->", "<!-- demo table: end -->"
KEPT = ("accuracy", "yardsticks", "data", "sparsity", "bytes", "flops", "seconds")
STRATEGIES = ("fedavg", "fedsparsify")


def collect(folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the tables need of every seed's two runs."""
    seeds = []
    errors = []
    for folder in folders:
        row: dict[str, Any] = {}
        for name in STRATEGIES:
            result = load_result(folder / name)
            row[name] = {key: result[key] for key in KEPT}
            row["seed"] = result["config"]["seed"]
            machine, config = result["machine"], result["config"]
        difference = paired_difference(folder / "fedsparsify", folder / "fedavg")
        row["difference"] = [difference.mean, difference.low, difference.high]
        sparse, dense = (read_predictions(folder / n) for n in ("fedsparsify", "fedavg"))
        errors.append(
            abs(sparse["predicted"] - sparse["age"]) - abs(dense["predicted"] - dense["age"])
        )
        seeds.append(row)
    pooled = bootstrap_mean(np.concatenate(errors))
    settings = {k: v for k, v in config.items() if k not in ("cohort", "seed", "strategy")}
    description = json.loads((folders[0] / "cohort" / "dataset_description.json").read_text())
    return {
        "machine": machine,
        "cohort": description["SparsekitCohort"],
        "settings": settings,
        "seeds": seeds,
        "pooled_difference": [pooled.mean, pooled.low, pooled.high],
    }


def _payload(run: dict[str, Any]) -> int:
    return int(run["bytes"]["down"]["payload"] + run["bytes"]["up"]["payload"])


def _of_mean(run: dict[str, Any]) -> str:
    mean = run["yardsticks"]["mean predictor"]["test_mae"]
    return f"{run['accuracy']['test_mae'] / mean:.2f}"


def _interval(values: Sequence[float]) -> str:
    mean, low, high = values
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


Cell = Callable[[dict[str, Any]], str]


def table(results: dict[str, Any]) -> str:
    """Return the Markdown table of all seeds."""
    seeds = results["seeds"]

    def dense(show: Cell) -> Cell:
        return lambda seed: show(seed["fedavg"])

    def sparse(show: Cell) -> Cell:
        return lambda seed: show(seed["fedsparsify"])

    def both(show: Cell) -> Cell:
        return lambda seed: f"{show(seed['fedavg'])} / {show(seed['fedsparsify'])}"

    def mae(run: dict[str, Any]) -> str:
        return f"{run['accuracy']['test_mae']:.2f}"

    def yardstick(name: str) -> Cell:
        return dense(lambda run: f"{run['yardsticks'][name]['test_mae']:.2f}")

    rows: dict[str, Cell] = {
        "test MAE, dense FedAvg (years)": dense(mae),
        "test MAE, FedSparsify (years)": sparse(mae),
        "difference [95 %, paired]": lambda seed: _interval(seed["difference"]),
        "MAE of the mean predictor": yardstick("mean predictor"),
        "MAE of a ventricle count": yardstick("ventricle count"),
        "MAE of a ridge on 8 mm voxels": yardstick("ridge on 8 mm voxels"),
        "MAE / mean predictor's, FedAvg": dense(_of_mean),
        "MAE / mean predictor's, FedSparsify": sparse(_of_mean),
        "final sparsity, prunable weights": sparse(lambda r: f"{r['sparsity']['prunable']:.2%}"),
        "payload down, dense / sparse": both(lambda r: format_bytes(r["bytes"]["down"]["payload"])),
        "payload up, dense / sparse": both(lambda r: format_bytes(r["bytes"]["up"]["payload"])),
        "payload, times less": lambda s: (
            f"{_payload(s['fedavg']) / _payload(s['fedsparsify']):.2f}x"
        ),
        "FLOPs counted, dense / sparse": both(lambda r: format_flops(r["flops"]["counted"])),
        "FLOPs executed, dense / sparse": both(lambda r: format_flops(r["flops"]["executed"])),
        "wall clock, dense / sparse (s)": both(lambda r: f"{r['seconds']:.0f}"),
    }
    lines = [
        "| | " + " | ".join(f"seed {seed['seed']}" for seed in seeds) + " |",
        "|---|" + "---|" * len(seeds),
    ]
    for title, cell in rows.items():
        lines.append(f"| {title} | " + " | ".join(cell(seed) for seed in seeds) + " |")
    return "\n".join(lines)


def _executed(results: dict[str, Any]) -> str:
    """Say why executed operations are more than the counted ones."""
    flops = [(seed["fedsparsify"]["flops"], seed["fedavg"]["flops"]) for seed in results["seeds"]]
    if any(sparse["executed"] >= dense["counted"] for sparse, dense in flops):
        return (
            "Masked convolution computed densely when this was measured, so executed FLOPs and "
            "wall clock are those of a dense network. "
        )
    if all(sparse["executed"] == sparse["counted"] for sparse, _ in flops):
        return ""
    return (
        "More FLOPs are executed than counted where zeros are computed because that is predicted "
        "to be faster: while most weights of a layer are there. "
    )


def summary(results: dict[str, Any]) -> str:
    """Return the table with what a reader must know beside it."""
    data = results["seeds"][0]["fedavg"]["data"]
    machine = results["machine"]
    ratios = [_payload(s["fedavg"]) / _payload(s["fedsparsify"]) for s in results["seeds"]]
    kind = "Synthetic people" if data["synthetic"] else "People"
    cohort = results["cohort"]
    text = (
        f"{kind}, ages {data['age_min']:.0f} to {data['age_max']:.0f}: {data['train_n']} trained "
        f"on, {data['test_n']} held out, {data['sites']} sites; a new cohort, split and start per "
        f"seed. The spread between people of one age is {cohort['residual_scale']:g} times that of "
        "real people, so that a network learns within minutes. FedSparsify minus FedAvg over all "
        f"seeds' held-out people: {_interval(results['pooled_difference'])} years (95 %). Payload: "
        f"{statistics.median(ratios):.2f}x less (median). {_executed(results)}Measured on "
        f"{machine['cores']} cores ({machine['processor']}), torch {machine['torch']}."
    )
    return f"{table(results)}\n\n{text}"


def page(results: dict[str, Any]) -> str:
    """Return docs/results/demo.md."""
    settings = ", ".join(f"{name} = {value}" for name, value in results["settings"].items())
    return "\n".join(
        [
            "# The demonstration on three seeds",
            "",
            "Written by `make demo-seeds` from docs/results/demo.json; not by hand.",
            "",
            summary(results),
            "",
            f"Settings: {settings}.",
            "",
        ]
    )


def with_table(readme: str, results: dict[str, Any]) -> str:
    """Return the README with the table between its two marks replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{summary(results)}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Collect or write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("runs", nargs="+", type=Path)
    writing = commands.add_parser("write")
    writing.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.command == "collect":
        RESULTS.write_text(json.dumps(collect(options.runs), indent=1, sort_keys=True) + "\n")
        return 0
    results = json.loads(RESULTS.read_text())
    wanted = {PAGE: page(results), README: with_table(README.read_text(), results)}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from docs/results/demo.json", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
