"""What an attacker reads off a model about single people: predictions, errors and gradients."""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from sparsekit import nn
from sparsekit.errors import RunError
from sparsekit.fed.algorithm import is_prunable
from sparsekit.fed.membership import Asked
from sparsekit.fed.plan import TrainPlan, build_model
from sparsekit.fed.storage import write_atomically
from sparsekit.fed.training import load_batch
from sparsekit.types import State

PREDICTION = "prediction"
MAGNITUDES = "gradient-magnitudes"
OUTPUT = "output-gradient"
NECK = "neck-gradient"
GROUPS = (PREDICTION, MAGNITUDES, OUTPUT, NECK)

Features = dict[str, npt.NDArray[np.float32]]
"""Arrays by group, one row a person: (n, width), or (n, rounds, width) for several models."""

_SMALLEST = 1e-12
_LAYOUT = 1


def features_of(
    weights: State,
    plan: TrainPlan,
    asked: Asked,
    *,
    device: torch.device,
    step: Callable[[], None] = lambda: None,
) -> Features:
    """Read one model's features of every person.

    Parameters
    ----------
    weights : dict of Tensor
        The model. Pruned weights are 0 in it; their gradients count like all others, because
        whoever holds the model can compute them.
    plan : TrainPlan
        Describes the network and the part of each scan that it sees.
    asked : Asked
    device : torch.device
    step : callable, optional
        Called after each person.

    Returns
    -------
    dict of ndarray, float32
        ``prediction``: predicted and true age, years. ``gradient-magnitudes``: logarithm of the
        Euclidean norm of the squared error's gradient, one number for each tensor of the network.
        ``output-gradient`` and ``neck-gradient``: the gradients themselves of the last and the
        last but one convolution.

    Raises
    ------
    RunError
        The model gives numbers that are not finite.
    """
    model = build_model(plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    # Masks that keep everything: the compiled kernels are faster here, and no gradient is left out.
    whole = {
        name: torch.ones_like(weight, dtype=torch.bool)
        for name, weight in weights.items()
        if is_prunable(name, weight)
    }
    # Evaluation: what an attacker asks does not depend on dropout.
    model = nn.sparsify(model, whole).to(device).eval()
    named = dict(model.named_parameters())
    of_layer = {
        group: [place for place, name in enumerate(named) if name.startswith(layer)]
        for group, layer in ((OUTPUT, "out."), (NECK, "neck."))
    }
    rows: dict[str, list[npt.NDArray[np.float32]]] = {group: [] for group in GROUPS}
    for row in asked.rows:
        x, y = load_batch(asked.scans, np.array([row]), plan, device)
        predicted = model(x)
        gradients = torch.autograd.grad((predicted - y).square().sum(), list(named.values()))
        norms = torch.stack([gradient.norm() for gradient in gradients])
        rows[PREDICTION].append(_array(torch.cat([predicted.detach(), y])))
        rows[MAGNITUDES].append(_array(norms.clamp_min(_SMALLEST).log()))
        for group, places in of_layer.items():
            parts = [gradients[place].reshape(-1) for place in places]
            rows[group].append(_array(torch.cat(parts)))
        step()
    found = {group: np.stack(parts) for group, parts in rows.items()}
    if not all(bool(np.isfinite(part).all()) for part in found.values()):
        raise RunError(
            f"run: the model after round {plan.round} gives numbers that are not finite for people "
            f"of {asked.site}; the training diverged, and there is nothing to audit"
        )
    return found


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().cpu().numpy().astype(np.float32)


def feature_file(folder: Path, model_digest: str, asked: Asked, content: str) -> Path:
    """Return where features are kept: the name changes with the model, the people, the scans."""
    return folder / f"{model_digest}-{asked.digest[:16]}-{content[:16]}-{_LAYOUT}.npz"


def save_features(path: Path, features: Features) -> None:
    """Write features so that a reader finds all of them or none."""
    stream = io.BytesIO()
    # NumPy's stubs take the names for its own options.
    np.savez(stream, **features)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stream.getvalue())


def load_features(path: Path, people: int, groups: Sequence[str] = GROUPS) -> Features | None:
    """Read features of some kinds; None where there are none, or not of this many people."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            found: Features = {group: archive[group] for group in groups}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return found if all(len(part) == people for part in found.values()) else None


def stack_rounds(parts: Sequence[Features], groups: Sequence[str]) -> Features:
    """Put several models' features of the same people together, (n, rounds, width)."""
    return {group: np.stack([part[group] for part in parts], axis=1) for group in groups}
