"""Local work of a site: stochastic gradient descent over its scans, and predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.fed.plan import TrainPlan, box_of
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
    scans: Scans, indices: npt.NDArray[np.int64], plan: TrainPlan, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the plan's part of volumes (m, 1, d, h, w) and ages (m,), both float32."""
    box = box_of(plan)
    volumes = np.stack([scans.volume(int(index))[box] for index in indices])
    x = torch.from_numpy(volumes).unsqueeze(1).to(device)
    return x, torch.from_numpy(scans.ages[indices]).to(device)


def augment(volume: Tensor, mirrored: bool, move: npt.NDArray[np.int64]) -> Tensor:
    """Mirror a volume (1, d, h, w) left-right, move it by whole voxels; what leaves comes back.

    Axis 1 is left-right, because caches are in RAS order. The rim of a skull-stripped scan is
    empty, so that coming back at the other side moves nothing but background.
    """
    if mirrored:
        volume = volume.flip(1)
    if move.any():
        volume = volume.roll([int(step) for step in move], dims=(1, 2, 3))
    return volume


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
    generator = torch.Generator(device).manual_seed(derive_seed(plan.seed, "dropout", site))
    samples = steps = 0
    epoch_samples = 0
    epoch_loss = 0.0
    for _ in range(plan.epochs):
        order = random.permutation(len(data))
        mirrored = random.random(len(data)) < (0.5 if plan.flips else 0.0)
        moves = random.integers(-plan.shift, plan.shift + 1, (len(data), 3))
        epoch_samples, epoch_loss = 0, 0.0
        for start in range(0, len(order), plan.batch):
            if cancelled():
                raise Cancelled
            chosen = slice(start, start + plan.batch)
            x, y = load_batch(data, order[chosen], plan, device)
            x = torch.stack(
                [augment(*one) for one in zip(x, mirrored[chosen], moves[chosen], strict=True)]
            )
            optimizer.zero_grad(set_to_none=True)
            error = (model(x, generator=generator) - y) / plan.age_scale
            loss = error.square().mean()
            loss.backward()
            optimizer.step()
            samples += len(x)
            steps += 1
            epoch_samples += len(x)
            epoch_loss += float(loss.detach()) * plan.age_scale**2 * len(x)
            if steps == plan.max_steps:
                break
        if steps == plan.max_steps:
            break
    last = epoch_loss / epoch_samples if epoch_samples else None
    return TrainOutcome(samples=samples, steps=steps, last_epoch_loss=last)


def predict(
    model: torch.nn.Module,
    data: Scans,
    plan: TrainPlan,
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
            x, _ = load_batch(data, positions, plan, device)
            parts.append(model(x).double().cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)
