"""Masks of a federated run, from the checkpoints of its rounds."""

import tomllib
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit.bench.network import GRID, LAYERS, convolutions
from sparsekit.codec import decode, decode_masks
from sparsekit.errors import ArgumentError
from sparsekit.models import BrainAgeCNN

_SETTINGS = (
    *("strategy", "scope", "sparsity", "rounds", "epochs", "batch", "optimizer", "lr", "width"),
    *("resolution", "seed"),
)


def _payloads(run: Path) -> list[Path]:
    found = sorted((run / "checkpoints").glob("round-*/model.spu"))
    if not found:
        raise ArgumentError(f"{run}: it has no checkpoints; run with --keep-checkpoints 0")
    return found


def _masks(payload: Path) -> dict[str, Tensor]:
    """Masks of the convolutions of a checkpoint, by the names of `LAYERS`."""
    stored = decode_masks(payload.read_bytes())
    model = BrainAgeCNN(GRID)
    names = {id(module): path for path, module in model.named_modules()}
    masks = {}
    for layer, module in convolutions(model).items():
        mask = stored.get(f"{names[id(module)]}.weight")
        if mask is None or mask.shape != module.weight.shape:
            raise ArgumentError(
                f"{payload}: expected the network of full width with {len(LAYERS)} convolutions; "
                "train it with --width 1 --resolution 2"
            )
        masks[layer] = mask
    return masks


def _sparsity(masks: dict[str, Tensor]) -> float:
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def closest_round(run: Path, sparsity: float) -> int:
    """Round of a run whose model comes closest to a sparsity of all convolutions' weights.

    Raises
    ------
    ArgumentError
        The run has no checkpoints, or they hold another network.
    """
    payloads = _payloads(run)
    best = min(payloads, key=lambda path: abs(_sparsity(_masks(path)) - sparsity))
    return int(best.parent.name.removeprefix("round-"))


def read_run(run: Path, round_number: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Masks of the model after a round, by the names of `LAYERS`, and the run's settings.

    Raises
    ------
    ArgumentError
        The run has no checkpoints, or they hold another network.
    """
    (payload,) = [p for p in _payloads(run) if p.parent.name == f"round-{round_number:05d}"]
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    settings = {name: config[name] for name in _SETTINGS if name in config}
    return _masks(payload), {"round": round_number, "run": settings}


def read_weights(run: Path, round_number: int) -> dict[str, Tensor]:
    """Weights of the model after a round.

    Raises
    ------
    ArgumentError
        The run has no checkpoints.
    """
    (payload,) = [p for p in _payloads(run) if p.parent.name == f"round-{round_number:05d}"]
    return decode(payload.read_bytes())
