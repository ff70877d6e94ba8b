"""What ran where, and why."""

from dataclasses import dataclass

from torch import nn

from sparsekit.kernels import dispatch
from sparsekit.kernels.dispatch import Record
from sparsekit.masks import MaskHold, live_holds, module_holds


@dataclass(frozen=True)
class DenseLayer:
    """A layer that has a mask and is computed densely all the same."""

    layer: str
    kind: str
    parameter: str
    density: float


@dataclass(frozen=True)
class Explanation:
    """Answer of `explain`; print it."""

    calls: tuple[Record, ...]
    """Recent kinds of calls, the latest first."""
    dense_layers: tuple[DenseLayer, ...]
    """Masked layers without an op of their own: 0 is enforced after every optimizer step."""

    def __str__(self) -> str:
        lines = ["recent calls (latest first):" if self.calls else "no calls yet"]
        lines += [
            f"  {r.op} {r.detail} on {r.device}: {r.backend} ({r.reason}), {r.calls} calls"
            for r in self.calls
        ]
        if self.dense_layers:
            lines.append("masked but computed densely (pruned entries are zeroed after each step):")
        lines += [
            f"  {d.layer or '(model)'}.{d.parameter} ({d.kind}), density {d.density:.4f}"
            for d in self.dense_layers
        ]
        return "\n".join(lines)


def explain(model: nn.Module | None = None) -> Explanation:
    """Say which implementation each recent call took and why, and which layers stay dense.

    Parameters
    ----------
    model : Module, optional
        List only this model's dense layers; by default those of every model in the process.

    Returns
    -------
    Explanation
        With ``calls`` and ``dense_layers``; ``print(explain())`` gives a readable listing. At
        most `sparsekit.kernels.dispatch.MAX_RECORDS` kinds of calls are remembered.

    Examples
    --------
    >>> import torch
    >>> from sparsekit import prune
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> prune.apply_masks(model, prune.magnitude_masks(model, 0.5))
    >>> explain(model).dense_layers
    (DenseLayer(layer='0', kind='Linear', parameter='weight', density=0.5),)
    """
    if model is None:
        layers = [_dense_layer(hold, hold.layer) for hold in live_holds() if hold.dense]
        layers.sort(key=lambda d: (d.layer, d.parameter, d.kind, d.density))
    else:
        layers = [
            _dense_layer(hold, name)
            for name, module in model.named_modules()
            for hold in module_holds(module).values()
            if hold.dense
        ]
    return Explanation(dispatch.records(), tuple(layers))


def _dense_layer(hold: MaskHold, layer: str) -> DenseLayer:
    mask = hold.mask
    density = int(mask.count_nonzero()) / mask.numel() if mask.numel() else 0.0
    return DenseLayer(layer=layer, kind=hold.kind, parameter=hold.name, density=density)
