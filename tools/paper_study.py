"""Play the grid of runs behind docs/results/paper.md; start it again and it goes on.

    python tools/paper_study.py FOLDER            # every cell (make paper)
    python tools/paper_study.py FOLDER --small    # a few (make paper-small)
    python tools/paper_study.py FOLDER --list     # what there is to do, and what is done

Each finished run leaves one small file in FOLDER/results; a run with such a file is skipped, one
that was interrupted is resumed. Cohorts are made when their turn comes, prepared scans of a cohort
are removed when its last run is done.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsekit.fed.compare import load_people, load_result
from sparsekit.fed.tables import format_bytes

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "examples" / "demo.toml"
COMMAND = Path(sys.executable).with_name("sparsekit")
ENVIRONMENTS = ("uniform-iid", "uniform-noniid", "skewed-noniid")
SPARSITIES = (0.85, 0.9, 0.95, 0.99)
SEEDS = (0, 1, 2)
COHORT = ("--subjects", "2000", "--sites", "8", "--resolution", "4", "--residual-scale", "0.25")
SITES = 8

RECIPES: dict[str, dict[str, Any]] = {
    # What travels and is computed without any pruning.
    "dense": {"strategy": "fedavg"},
    # FedSparsify as published: one threshold over all layers, the cubic over the whole run.
    "cubic": {"scope": "global", "exponent": 3.0},
    # The same curve, done after 24 of 60 rounds; magnitude against work, 4-bit changes.
    "early": {"scope": "flops", "prune_end": 24, "values": "int4"},
    # No dense round at all.
    "sparse-start": {"scope": "flops", "values": "int8"},
}
# Settings that are the sparsity of the cell.
FOLLOWING = {"sparse-start": "initial_sparsity"}
KEPT = ("accuracy", "yardsticks", "data", "sparsity", "bytes", "flops", "seconds", "machine")


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the grid; its name names its files."""

    environment: str
    seed: int
    strategy: str
    sparsity: float
    recipe: str

    @property
    def cohort(self) -> str:
        """Name of the cohort's folder."""
        return f"{self.environment}-{self.seed}"

    @property
    def name(self) -> str:
        """Name of the run's folder and of its result."""
        return f"{self.cohort}-{self.strategy}-{100 * self.sparsity:g}-{self.recipe}"


def grid(*, small: bool) -> list[Cell]:
    """Return the cells, those of a cohort one after the other."""
    if small:
        recipes = [("fedavg", 0.0, "dense"), ("fedsparsify-global", 0.95, "early")]
        return [Cell("uniform-iid", seed, *cell) for seed in SEEDS for cell in recipes]
    cells = []
    for environment in ENVIRONMENTS:
        for seed in SEEDS:
            cells.append(Cell(environment, seed, "fedavg", 0.0, "dense"))
            cells += [
                Cell(environment, seed, "fedsparsify-global", 0.95, recipe)
                for recipe in ("cubic", "sparse-start")
            ]
            for strategy in ("fedsparsify-global", "fedsparsify-local"):
                cells += [Cell(environment, seed, strategy, s, "early") for s in SPARSITIES]
            if environment == ENVIRONMENTS[0]:
                cells += [
                    Cell(environment, seed, "centralized", s, "early" if s else "dense")
                    for s in (0.0, *SPARSITIES)
                ]
    return cells


def settings(cell: Cell, threads: int) -> dict[str, Any]:
    """Return the settings of a cell's run."""
    found = tomllib.loads(BASE.read_text(encoding="utf-8")) | RECIPES[cell.recipe]
    found |= {"strategy": cell.strategy, "sparsity": cell.sparsity}
    found |= {"seed": cell.seed, "threads": threads}
    if cell.recipe in FOLLOWING:
        found[FOLLOWING[cell.recipe]] = cell.sparsity
    if cell.strategy == "centralized":
        # As many scans a round as all sites see together.
        found["max_steps"] *= SITES
    return found


def play(cell: Cell, folder: Path, threads: int) -> dict[str, Any]:
    """Make what the cell needs, play or resume its run, and return what is kept of it."""
    cohort = folder / "cohorts" / cell.cohort
    if not cohort.exists():
        half = cohort.with_name(f".{cohort.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.parent.mkdir(parents=True, exist_ok=True)
        where = ("--environment", cell.environment, "--seed", str(cell.seed))
        _sparsekit("cohort", "make", half, *COHORT, *where, "--workers", str(threads))
        half.rename(cohort)
    run, cache = folder / "runs" / cell.name, folder / "cache" / cell.cohort
    wanted = settings(cell, threads)
    if not (run / "result.json").exists():
        if (run / "config.toml").exists():
            _sparsekit("fed", "resume", run, "--cache", cache)
        else:
            shutil.rmtree(run, ignore_errors=True)
            run.parent.mkdir(parents=True, exist_ok=True)
            file = run.with_name(f"{run.name}.toml")
            lines = [f"{name} = {json.dumps(value)}" for name, value in wanted.items()]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8")
            options = ("--cohort", cohort, "--out", run, "--cache", cache, "--config", file)
            _sparsekit("fed", "run", *options)
    result, people = load_result(run), load_people(run)
    errors = abs(people["predicted"] - people["age"])
    return {
        "cell": asdict(cell),
        "settings": wanted,
        **{part: result[part] for part in KEPT},
        "mean_density": _mean_density(result),
        "test_mae_by_round": {
            entry["round"]: entry["test_mae"] for entry in result["history"] if entry["test_n"]
        },
        "participants": people["participant"].tolist(),
        "errors": [round(float(error), 5) for error in errors],
    }


def _mean_density(result: dict[str, Any]) -> float:
    """Share of the prunable weights that rounds trained with, on average."""
    trained: list[float] = [1 - entry["sparsity_prunable"] for entry in result["history"][:-1]]
    return sum(trained) / len(trained)


def _sparsekit(*arguments: str | Path) -> None:
    done = subprocess.run([COMMAND, *arguments], check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        text = " ".join(str(one) for one in arguments)
        raise SystemExit(f"sparsekit {text} ended with exit code {done.returncode}")


def result_file(folder: Path, cell: Cell) -> Path:
    """Return where a cell's result stands."""
    return folder / "results" / f"{cell.name}.json"


def is_done(folder: Path, cell: Cell, threads: int) -> bool:
    """Whether the cell has a result that was made with the settings that it has now."""
    path = result_file(folder, cell)
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    if found == settings(cell, threads):
        return True
    raise SystemExit(
        f"{path} was made with other settings; remove it and {folder / 'runs' / cell.name}, or "
        "choose another folder"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Play what is missing; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="a few cells only")
    parser.add_argument("--only", default="", help="cells with this in their names")
    parser.add_argument("--list", action="store_true", help="say what is done and end")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    folder, threads = options.folder, options.threads
    cells = [cell for cell in grid(small=options.small) if options.only in cell.name]
    left = [cell for cell in cells if not is_done(folder, cell, threads)]
    if options.list:
        for cell in cells:
            print("missing" if cell in left else "done   ", cell.name)
        return 0
    print(f"{len(cells) - len(left)} of {len(cells)} runs are done", flush=True)
    start = time.monotonic()
    for number, cell in enumerate(left, start=1):
        kept = play(cell, folder, threads)
        path = result_file(folder, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(kept), encoding="utf-8")
        os.replace(half, path)
        shutil.rmtree(folder / "runs" / cell.name / "checkpoints", ignore_errors=True)
        if all(other.cohort != cell.cohort for other in left[number:]):
            shutil.rmtree(folder / "cache" / cell.cohort, ignore_errors=True)
        moved = sum(kept["bytes"][way]["payload"] for way in ("down", "up"))
        hours = (time.monotonic() - start) / number * (len(left) - number) / 3600
        print(
            f"[{len(cells) - len(left) + number}/{len(cells)}] {cell.name}: "
            f"MAE {kept['accuracy']['test_mae']:.2f}, {format_bytes(moved)}, "
            f"{kept['seconds']:.0f} s; about {hours:.1f} h left",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
