"""The whole training step of the network, in its stock form, as we run it, and dense otherwise."""

import shutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.bench.agreement import check_close, check_near, check_zero_outside
from sparsekit.bench.network import (
    LAYERS,
    convolutions,
    masked_network,
    random_masks,
    scan,
    stock_network,
)
from sparsekit.bench.pairs import OURS, STOCK, Case
from sparsekit.nn import MaskedConv3d

STEP = "training step"
LEFT_DENSE = "training step, conv1 left dense"
CHANNELS_LAST = "channels_last_3d"
BFLOAT16 = "bf16 autocast"
COMPILED = "torch.compile"
# The prediction, over its value; gradients by the length of the difference. Where two voxels of a
# pooling window are equal but for rounding, the sides send a gradient to different ones, and all
# layers below get other numbers: docs/results/cpu.md says how much.
PREDICTION_LIMIT = 1e-3
GRADIENT_LIMIT = 0.1
# Small, so that the weights stay what they are over the rounds.
_LEARNING_RATE = 1e-9
AGE = 60.0

Step = Callable[[], Tensor]


def training_step(
    model: nn.Module, x: Tensor, *, autocast: bool = False, lr: float = _LEARNING_RATE
) -> Step:
    """Return a step: zero_grad, forward, loss, backward, SGD; it returns the prediction.

    Where the model holds masks, they are enforced by the optimizer's step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    age = torch.tensor([AGE])

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            prediction: Tensor = model(x)
            loss = nn.functional.mse_loss(prediction.float(), age)
        loss.backward()
        optimizer.step()
        return prediction.detach()

    return step


def step_case(sparsity: float, *, first_dense: bool = False) -> Case:
    """Uniform random masks of all convolutions, or of all but the first.

    One network of ours at a time: two in turns would take each other's buffers away.
    """
    x = scan()
    ours = masked_network(random_masks(sparsity, dense=("conv1",) if first_dense else ()))
    notes = {"agreement": check_step(ours, x)}
    sides = {STOCK: training_step(stock_network(ours), x), OURS: training_step(ours, x)}
    what = LEFT_DENSE if first_dense else STEP
    labels = {"what": what, "sparsity": sparsity, "masks": "uniform random"}
    return Case(labels, sides, notes)


def trained_case(masks: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Case:
    """Masks of a trained network, by the names of `LAYERS`."""
    x = scan()
    ours = masked_network(masks)
    kept = {name: float(mask.double().mean()) for name, mask in masks.items()}
    total = sum(mask.numel() for mask in masks.values())
    sparsity = 1 - sum(int(mask.sum()) for mask in masks.values()) / total
    sides = {STOCK: training_step(stock_network(ours), x), OURS: training_step(ours, x)}
    labels = {"what": STEP, "sparsity": sparsity, "masks": "trained, global threshold"}
    every = {**notes, "density_by_layer": kept, "agreement": check_step(ours, x)}
    return Case(labels, sides, every)


def check_step(ours: nn.Module, x: Tensor) -> dict[str, float]:
    """Compare one step with torch's network of the same weights; return the differences.

    Raises
    ------
    DisagreementError
        They differ by more than the limits of this module, or a pruned weight has a gradient.
    """
    stock = stock_network(ours)  # type: ignore[arg-type]
    got, want = (training_step(model, x, lr=0.0)() for model in (ours, stock))
    found = {"prediction": check_close("prediction", got, want, PREDICTION_LIMIT)}
    own = convolutions(ours)  # type: ignore[arg-type]
    for name, layer in stock.convolutions().items():
        gradient, expected = own[name].weight.grad, layer.weight.grad
        assert gradient is not None
        assert expected is not None
        if isinstance(own[name], MaskedConv3d):
            mask = own[name].weight_mask
            assert isinstance(mask, Tensor)
            expected = torch.where(mask, expected, 0.0)
            check_zero_outside(name, gradient, mask)
        found[name] = check_near(
            f"{name}: gradient of the weight", gradient, expected, GRADIENT_LIMIT
        )
    return found


def alternatives_case(sparsity: float) -> Case:
    """What dense training offers otherwise, beside stock and ours; none looks at masks."""
    x = scan()
    ours = masked_network(random_masks(sparsity))
    last = stock_network(ours).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    sides: dict[str, Step] = {
        STOCK: training_step(stock_network(ours), x),
        CHANNELS_LAST: training_step(last, x.contiguous(memory_format=torch.channels_last_3d)),
        BFLOAT16: training_step(stock_network(ours), x, autocast=True),
    }
    notes: dict[str, Any] = {}
    compiled, why_not = _compiled_step(stock_network(ours), x)
    if compiled is not None:
        sides[COMPILED] = compiled
    else:
        notes[COMPILED] = why_not
    sides[OURS] = training_step(ours, x)
    labels = {"what": "training step, dense alternatives", "sparsity": sparsity}
    return Case(labels, sides, notes)


def _compiled_step(model: nn.Module, x: Tensor) -> tuple[Step | None, str]:
    """Return the step of the compiled model, or why there is none."""
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return None, "not available here: no C++ compiler"

    try:
        # What inductor warns of when it is imported and run is not for this table.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = training_step(torch.compile(model), x)  # type: ignore[arg-type]
            for _ in range(3):
                step()
    except Exception as error:
        # Whatever a compiler that does not fit this machine raises.
        return None, f"not available here: {type(error).__name__}"
    return step, ""


def unpruned_products(masks: Mapping[str, Tensor]) -> int:
    """Multiply-adds of a forward pass with these masks."""
    return sum(int(mask.sum()) * LAYERS[name].voxels for name, mask in masks.items())
