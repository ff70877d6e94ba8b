"""Floating-point operations of a training step, from shapes and masks.

A multiplication and its addition are two operations. A training step is the forward pass, the
gradient of each trainable weight and the gradient of each layer input that needs one. Padding
counts as values, and the weight gradient of a convolution with groups counts as if it had none:
both as `torch.utils.flop_counter.FlopCounterMode` does it, which gives the same numbers for dense
models. Only the layers in `sparsekit.masks.PRUNABLE_TYPES` count; norms, pooling, biases and
functional calls do not.
"""

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.errors import ArgumentError
from sparsekit.kernels import dispatch
from sparsekit.masks import PRUNABLE_TYPES, check_mask, masks_of
from sparsekit.nn import MaskedConv3d
from sparsekit.types import Masks, Shape

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one layer in one step."""

    kind: str
    """Class of the layer."""
    path: str
    """``"sparse"`` if pruned weights cost nothing here, ``"dense"`` if they are computed."""
    kept: int
    """Unpruned weights."""
    weights: int
    """All weights."""
    positions: int
    """Places at which each weight is used in the forward pass, batch included."""
    forward: int
    weight_grad: int
    input_grad: int
    dense_forward: int
    dense_weight_grad: int
    dense_input_grad: int

    @property
    def density(self) -> float:
        """Share of weights that are kept."""
        return self.kept / self.weights if self.weights else 0.0

    @property
    def train_step(self) -> int:
        """Forward pass and both gradients."""
        return self.forward + self.weight_grad + self.input_grad

    @property
    def dense_train_step(self) -> int:
        """The same with every weight kept."""
        return self.dense_forward + self.dense_weight_grad + self.dense_input_grad


@dataclass(frozen=True)
class FlopReport:
    """Operations of a model in one step."""

    by_layer: Mapping[str, LayerFlops]
    """By the layer's name, in the order of the model's modules; layers never called are absent."""

    @property
    def forward(self) -> int:
        """Operations of the forward pass with unpruned weights only."""
        return sum(layer.forward for layer in self.by_layer.values())

    @property
    def train_step(self) -> int:
        """Operations of a training step with unpruned weights only."""
        return sum(layer.train_step for layer in self.by_layer.values())

    @property
    def dense_forward(self) -> int:
        """Operations of the forward pass with all weights."""
        return sum(layer.dense_forward for layer in self.by_layer.values())

    @property
    def dense_train_step(self) -> int:
        """Operations of a training step with all weights."""
        return sum(layer.dense_train_step for layer in self.by_layer.values())

    @property
    def executed_forward(self) -> int:
        """Operations that the forward pass really does: layers on a dense path count as dense."""
        return sum(
            layer.forward if layer.path == "sparse" else layer.dense_forward
            for layer in self.by_layer.values()
        )

    @property
    def executed_train_step(self) -> int:
        """Operations that a training step really does."""
        return sum(
            layer.train_step if layer.path == "sparse" else layer.dense_train_step
            for layer in self.by_layer.values()
        )


@dataclass
class _Calls:
    """What a layer's calls add up to: each weight is used once per position."""

    forward: int = 0
    input_grad: int = 0


def count(
    model: nn.Module,
    input_shape: Shape,
    masks: Masks | None = None,
    *,
    dense_layers: Collection[str] | None = None,
) -> FlopReport:
    """Count the operations of one step from shapes; nothing is computed.

    Parameters
    ----------
    model : Module
        Called once with tensors that have shapes and no values, in the mode that it is in.
    input_shape : sequence of int
        Shape of the one input, batch included.
    masks : mapping of bool Tensor, optional
        By parameter name; the masks that the model holds by default. Weights without a mask count
        as kept.
    dense_layers : collection of str, optional
        Layers whose executed operations count as dense. By default every layer but those
        `MaskedConv3d` whose implementation on the model's device skips pruned weights.

    Returns
    -------
    FlopReport
        Exact integers.

    Raises
    ------
    ArgumentError
        A mask does not fit the model, or a name is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 1, 3))
    >>> report = count(model, (1, 1, 7, 7, 7))
    >>> report.forward, report.train_step
    (16416, 35748)
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PRUNABLE_TYPES)}
    kept = _kept_weights(model, masks_of(model) if masks is None else masks)
    if dense_layers is None:
        dense_layers = {name for name, module in layers.items() if not _skips_pruned(module)}
    unknown = sorted(set(dense_layers) - layers.keys())
    if unknown:
        raise ArgumentError(f"dense_layers: the model has no convolution or linear layer {unknown}")
    calls = _trace(model, layers, input_shape)
    report = {}
    for name, total in calls.items():
        weight = layers[name].weight
        groups = int(getattr(layers[name], "groups", 1))
        grad = total.forward * groups if weight.requires_grad else 0
        alive, all_weights = kept.get(id(weight), weight.numel()), weight.numel()
        report[name] = LayerFlops(
            kind=type(layers[name]).__name__,
            path="dense" if name in dense_layers else "sparse",
            kept=alive,
            weights=all_weights,
            positions=total.forward,
            forward=2 * alive * total.forward,
            weight_grad=2 * alive * grad,
            input_grad=2 * alive * total.input_grad,
            dense_forward=2 * all_weights * total.forward,
            dense_weight_grad=2 * all_weights * grad,
            dense_input_grad=2 * all_weights * total.input_grad,
        )
    return FlopReport(report)


def _kept_weights(model: nn.Module, masks: Masks) -> dict[int, int]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ArgumentError(f"masks: the model has no parameter {name!r}")
        check_mask(name, mask, parameters[name])
        kept[id(parameters[name])] = int(mask.count_nonzero())
    return kept


def _skips_pruned(module: nn.Module) -> bool:
    if not isinstance(module, MaskedConv3d):
        return False
    choice = dispatch.resolve("masked_conv3d", module.weight.device.type, module.backend)
    return choice.implementation.follows_mask


def _trace(
    model: nn.Module, layers: Mapping[str, nn.Module], input_shape: Shape
) -> dict[str, _Calls]:
    """Run the model on meta tensors and note the shapes that its layers see."""
    calls: dict[str, _Calls] = {}
    names = {id(module): name for name, module in layers.items()}
    thread = threading.get_ident()

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        # The same model may be training in another thread meanwhile.
        if not x.is_meta or threading.get_ident() != thread:
            return
        if isinstance(module, _TRANSPOSED):
            positions = x.numel() // module.in_channels
        else:
            positions = out.numel() // _outputs(module)
        total = calls.setdefault(names[id(module)], _Calls())
        total.forward += positions
        total.input_grad += positions if x.requires_grad else 0

    shapes = {name: _without_values(p) for name, p in model.named_parameters()}
    shapes |= {name: _without_values(b) for name, b in model.named_buffers()}
    dtype = next((t.dtype for t in shapes.values() if t.is_floating_point()), torch.float32)
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in layers.values()]
    try:
        with torch.enable_grad():
            functional_call(model, shapes, (torch.empty(*input_shape, dtype=dtype, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[name] for name in layers if name in calls}


def _outputs(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def _without_values(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
