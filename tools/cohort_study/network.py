"""Train one network on all sites' people in one place, and predict the held-out ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sparsekit import sparsify
from sparsekit.fed.seeds import derive_seed
from sparsekit.models import BrainAgeCNN

Progress = Callable[[int, int, float], None]
"""Called with updates done, updates in all, and the mean absolute error of the last ones."""

_AGE_SCALE = 7.4
_WARM_UP = 0.2
_EVALUATION_BATCH = 16
_SHOW_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW on one cycle of the learning rate, mirrored scans.

    Attributes
    ----------
    width : float
        Of `sparsekit.models.BrainAgeCNN`; 0.25 has 73,969 parameters on the 4 mm box.
    updates, batch : int
        Optimizer steps, and scans in each.
    lr, weight_decay : float
        Peak learning rate, and decay of the weights.
    """

    width: float = 0.25
    updates: int = 7500
    batch: int = 4
    lr: float = 1e-3
    weight_decay: float = 1e-3


def train(
    images: npt.NDArray[np.float16],
    ages: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    recipe: Recipe,
    seed: int,
    progress: Progress | None = None,
) -> BrainAgeCNN:
    """Train a new network.

    Parameters
    ----------
    images : ndarray, (n, d, h, w), float16
        Normalised scans of everybody.
    ages : ndarray, (n,), float64
        Years.
    rows : ndarray, (m,), int64
        The people to train on.
    recipe : Recipe
    seed : int
        Of the initial weights, the order and the mirroring.
    progress : callable, optional

    Returns
    -------
    BrainAgeCNN
        The instance norm on its last map is left out: that map has 12 voxels on the 4 mm box.
    """
    _, d, h, w = images.shape
    model = BrainAgeCNN(
        (d, h, w),
        width=recipe.width,
        mean_age=float(ages[rows].mean()),
        last_norm=False,
        age_scale=_AGE_SCALE,
        generator=torch.Generator().manual_seed(derive_seed(seed, "weights")),
    )
    # Nothing is pruned, but a block becomes one pass: a narrow network trains twice as fast.
    sparsify(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.updates, pct_start=_WARM_UP
    )
    random = np.random.default_rng(derive_seed(seed, "order"))
    queue = np.empty(0, np.int64)
    recent: list[float] = []
    for update in range(recipe.updates):
        if len(queue) < recipe.batch:
            queue = np.concatenate([queue, random.permutation(rows)])
        chosen, queue = queue[: recipe.batch], queue[recipe.batch :]
        batch = images[chosen]
        mirrored = random.random(len(chosen)) < 0.5
        batch[mirrored] = batch[mirrored, ::-1]
        x = torch.from_numpy(batch.astype(np.float32)).unsqueeze(1)
        y = torch.from_numpy(ages[chosen].astype(np.float32))
        optimizer.zero_grad(set_to_none=True)
        error = (model(x) - y) / _AGE_SCALE
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
        recent.append(float(error.detach().abs().mean()) * _AGE_SCALE)
        if progress is not None and (update + 1) % _SHOW_EVERY == 0:
            progress(update + 1, recipe.updates, float(np.mean(recent[-500:])))
    return model


def predict(
    model: BrainAgeCNN, images: npt.NDArray[np.float16], rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Predicted ages in years, each the mean over the scan and its mirror image."""
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), _EVALUATION_BATCH):
            batch = torch.from_numpy(
                images[rows[start : start + _EVALUATION_BATCH]].astype(np.float32)
            ).unsqueeze(1)
            both = model(batch).double() + model(batch.flip(2)).double()
            parts.append(both.numpy() / 2)
    return np.concatenate(parts)
