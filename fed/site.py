"""A site: answers each message from its own scans.

From round to round it keeps the model it received last, and only to understand messages that say
what has changed since: no answer depends on it.
"""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit import flops, nn
from sparsekit.codec import decode, decode_masks
from sparsekit.codec.wire import Buffer
from sparsekit.fed import messages
from sparsekit.fed.algorithm import encode_model, local_masks, maskable_names
from sparsekit.fed.plan import TASK_TRAIN, Hello, Report, TrainPlan, build_model, from_control
from sparsekit.fed.plan import to_control as as_control
from sparsekit.fed.regrow import dense_gradients, gradient_flops, propose
from sparsekit.fed.storage import write_atomically
from sparsekit.fed.training import Scans, predict, train_locally
from sparsekit.kernels import tuning


@dataclass(frozen=True)
class SitePeople:
    """A site's scans, split into training and held-out people.

    Attributes
    ----------
    name : str
        The site's name, unique in the federation.
    train, test : Scans
        No person is in both.
    test_sites : tuple of str
        Site of each held-out scan; it differs from ``name`` only where all sites are pooled.
    preprocessing_id : str
        Names the grid and normalisation of the scans; all sites must agree.
    content : str
        Hash over who is in which part, with which scan and age.
    """

    name: str
    train: Scans
    test: Scans
    test_sites: tuple[str, ...]
    preprocessing_id: str
    content: str


class Site:
    """The site's side of the federation.

    Parameters
    ----------
    data : SitePeople
        Its scans.
    folder : Path
        Where the site keeps its own results; the held-out people's predictions never leave it.
    device : str
        ``"cpu"`` or ``"cuda"``.
    """

    def __init__(self, data: SitePeople, *, folder: Path, device: str = "cpu") -> None:
        self.data = data
        self.folder = folder
        self.device = torch.device(device)
        self.held: dict[str, Tensor] | None = None
        """The model received last."""

    def hello(self) -> bytes:
        """Return the message that introduces the site."""
        hello = Hello(
            site=self.data.name,
            n_train=len(self.data.train),
            n_test=len(self.data.test),
            age_sum=float(self.data.train.ages.astype(np.float64).sum()),
            preprocessing_id=self.data.preprocessing_id,
            content=self.data.content,
        )
        return messages.pack(as_control(hello))

    # Tiles that a site timed would be its own: all sites are to compute alike.
    @tuning.forbidden("never within a federation")
    def handle(self, request: Buffer, cancelled: Callable[[], bool] = lambda: False) -> bytes:
        """Evaluate the received model on held-out people and, if asked to, train and send it back.

        Raises
        ------
        BaseMismatchError
            If the request leans on a model that this site does not hold.
        CodecError
            If the request is damaged.
        """
        message = messages.unpack(request)
        plan = from_control(TrainPlan, message.control)
        model = build_model(plan)
        template = {name: p.detach() for name, p in model.named_parameters()}
        weights = decode(message.payload, base=self.held, template=template)
        masks: dict[str, Tensor] | None = None
        if plan.masked:
            kept = decode_masks(message.payload, base=self.held)
            masks = {name: kept[name] for name in maskable_names(weights, paper=plan.paper)}
        self.held = weights
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        trained = nn.sparsify(model, masks) if masks is not None else model
        trained.to(self.device)

        truth, predicted = np.zeros(0), np.zeros(0)
        if plan.evaluate:
            held_out = self.data.test
            truth = held_out.ages.astype(np.float64)
            predicted = predict(trained, held_out, plan, device=self.device, cancelled=cancelled)
            self._store_predictions(plan.round - 1, predicted, truth)
        report: dict[str, Any] = {
            "round": plan.round,
            "site": self.data.name,
            "n_train": len(self.data.train),
            "samples": 0,
            "steps": 0,
            "train_loss": None,
            "test_n": len(truth),
            "test_abs_error_sum": _finite(float(np.abs(predicted - truth).sum())),
            "flops_counted": 0,
            "flops_executed": 0,
        }
        payload = b""
        if plan.task == TASK_TRAIN:
            outcome = train_locally(
                trained,
                self.data.train,
                plan,
                site=self.data.name,
                device=self.device,
                cancelled=cancelled,
            )
            work = flops.count(trained, (1, 1, *plan.in_shape))
            report |= {
                "samples": outcome.samples,
                "steps": outcome.steps,
                "train_loss": _finite(outcome.last_epoch_loss),
                "flops_counted": work.train_step * outcome.samples,
                "flops_executed": work.executed_train_step * outcome.samples,
            }
            gradients: dict[str, Tensor] | None = None
            if plan.regrow is not None:
                gradients, scans = dense_gradients(
                    trained,
                    self.data.train,
                    plan,
                    site=self.data.name,
                    device=self.device,
                    cancelled=cancelled,
                )
                counted, executed = gradient_flops(trained, plan)
                report["flops_counted"] += counted * scans
                report["flops_executed"] += executed * scans
            # As large as the model, and the codec needs room.
            trained.zero_grad(set_to_none=True)
            payload = self._update(trained, plan, weights, masks, gradients)
        return messages.pack(as_control(from_control(Report, report)), payload)

    def _update(
        self,
        model: torch.nn.Module,
        plan: TrainPlan,
        received: dict[str, Tensor],
        masks: dict[str, Tensor] | None,
        gradients: dict[str, Tensor] | None,
    ) -> bytes:
        updated = {name: p.detach().cpu() for name, p in model.named_parameters()}
        finite = all(bool(torch.isfinite(value).all()) for value in updated.values())
        # A diverged model is sent as it is: the server names the outcome.
        if plan.local_sparsity is not None and finite:
            masks = local_masks(updated, plan, masks)
            updated = {
                name: torch.where(masks[name], value, 0.0) if name in masks else value
                for name, value in updated.items()
            }
        if gradients is not None and masks is not None and finite:
            assert plan.regrow is not None
            updated, masks = propose(updated, received, masks, gradients, plan.regrow)
        # The received model is a base that both ends hold.
        return encode_model(updated, plan, masks=masks, base=received)

    def _store_predictions(
        self,
        model_round: int,
        predicted: npt.NDArray[np.float64],
        truth: npt.NDArray[np.float64],
    ) -> None:
        """Write the held-out people's predictions of the model after ``model_round`` rounds."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["participant", "site", "age", "predicted", "round"])
        people = zip(
            self.data.test.participants, self.data.test_sites, truth, predicted, strict=True
        )
        for person, site, age, guess in people:
            writer.writerow([person, site, f"{age:.4f}", f"{guess:.6f}", model_round])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "predictions.csv", stream.getvalue().encode())


def _finite(value: float | None) -> float | None:
    """Return None for what JSON cannot say: a diverged loss or error."""
    return value if value is not None and math.isfinite(value) else None
