"""Layers that skip pruned weights, and swapping them in and out of a model."""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from sparsekit import masks as _masks
from sparsekit import ops, prune
from sparsekit.arguments import Convolution, check_convolution
from sparsekit.choosing import why_only_reference
from sparsekit.types import Masks

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class MaskedConv3d(nn.Conv3d):
    """`torch.nn.Conv3d` whose pruned weights take part in nothing.

    Takes the arguments of `torch.nn.Conv3d` and starts with nothing pruned. The state dict has
    Conv3d's keys and ``weight_mask``; a checkpoint of a dense Conv3d loads strictly and makes
    the mask all True. Pruned weights are exactly 0 after every step of any torch optimizer.

    Attributes
    ----------
    precision, backend : str
        Passed to `sparsekit.masked_conv3d`.
    """

    weight_mask: Tensor
    precision: str = "auto"
    backend: str = "auto"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._start_masked()

    def _start_masked(self) -> None:
        if "weight" not in _masks.module_holds(self):
            _masks.attach(self, "weight", torch.ones_like(self.weight, dtype=torch.bool))
        hold = _masks.module_holds(self)["weight"]
        hold.kind, hold.dense = type(self).__name__, False

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape; True keeps. Change it with `set_mask` only."""
        return self.weight_mask

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask and set pruned weights to 0.

        Parameters
        ----------
        mask : Tensor, (c_out, c_in / groups, kd, kh, kw), bool
            Copied. It may also bring weights back; they start at 0.
        """
        _masks.attach(self, "weight", mask)

    @property
    def density(self) -> float:
        """Share of weights that are kept."""
        return int(self.weight_mask.count_nonzero()) / self.weight_mask.numel()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (n, c_in, d, h, w) or (c_in, d, h, w) with the unpruned weights."""
        input, padding = self._pad(input)
        return ops.masked_conv3d(
            input, self.weight, self.weight_mask, self.bias,
            stride=self.stride, padding=padding, dilation=self.dilation, groups=self.groups,
            precision=self.precision, backend=self.backend,
        )  # fmt: skip

    def _pad(self, input: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """Return what the op takes as its input and its padding."""
        if self.padding_mode == "zeros":
            return input, self.padding
        pad = self._reversed_padding_repeated_twice
        return functional.pad(input, pad, mode=self.padding_mode), (0, 0, 0)

    def convolution(self, input: Tensor) -> Convolution:
        """Arguments of the op as an implementation gets them; `input` may be on the meta device."""
        x, padding = self._pad(input)
        weight = self.weight.to(x.device)
        return check_convolution(
            x, weight, weight.bool(), None, self.stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """Conv3d's text and the density."""
        text = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{text}, density={self.density:.4f}"


class ConvBlock(nn.Module):
    """A module whose convolution `fused_block` may run, with the norm, pooling and ReLU behind it.

    Attributes
    ----------
    conv : Conv3d
    """

    conv: nn.Conv3d


def may_fuse(conv: nn.Module) -> bool:
    """Whether nobody watches or replaces the own call of a `ConvBlock`'s convolution."""
    return (
        type(conv) is MaskedConv3d
        and conv.padding_mode == "zeros"
        and conv.backend in ("auto", "cpu")
        and not (conv._forward_hooks or conv._backward_hooks or conv._backward_pre_hooks)
        and not _has_any_global_hook()
        and "forward" not in conv.__dict__
        and all(isinstance(hook, _masks.MaskHold) for hook in conv._forward_pre_hooks.values())
    )


def can_fuse(conv: nn.Module, x: Tensor) -> bool:
    """Whether `fused_block` may stand for a convolution, instance norm, max pooling and ReLU."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and may_fuse(conv)
        and not why_only_reference(x, cast(MaskedConv3d, conv).weight)
    )


def fused_block(conv: nn.Module, x: Tensor) -> Tensor:
    """Run a `MaskedConv3d` with the norm, pooling and ReLU behind it as one op."""
    conv = cast(MaskedConv3d, conv)
    for hold in _masks.module_holds(conv).values():
        hold(conv)
    padding = cast("str | tuple[int, int, int]", conv.padding)
    return ops.conv_norm_pool_relu(
        x, conv.weight, conv.weight_mask, conv.bias,
        stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups,
        backend=conv.backend,
    )  # fmt: skip


def sparsify(model: ModuleT, masks: Masks | None = None) -> ModuleT:
    """Make a model's convolutions skip pruned weights, and hold its masks from now on.

    Each `torch.nn.Conv3d` becomes a `MaskedConv3d` in place: the same object with the same
    parameters, buffers and hooks, so optimizers and references stay valid. Other layers (also
    subclasses of Conv3d, which may compute something else) go on as dense layers whose pruned
    parameters are 0 after every optimizer step; `sparsekit.explain` lists them.

    Parameters
    ----------
    model : Module
        Changed in place. Masks of `torch.nn.utils.prune` are taken over first.
    masks : mapping of bool Tensor, optional
        By parameter name. Parameters without one keep the mask that they have, else stay dense.

    Returns
    -------
    Module
        `model` itself.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        A mask does not fit the model; nothing has been changed then.

    Examples
    --------
    >>> from sparsekit.prune import magnitude_masks
    >>> model = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.ReLU())
    >>> model = sparsify(model, magnitude_masks(model, 0.75))
    >>> model[0].density
    0.25
    """
    if masks is not None:
        prune.check_masks(model, masks, adopting=True)
    prune.adopt_torch_masks(model)
    for name, module in model.named_modules():
        # A weight that is computed from other parameters (weight_norm) cannot hold a mask.
        if type(module) is nn.Conv3d and module._parameters.get("weight") is not None:
            _become(module, MaskedConv3d)
            cast(MaskedConv3d, module)._start_masked()
            _masks.module_holds(module)["weight"].layer = name
    if masks is not None:
        prune.apply_masks(model, masks)
    return model


def densify(model: ModuleT) -> ModuleT:
    """Undo `sparsify`: plain layers without masks, with the values that the weights have now.

    Parameters
    ----------
    model : Module
        Changed in place. Zeros stay zeros until an optimizer moves them.

    Returns
    -------
    Module
        `model` itself.
    """
    for module in model.modules():
        _masks.detach(module)
        if type(module) is MaskedConv3d:
            _become(module, nn.Conv3d)
            for name in ("precision", "backend"):
                module.__dict__.pop(name, None)
    return model


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    # The same object, not a new one: references, hooks and optimizers stay valid.
    module.__class__ = kind
