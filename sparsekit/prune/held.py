"""Making a model hold masks, or tensors obey them."""

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit.errors import ArgumentError
from sparsekit.masks import MASK_SUFFIX, attach, check_mask
from sparsekit.types import Masks, State


def check_masks(model: nn.Module, masks: Masks, *, adopting: bool = False) -> None:
    """Raise unless each mask is a bool tensor of the shape of a parameter of the model.

    With `adopting`, parameters that `torch.nn.utils.prune` holds under another name count too.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None and adopting:
            parameter = parameters.get(f"{name}_orig")
        if parameter is None:
            raise ArgumentError(
                f"masks: the model has no parameter {name!r}; if torch.nn.utils.prune renamed it, "
                "call sparsekit.prune.adopt_torch_masks first"
            )
        check_mask(name, mask, parameter)


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set pruned parameters to 0 and hold them there through every optimizer step.

    Parameters
    ----------
    model : Module
        Changed in place. Layers keep their kind; `sparsekit.sparsify` makes them skip weights.
    masks : mapping of bool Tensor
        By parameter name; copied. Parameters without a mask are left as they are.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A mask does not fit the model; nothing has been changed then.
    """
    check_masks(model, masks)
    # Layers that share a parameter must agree on its mask.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_parameter = {id(parameters[name]): mask for name, mask in masks.items()}
    for layer, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in by_parameter:
                attach(module, name, by_parameter[id(parameter)], layer)


def zero_outside(tensors: State, masks: Masks) -> None:
    """Set pruned entries to 0.0 in place, whatever stands there (also NaN and -0.0).

    Parameters
    ----------
    tensors : mapping of Tensor
        Changed in place.
    masks : mapping of bool Tensor
        Each of the shape of the tensor with its name; tensors without a mask stay as they are.
    """
    for name, mask in masks.items():
        if name not in tensors:
            raise ArgumentError(f"masks: there is no tensor {name!r}")
        check_mask(name, mask, tensors[name])
    with torch.no_grad():
        for name, mask in masks.items():
            tensors[name].masked_fill_(~mask, 0.0)


def adopt_torch_masks(model: nn.Module) -> dict[str, Tensor]:
    """Take masks made by `torch.nn.utils.prune` over as masks of sparsekit.

    Parameters
    ----------
    model : Module
        Changed in place: torch's hooks and ``*_orig`` parameters go, the same parameter objects
        stand under their plain names and are held at 0 where pruned.

    Returns
    -------
    dict of Tensor, bool
        The masks that were found, by parameter name; empty if there are none.
    """
    adopted = {}
    for prefix, module in list(model.named_modules()):
        pruned = [
            name.removesuffix("_orig")
            for name in list(module._parameters)
            if name.endswith("_orig") and name.removesuffix("_orig") + "_mask" in module._buffers
        ]
        for name in pruned:
            mask = module._buffers[name + MASK_SUFFIX]
            assert mask is not None
            mask = mask.bool().clone()
            torch_prune.remove(module, name)
            attach(module, name, mask, prefix)
            adopted[f"{prefix}.{name}" if prefix else name] = mask
    return adopted
