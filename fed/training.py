"""Local work of a site: stochastic gradient descent over its scans, and predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.fed.plan import TrainPlan
from sparsekit.fed.seeds import derive_seed

if TYPE_CHECKING:
    from torch.optim import Optimizer

EVALUATION_BATCH = 8


class Cancelled(Exception):  # noqa: N818 - a request, not an error
    """Raised inside local work when the run is being stopped."""


class Volumes(Protocol):
    """Volumes by number: an array (n, d, h, w), or a list of arrays (d, h, w)."""

    def __getitem__(self, row: Any, /) -> Any:
        """Return volume ``row``."""
        ...


@dataclass(frozen=True)
class SiteView:
    """Some of a site's scans: rows ``index`` of its cache.

    Attributes
    ----------
    images : Volumes, n of (d, h, w), float16 or float32
        Normalised; usually memory-mapped.
    ages : ndarray, (n,), float32
        In years.
    index : ndarray, (m,), int64
        The rows that belong to this view.
    """

    images: Volumes
    ages: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    def batch(self, positions: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return volumes (m, 1, d, h, w) and ages (m,), both float32, for positions in the view."""
        rows = self.index[positions]
        volumes = np.stack([np.asarray(self.images[row], dtype=np.float32) for row in rows])
        x = torch.from_numpy(volumes).unsqueeze(1).to(device)
        y = torch.from_numpy(np.asarray(self.ages[rows], dtype=np.float32)).to(device)
        return x, y


@dataclass(frozen=True)
class TrainOutcome:
    """Counts of one round's local training and its mean loss over the last epoch (years²)."""

    samples: int
    steps: int
    last_epoch_loss: float | None


def make_optimizer(model: torch.nn.Module, plan: TrainPlan) -> "Optimizer":
    """Return a new optimizer; weight decay falls on weights only, never on biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum)
    return torch.optim.AdamW(groups, lr=plan.lr)


def train_locally(
    model: torch.nn.Module,
    data: SiteView,
    plan: TrainPlan,
    *,
    site: str,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
) -> TrainOutcome:
    """Train ``model`` in place for ``plan.epochs`` passes over ``data``.

    The order of the scans and their mirroring depend on the plan's seed and the site's name only.

    Raises
    ------
    Cancelled
        Between two steps, once ``cancelled()`` is true.
    """
    model.train()
    optimizer = make_optimizer(model, plan)
    random = np.random.default_rng(derive_seed(plan.seed, "train", site))
    samples = steps = 0
    loss_sum = 0.0
    for _ in range(plan.epochs):
        loss_sum = 0.0
        order = random.permutation(len(data))
        mirrored = random.random(len(data)) < (0.5 if plan.flips else 0.0)
        for start in range(0, len(order), plan.batch):
            if cancelled():
                raise Cancelled
            positions = order[start : start + plan.batch]
            x, y = data.batch(positions, device)
            flip = torch.from_numpy(mirrored[start : start + plan.batch]).to(device)
            if plan.flips:
                # Axis 2 is left-right: the caches are in RAS order.
                x = torch.where(flip.view(-1, 1, 1, 1, 1), x.flip(2), x)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.mean(((model(x) - y) / plan.age_scale) ** 2)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            samples += len(positions)
            steps += 1
            loss_sum += float(loss.detach()) * plan.age_scale**2 * len(positions)
    last = loss_sum / len(data) if len(data) and plan.epochs else None
    return TrainOutcome(samples=samples, steps=steps, last_epoch_loss=last)


def predict(
    model: torch.nn.Module,
    data: SiteView,
    *,
    device: torch.device,
    cancelled: Callable[[], bool] = lambda: False,
) -> npt.NDArray[np.float64]:
    """Return the predicted age in years of every scan of ``data``, in its order."""
    model.eval()
    parts: list[npt.NDArray[np.float64]] = []
    with torch.no_grad():
        for start in range(0, len(data), EVALUATION_BATCH):
            if cancelled():
                raise Cancelled
            positions = np.arange(start, min(start + EVALUATION_BATCH, len(data)))
            x, _ = data.batch(positions, device)
            parts.append(model(x).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)
