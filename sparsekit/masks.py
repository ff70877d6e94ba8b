"""Masks that hold: a pruned parameter stays exactly 0 through every optimizer step.

The mask of parameter ``weight`` is the buffer ``weight_mask`` of the same module, so it moves, is
copied, pickled and saved with the module. The parameter carries a reference to it, and one hook
on all torch optimizers sets masked entries to 0 after each step.
"""

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.kernels import dispatch
from sparsekit.types import Masks

MASK_SUFFIX = "_mask"
PRUNABLE_TYPES = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip

# On the parameter itself, not in a table by id: it cannot go stale, needs no lock between
# threads, and dies with the parameter.
_ATTRIBUTE = "_sparsekit_mask"

# For fewer entries, torch is faster than a kernel's start, and nothing needs to be compiled.
_LEAST_ENTRIES = 1 << 14

_lock = threading.Lock()


def _after_fork() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
_hook_installed = False
_holds: "weakref.WeakSet[MaskHold]" = weakref.WeakSet()


def _enforce(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del args, kwargs
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mask = parameter.__dict__.get(_ATTRIBUTE)
            if mask is not None:
                _zero(parameter, mask)


@torch.no_grad()
def _zero(parameter: Tensor, mask: Tensor) -> None:
    # A model that moved since its last forward pass still refers to the mask left behind.
    if mask.device != parameter.device:
        mask = mask.to(parameter.device)
        setattr(parameter, _ATTRIBUTE, mask)
    suits_cpu = (
        parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and mask.is_contiguous()
        and parameter.numel() >= _LEAST_ENTRIES
        and dispatch.holds_values(parameter)
    )
    choice = dispatch.resolve(
        "zero_pruned", parameter.device.type, reference_only="" if suits_cpu else "not for these"
    )
    choice.implementation.load()(parameter, mask)


def _hold(parameter: Tensor, mask: Tensor) -> None:
    global _hook_installed
    setattr(parameter, _ATTRIBUTE, mask)
    if not _hook_installed:
        with _lock:
            if not _hook_installed:
                register_optimizer_step_post_hook(_enforce)
                _hook_installed = True


class MaskHold:
    """Forward pre-hook that keeps a module's parameter tied to its mask.

    Deep copies and pickles of the module carry it along; both end in `__init__`, which ties the
    copied parameter to the copied mask. The call catches what replaces tensors in place, such as
    ``load_state_dict(assign=True)`` or ``module.to(...)``.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        mask: Tensor,
        layer: str,
        kind: str,
        dense: bool = True,
    ) -> None:
        self.name = name
        self.parameter = parameter
        self.mask = mask
        self.layer = layer
        self.kind = kind
        self.dense = dense  # whether the layer computes with the zeros
        _hold(parameter, mask)
        with _lock:
            _holds.add(self)

    def __call__(self, module: nn.Module, args: Any = None) -> None:
        """Tie whatever tensors the module has now."""
        del args
        if torch.compiler.is_compiling():
            return
        parameter = module._parameters[self.name]
        mask = module._buffers[self.name + MASK_SUFFIX]
        assert mask is not None
        # A functional call lends the module tensors that are not its parameters.
        if not isinstance(parameter, nn.Parameter):
            return
        if self.parameter is not parameter or self.mask is not mask:
            self.parameter, self.mask = parameter, mask
        if parameter.__dict__.get(_ATTRIBUTE) is not mask:
            _hold(parameter, mask)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskHold, (self.name, self.parameter, self.mask, self.layer, self.kind, self.dense)


def live_holds() -> list[MaskHold]:
    """All masks that are enforced in this process, in no order that means anything."""
    with _lock:
        return list(_holds)


def module_holds(module: nn.Module) -> dict[str, MaskHold]:
    """Masks of the module's own parameters by the parameter's name."""
    hooks = module._forward_pre_hooks.values()
    return {hook.name: hook for hook in hooks if isinstance(hook, MaskHold)}


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: Any) -> None:
    """Take a checkpoint without masks as dense."""
    del unused
    for name, hold in module_holds(module).items():
        if prefix + name in state_dict:
            state_dict.setdefault(prefix + name + MASK_SUFFIX, torch.ones_like(hold.mask))


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    del incompatible_keys
    for hold in module_holds(module).values():
        hold(module)
        _zero(hold.parameter, hold.mask)


def check_mask(name: str, mask: object, parameter: Tensor) -> None:
    """Raise unless `mask` is a bool tensor of the parameter's shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentTypeError(f"mask of {name}: expected a bool Tensor, got {got}")
    if mask.shape != parameter.shape:
        raise ArgumentError(
            f"mask of {name}: expected the parameter's shape {tuple(parameter.shape)}, "
            f"got {tuple(mask.shape)}"
        )


def attach(module: nn.Module, name: str, mask: Tensor, layer: str = "") -> None:
    """Give the module's own parameter `name` a mask and set its pruned entries to 0.

    Parameters
    ----------
    module : Module
        Owner of the parameter.
    name : str
        Without dots, such as ``"weight"``.
    mask : Tensor, shape of the parameter, bool
        Copied; True keeps the entry.
    layer : str
        The module's name for `sparsekit.explain`.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        The module has no such parameter, or the mask does not fit it.
    """
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ArgumentError(
            f"{type(module).__name__} has no parameter {name!r} of its own; masks made by "
            "torch.nn.utils.prune are taken over by sparsekit.prune.adopt_torch_masks"
        )
    check_mask(name, mask, parameter)
    holds = module_holds(module)
    hold = holds.get(name)
    if hold is None:
        buffer = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False)
        buffer.copy_(mask)
        module.register_buffer(name + MASK_SUFFIX, buffer)
        if not holds:
            module.register_load_state_dict_pre_hook(_before_load)
            module.register_load_state_dict_post_hook(_after_load)
        hold = MaskHold(name, parameter, buffer, layer, type(module).__name__)
        module.register_forward_pre_hook(hold)
    else:
        hold(module)
        hold.mask.copy_(mask)
        hold.layer = layer or hold.layer
    _zero(parameter, hold.mask)


def detach(module: nn.Module) -> None:
    """Remove all masks of the module's own parameters; their values stay as they are."""
    for name, hold in module_holds(module).items():
        if hasattr(hold.parameter, _ATTRIBUTE):
            delattr(hold.parameter, _ATTRIBUTE)
        del module._buffers[name + MASK_SUFFIX]
        with _lock:
            _holds.discard(hold)
    for hooks in (
        module._forward_pre_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: object) -> bool:
    # torch wraps hooks that take the module.
    bare = getattr(hook, "hook", hook)
    return isinstance(bare, MaskHold) or bare is _before_load or bare is _after_load


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Masks that the model holds, by parameter name, in the order of its parameters.

    The tensors are the model's own: clone them to keep a mask while the model goes on.
    """
    found = {
        f"{prefix}.{name}" if prefix else name: hold
        for prefix, module in model.named_modules()
        for name, hold in module_holds(module).items()
    }
    return {name: found[name].mask for name, _ in model.named_parameters() if name in found}


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of the model's convolutions and linear layers, by parameter name.

    A weight that several layers share appears once.

    Raises
    ------
    ArgumentError
        A layer's weight is computed from another parameter (torch.nn.utils.prune,
        parametrizations), so that a mask on it could not hold.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, PRUNABLE_TYPES):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise ArgumentError(
                f"model: the weight of {prefix or 'the model'} ({type(module).__name__}) is "
                "computed from other parameters; take masks of torch.nn.utils.prune over with "
                "sparsekit.prune.adopt_torch_masks, remove parametrizations before pruning"
            )
        found[names[id(weight)]] = weight
    return found


def is_nested(inner: Masks, outer: Masks) -> bool:
    """Whether everything that `inner` keeps is kept by `outer`, and both have the same names."""
    return inner.keys() == outer.keys() and all(
        not bool((inner[name] & ~outer[name]).any()) for name in inner
    )


@dataclass(frozen=True)
class SparsityReport:
    """Share of pruned entries; entries without a mask count as kept."""

    prunable: float
    """Over the weights of convolutions and linear layers."""
    overall: float
    """Over all parameters."""
    kept: int
    """Unpruned entries of all parameters."""
    total: int
    """Entries of all parameters."""
    by_parameter: Mapping[str, float]
    """Per masked parameter."""

    def __str__(self) -> str:
        return (
            f"{self.prunable:.4%} of the prunable weights, {self.overall:.4%} of all parameters "
            f"pruned ({self.kept:,} of {self.total:,} kept)"
        )


def sparsity(model: nn.Module, masks: Masks | None = None) -> SparsityReport:
    """Report how much of a model is pruned.

    Parameters
    ----------
    model : Module
        Gives the parameters that are counted.
    masks : mapping of bool Tensor, optional
        By parameter name; the masks that the model holds by default.
    """
    if masks is None:
        masks = masks_of(model)
    parameters = dict(model.named_parameters())
    pruned = {}
    for name, mask in masks.items():
        if name not in parameters:
            raise ArgumentError(f"masks: the model has no parameter {name!r}")
        check_mask(name, mask, parameters[name])
        pruned[name] = mask.numel() - int(mask.count_nonzero())
    prunable = prunable_parameters(model)
    prunable_total = sum(p.numel() for p in prunable.values())
    total = sum(p.numel() for p in parameters.values())
    return SparsityReport(
        prunable=_share(sum(n for name, n in pruned.items() if name in prunable), prunable_total),
        overall=_share(sum(pruned.values()), total),
        kept=total - sum(pruned.values()),
        total=total,
        by_parameter={name: _share(n, masks[name].numel()) for name, n in pruned.items()},
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
