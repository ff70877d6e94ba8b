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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit import choosing
from sparsekit.errors import ArgumentError
from sparsekit.kernels import dispatch, implementations
from sparsekit.masks import PRUNABLE_TYPES, check_mask, masks_of, prunable_parameters
from sparsekit.nn import ConvBlock, MaskedConv3d, may_fuse
from sparsekit.types import Masks, Shape

if TYPE_CHECKING:
    from sparsekit.kernels.masked_conv3d.cost import Op
    from sparsekit.kernels.masked_conv3d.selector import Decision

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one layer in one step."""

    kind: str
    """Class of the layer."""
    path: str
    """``"sparse"`` if pruned weights cost nothing in a training step, ``"dense"`` if they are
    computed, ``"mixed"`` if they are in a part of it."""
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
    executed_forward: int
    """Operations that a forward pass without gradients really does."""
    executed_train_step: int
    """Operations that a training step really does."""

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
        """Operations that a forward pass without gradients really does.

        Layers on a dense path count as dense.
        """
        return sum(layer.executed_forward for layer in self.by_layer.values())

    @property
    def executed_train_step(self) -> int:
        """Operations that a training step really does, of those that it needs.

        The general CPU kernels find both gradients in one pass, also where one is not needed.
        """
        return sum(layer.executed_train_step for layer in self.by_layer.values())


@dataclass(frozen=True)
class _Call:
    """One use of a layer; each weight is used once per position."""

    input_shape: tuple[int, ...]
    needs_input_grad: bool
    positions: int


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
        `MaskedConv3d` that skip pruned weights on the model's device; where ``backend="auto"``
        chooses by its prediction, what it would choose now, with torch's present thread count.

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
    layers = _prunable(model)
    kept = _kept_weights(model, masks_of(model) if masks is None else masks)
    unknown = sorted(set(dense_layers or ()) - layers.keys())
    if unknown:
        raise ArgumentError(f"dense_layers: the model has no convolution or linear layer {unknown}")
    # Before the hooks that note shapes, which would keep blocks from being fused.
    fused = _fused(model)
    calls = _trace(model, layers, input_shape)
    report = {}
    for name, uses in calls.items():
        layer, weight = layers[name], _weight(layers[name])
        alive, all_weights = kept.get(id(weight), weight.numel()), weight.numel()
        if dense_layers is None:
            density = alive / all_weights if all_weights else 0.0
            paths = [_paths(layer, use, density, id(layer) in fused) for use in uses]
        else:
            paths = [_DENSE if name in dense_layers else _SPARSE] * len(uses)
        report[name] = _layer_flops(layer, uses, paths, alive, all_weights)
    return FlopReport(report)


def work_per_weight(model: nn.Module, input_shape: Shape) -> dict[str, int]:
    """Count the operations that one weight of each layer causes in a training step.

    Parameters
    ----------
    model : Module
        Called once with tensors that have shapes and no values.
    input_shape : sequence of int
        Shape of the one input, batch included.

    Returns
    -------
    dict of int
        By parameter name, as `sparsekit.prune.magnitude_masks` wants it for ``scope="flops"``:
        forward pass and both gradients, over all uses of a weight; in a convolution with groups
        the work that is done, not torch's count. Layers that are never called are absent.

    Examples
    --------
    >>> work_per_weight(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 1, 3)), (1, 1, 7, 7, 7))
    {'0.weight': 500, '1.weight': 162}
    """
    layers = _prunable(model)
    names = {id(parameter): name for name, parameter in prunable_parameters(model).items()}
    work: dict[str, int] = {}
    for name, uses in _trace(model, layers, input_shape).items():
        weight = _weight(layers[name])
        passes = 1 + weight.requires_grad
        each = sum(2 * use.positions * (passes + use.needs_input_grad) for use in uses)
        work[names[id(weight)]] = work.get(names[id(weight)], 0) + each
    return work


def _layer_flops(
    layer: nn.Module, uses: list[_Call], paths: "list[_Paths]", alive: int, all_weights: int
) -> LayerFlops:
    groups = int(getattr(layer, "groups", 1)) if _weight(layer).requires_grad else 0
    forward = sum(use.positions for use in uses)
    input_grad = sum(use.positions for use in uses if use.needs_input_grad)

    def executed(positions: int, dense: bool) -> int:
        return 2 * (all_weights if dense else alive) * positions

    step = 0
    for use, path in zip(uses, paths, strict=True):
        gradients = use.positions * (groups + use.needs_input_grad)
        step += executed(use.positions, path.step_forward) + executed(gradients, path.gradients)
    in_step = {dense for path in paths for dense in (path.step_forward, path.gradients)}
    return LayerFlops(
        kind=type(layer).__name__,
        path="mixed" if len(in_step) == 2 else "dense" if True in in_step else "sparse",
        kept=alive,
        weights=all_weights,
        positions=forward,
        forward=2 * alive * forward,
        weight_grad=2 * alive * forward * groups,
        input_grad=2 * alive * input_grad,
        dense_forward=2 * all_weights * forward,
        dense_weight_grad=2 * all_weights * forward * groups,
        dense_input_grad=2 * all_weights * input_grad,
        executed_forward=sum(
            executed(use.positions, path.forward)
            for use, path in zip(uses, paths, strict=True)
        ),
        executed_train_step=step,
    )  # fmt: skip


@dataclass(frozen=True)
class _Paths:
    """Which parts of a layer's work are done for pruned weights as well."""

    forward: bool
    """A forward pass without gradients."""
    step_forward: bool
    """The forward pass of a training step."""
    gradients: bool


_DENSE, _SPARSE = _Paths(True, True, True), _Paths(False, False, False)


def _paths(layer: nn.Module, use: _Call, density: float, fused: bool) -> _Paths:
    if not isinstance(layer, MaskedConv3d):
        return _DENSE
    device_type = layer.weight.device.type
    row = dispatch.resolve("masked_conv3d", device_type, layer.backend).implementation
    if device_type != "cpu" or row.backend != "cpu":
        return _SPARSE if row.follows_mask else _DENSE
    found = _decide(layer, use, density, fused)
    if found is None:
        return _DENSE
    step, forward = found
    if layer.backend == "cpu":
        return _Paths(forward.grouped, step.grouped, False)
    return _Paths(forward.dense_forward, step.dense_forward, step.dense)


def _decide(
    layer: MaskedConv3d, use: _Call, density: float, fused: bool
) -> "tuple[Decision, Decision] | None":
    """Predictions for a training step and for a forward pass; None if no kernel can run."""
    weight = layer.weight
    if 0 in use.input_shape or choosing.why_only_reference(weight, weight):
        return None
    # The cost model knows the kernels, and those load Numba.
    selector = implementations.selector()
    x = torch.empty(use.input_shape, dtype=weight.dtype, device="meta")
    x.requires_grad_(use.needs_input_grad)
    call = layer.convolution(x if x.ndim == 5 else x.unsqueeze(0))
    op: Op = "conv_norm_pool_relu" if fused and min(call.out) >= 2 else "masked_conv3d"
    with torch.enable_grad():
        needed = selector.gradients_of(x, weight, layer.bias)
    step, forward = (
        selector.decide_for(op, call.shape, call.x.shape[0], density, gradients)
        for gradients in (needed, "none")
    )
    return step, forward


def decisions(model: nn.Module, input_shape: Shape, density: float) -> "dict[str, Decision]":
    """Say what the cost model chooses for a training step on a CPU.

    Parameters
    ----------
    model : Module
        Each `MaskedConv3d` that the CPU kernels can run is in the answer, if it is called.
    input_shape : sequence of int
        Shape of the one input, batch included.
    density : float
        Share of kept weights in every layer.
    """
    layers = _prunable(model)
    fused = _fused(model)
    found = {}
    for name, uses in _trace(model, layers, input_shape).items():
        layer = layers[name]
        if isinstance(layer, MaskedConv3d):
            decided = _decide(layer, uses[0], density, id(layer) in fused)
            if decided is not None:
                found[name] = decided[0]
    return found


def _prunable(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PRUNABLE_TYPES)}


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _fused(model: nn.Module) -> set[int]:
    """Identities of the convolutions that run as one op with what follows them."""
    return {id(m.conv) for m in model.modules() if isinstance(m, ConvBlock) and may_fuse(m.conv)}


def _kept_weights(model: nn.Module, masks: Masks) -> dict[int, int]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ArgumentError(f"masks: the model has no parameter {name!r}")
        check_mask(name, mask, parameters[name])
        kept[id(parameters[name])] = int(mask.count_nonzero())
    return kept


def _trace(
    model: nn.Module, layers: Mapping[str, nn.Module], input_shape: Shape
) -> dict[str, list[_Call]]:
    """Run the model on meta tensors and note the shapes that its layers see."""
    calls: dict[str, list[_Call]] = {}
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
        use = _Call(tuple(x.shape), x.requires_grad, positions)
        calls.setdefault(names[id(module)], []).append(use)

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
