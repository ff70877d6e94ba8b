"""What a finished run says in numbers: accuracy and yardsticks, bytes, FLOPs, time, machine."""

import csv
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
    people = read_predictions(run)
    error = np.abs(people["predicted"] - people["age"])
    if not np.isfinite(error).all():
        raise RunError(
            f"run: the final model of {run} predicts no finite ages: the training diverged. Start "
            "a new run with a lower --lr."
        )
    sites = prepared.sites
    measured = yardsticks([site.train for site in sites], [site.test for site in sites])
    server = final.server
    last = final.history[-1]
    ages = np.concatenate([site.train.ages for site in sites] + [people["age"]])
    return {
        "layout": LAYOUT,
        "config": {k: v for k, v in asdict(config).items() if v is not None},
        "accuracy": {
            "test_mae": float(error.mean()),
            "test_r": _correlation(people["predicted"], people["age"]),
            "test_n": len(error),
            "site_mae": {
                str(site): float(error[people["site"] == site].mean())
                for site in sorted(set(people["site"]))
            },
            "site_n": {
                str(site): int((people["site"] == site).sum())
                for site in sorted(set(people["site"]))
            },
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
            "grid": list(server.in_shape),
        },
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
        raise RunError(f"run: {run} has no predictions; is it finished?")
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
