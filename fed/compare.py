"""Two or more finished runs side by side, with paired differences on the same held-out people."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.errors import RunError, UsageError
from sparsekit.fed.checkpoint import resume_command
from sparsekit.fed.result import LAYOUT, read_predictions

BOOTSTRAP_DRAWS = 10_000
RESULT_FILE = "result.json"
_PARTS = {
    *("accuracy", "bytes", "config", "data", "flops", "history", "machine", "model"),
    *("seconds", "sparsity", "yardsticks"),
}


@dataclass(frozen=True)
class Difference:
    """Mean of |error| of one run minus that of another over the same people, in years.

    ``low`` and ``high`` bound the 95 % bootstrap interval over people (percentile method).
    """

    mean: float
    low: float
    high: float
    people: int


def load_result(run: Path) -> dict[str, Any]:
    """Read a finished run's result.

    Raises
    ------
    UsageError
        If ``run`` is not a run folder.
    RunError
        If the run is not finished or its result is damaged.
    """
    if not (run / "config.toml").is_file():
        raise UsageError(f"run: {run} is not the folder of a run (it has no config.toml)")
    try:
        result: Any = json.loads((run / RESULT_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"run: {run} is not finished; continue it with {resume_command(run)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"run: {run / RESULT_FILE} is damaged ({error}); {resume_command(run)} writes it anew"
        ) from None
    if not isinstance(result, dict) or result.get("layout") != LAYOUT:
        raise RunError(f"run: {run / RESULT_FILE} has another layout than this release reads")
    missing = sorted(_PARTS - set(result))
    if missing:
        raise RunError(
            f"run: {run / RESULT_FILE} is damaged (it lacks {', '.join(missing)}); "
            f"{resume_command(run)} writes it anew"
        )
    return dict(result)


def load_people(run: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a finished run's held-out people and their predicted ages; see `read_predictions`.

    Raises
    ------
    RunError
        If there are none or a file of them is damaged.
    """
    try:
        return read_predictions(run)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"run: the predictions under {run / 'sites'} are damaged ({error!r}); "
            f"{resume_command(run)} writes them anew"
        ) from None


def paired_difference(run: Path, reference: Path) -> Difference:
    """Compare two runs' absolute errors, person by person.

    Raises
    ------
    RunError
        If they held out different people.
    """
    a, b = load_people(run), load_people(reference)
    same = (
        np.array_equal(a["participant"], b["participant"])
        and np.array_equal(a["site"], b["site"])
        and np.allclose(a["age"], b["age"])
    )
    if not same:
        raise RunError(
            f"compare: {run} and {reference} held out different people, so their errors cannot be "
            "paired; compare runs of one cohort with the same --seed"
        )
    return bootstrap_mean(np.abs(a["predicted"] - a["age"]) - np.abs(b["predicted"] - b["age"]))


def bootstrap_mean(values: npt.NDArray[np.float64]) -> Difference:
    """Return the mean and its 95 % percentile interval over resampled people; fixed seed."""
    random = np.random.default_rng(0)
    n = len(values)
    # In blocks: 10,000 draws of 10,000 people would be 800 MB at once.
    blocks = range(BOOTSTRAP_DRAWS // 100)
    means = np.concatenate([values[random.integers(0, n, (100, n))].mean(axis=1) for _ in blocks])
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(mean=float(values.mean()), low=float(low), high=float(high), people=n)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parents as it takes to tell them apart."""
    parts = [run.resolve().parts for run in runs]
    depth = 1
    while depth < max(len(p) for p in parts) and len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
