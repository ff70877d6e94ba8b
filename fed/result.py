"""What a finished run says in numbers: accuracy and yardsticks, bytes, FLOPs, time, machine."""

import csv
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparsekit._version import __version__
from sparsekit.errors import RunError
from sparsekit.fed.checkpoint import Checkpoint
from sparsekit.fed.cohort.yardsticks import yardsticks
from sparsekit.fed.config import RunConfig
from sparsekit.fed.ledger import Ledger
from sparsekit.fed.measures import sum_bytes
from sparsekit.fed.prepare import Prepared

LAYOUT = 1
LEVELS: tuple[str, ...] = ("dense_equivalent", "payload", "control", "framing", "transport")
PREDICTIONS_FILE = "predictions.csv"


def summarize(
    config: RunConfig, run: Path, final: Checkpoint, prepared: Prepared
) -> dict[str, Any]:
    """Collect a finished run's result.

    Parameters
    ----------
    config : RunConfig
        Its settings.
    run : Path
        Its folder, with the ledger and the sites' predictions.
    final : Checkpoint
        Its last state and history.
    prepared : Prepared
        All sites, not pooled, and what was left out.

    Raises
    ------
    RunError
        If the final model predicts no finite ages.
    """
    server = final.server
    last = final.history[-1]
    found = _as_reported(final) if config.deployed else _from_people(run, prepared)
    if not found["accuracy"]["test_n"] or not math.isfinite(found["accuracy"]["test_mae"]):
        raise RunError(
            f"run: the final model of {run} predicts no finite ages: the training diverged. Start "
            "a new run with a lower --lr."
        )
    found["data"]["grid"] = list(server.in_shape)
    return {
        "layout": LAYOUT,
        "config": {k: v for k, v in asdict(config).items() if v is not None},
        **found,
        "sparsity": {
            "prunable": last["sparsity_prunable"],
            "all": last["sparsity_all"],
            "layers": last["layer_sparsity"],
        },
        "model": {
            "parameters": sum(tensor.numel() for tensor in server.weights.values()),
            "mean_age": server.mean_age,
        },
        "bytes": total_bytes(run),
        "flops": {
            "counted": sum(entry["flops_counted"] for entry in final.history),
            "executed": sum(entry["flops_executed"] for entry in final.history),
        },
        "seconds": final.seconds,
        "history": final.history,
        "machine": describe_machine(),
    }


def _from_people(run: Path, prepared: Prepared) -> dict[str, Any]:
    """Compute accuracy and yardsticks from scans and predictions, where both are here."""
    people = read_predictions(run)
    error = np.abs(people["predicted"] - people["age"])
    sites = prepared.sites
    measured = yardsticks([site.train for site in sites], [site.test for site in sites])
    ages = np.concatenate([site.train.ages for site in sites] + [people["age"]])
    names = sorted(set(people["site"]))
    return {
        "accuracy": {
            "test_mae": float(error.mean()),
            "test_r": _correlation(people["predicted"], people["age"]),
            "test_n": len(error),
            "site_mae": {str(site): float(error[people["site"] == site].mean()) for site in names},
            "site_n": {str(site): int((people["site"] == site).sum()) for site in names},
        },
        "yardsticks": {name: {"test_mae": one.mae} for name, one in measured.items()},
        "data": {
            "sites": len(sites),
            "train_n": sum(len(site.train) for site in sites),
            "test_n": len(error),
            "skipped": len(prepared.skipped),
            "synthetic": prepared.synthetic,
            "age_min": float(ages.min()),
            "age_max": float(ages.max()),
            "preprocessing": sites[0].preprocessing_id,
        },
    }


def _as_reported(final: Checkpoint) -> dict[str, Any]:
    """Take the sites' sums: scans, ages and predictions are on other machines, and stay there."""
    last = final.history[-1]
    mae = last["test_mae"]
    return {
        "accuracy": {
            "test_mae": math.nan if mae is None else mae,
            "test_r": None,
            "test_n": last["test_n"],
            "site_mae": last["site_mae"],
            "site_n": last["site_n"],
        },
        "yardsticks": {},
        "data": {
            "sites": len(final.contents),
            "train_n": last["train_n"],
            "test_n": last["test_n"],
            "skipped": None,
            "synthetic": None,
            "age_min": None,
            "age_max": None,
            "preprocessing": None,
        },
    }


def total_bytes(run: Path) -> dict[str, dict[str, int | None]]:
    """Sum the run's ledger: bytes by direction and level, None where the engine hides them."""
    rows = list(Ledger(run / "ledger.jsonl"))
    return {
        direction: {level: sum_bytes(rows, direction, f"{level}_bytes") for level in LEVELS}
        for direction in ("down", "up")
    }


def read_predictions(run: Path) -> dict[str, npt.NDArray[Any]]:
    """Read every site's held-out predictions: participant, site, age and predicted, row by row.

    Raises
    ------
    RunError
        If there are none.
    """
    rows: list[dict[str, str]] = []
    for path in sorted(run.glob(f"sites/*/{PREDICTIONS_FILE}")):
        with path.open(newline="", encoding="utf-8") as stream:
            rows += csv.DictReader(stream)
    if not rows:
        raise RunError(
            f"run: {run} has no predictions; is it finished, and are its sites on this machine?"
        )
    # A site that missed the final hand-out still has its predictions of an earlier model.
    newest = max(int(row["round"]) for row in rows)
    rows = [row for row in rows if int(row["round"]) == newest]
    rows.sort(key=lambda row: (row["site"], row["participant"]))
    return {
        "participant": np.array([row["participant"] for row in rows]),
        "site": np.array([row["site"] for row in rows]),
        "age": np.array([float(row["age"]) for row in rows]),
        "predicted": np.array([float(row["predicted"]) for row in rows]),
    }


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def describe_machine() -> dict[str, Any]:
    """Name the processor and the versions that the numbers were measured with."""
    processor = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    processor = line.split(":", 1)[1].strip()
                    break
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "sparsekit": __version__,
    }
