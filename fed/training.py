"""Local work of a site: stochastic gradient descent over its scans, and predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.fed.plan import TrainPlan
from sparsekit.fed.seeds import derive_seed

if TYPE_CHECKING:
    from torch.optim import Optimizer

EVALUATION_BATCH = 8


class Cancelled(Exception):
    """Raised inside local work when the run is being stopped."""


class Scans(Protocol):
    """Prepared scans of people; `sparsekit.fed.prepare` makes them."""

    def __len__(self) -> int:
        """Return the number of scans."""
        ...

    @property
    def ages(self) -> npt.NDArray[np.float32]:
        """Years, (n,)."""
        ...

    @property
    def participants(self) -> tuple[str, ...]:
        """The person of each scan."""
        ...

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        """Return scan ``index``, (d, h, w)."""
        ...


def load_batch(
    scans: Scans, indices: npt.NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return volumes (m, 1, d, h, w) and ages (m,), both float32."""
    volumes = np.stack([scans.volume(int(index)) for index in indices])
    x = torch.from_numpy(volumes).unsqueeze(1).to(device)
    return x, torch.from_numpy(scans.ages[indices]).to(device)


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
    data: Scans,
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
            x, y = load_batch(data, positions, device)
            flip = torch.from_numpy(mirrored[start : start + plan.batch]).to(device)
            if plan.flips:
                # Axis 2 is left-right: the caches are in RAS order.
                x = torch.where(flip.view(-1, 1, 1, 1, 1), x.flip(2), x)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.mean(((model(x) - y) / plan.age_scale) ** 2)
            loss.backward()
            optimizer.step()
            samples += len(positions)
            steps += 1
            loss_sum += float(loss.detach()) * plan.age_scale**2 * len(positions)
    last = loss_sum / len(data) if len(data) and plan.epochs else None
    return TrainOutcome(samples=samples, steps=steps, last_epoch_loss=last)


def predict(
    model: torch.nn.Module,
    data: Scans,
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
            x, _ = load_batch(data, positions, device)
            parts.append(model(x).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)
