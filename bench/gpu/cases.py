"""What the GPU benchmark computes, and whether our kernels compute the same as torch in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from sparsekit import masked_conv3d, prune, topk_mask
from sparsekit.types import Size3

FORMATS = ("weight", "vector:16", "vector:64", "block:16x16", "block:32x32", "block:64x64")
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
LIMITS = {"ieee": 2e-5, "tf32": 5e-3, "tf32x3": 2e-5, "bf16x3": 2e-4, "fp16": 5e-3, "bf16": 3e-2}
"""Largest error of a result, relative to its largest value."""
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Layer:
    """A 3 x 3 x 3 convolution with padding 1."""

    name: str
    c_in: int
    c_out: int
    grid: Size3


LAYERS = (
    Layer("blocks.1", 32, 64, (45, 54, 45)),
    Layer("blocks.2", 64, 128, (22, 27, 22)),
    Layer("blocks.3", 128, 256, (11, 13, 11)),
    Layer("U-Net level", 64, 64, (64, 64, 64)),
)
"""The wide layers of BrainAgeCNN at width 1, and one where memory decides."""


def modes(device: str) -> tuple[str, ...]:
    """What the kernels can compute with on this machine."""
    amd = device == "cuda" and torch.version.hip is not None
    return ("ieee", "bf16x3", "fp16", "bf16") if amd else tuple(LIMITS)


def dtype_of(mode: str) -> torch.dtype:
    """Type of the tensors of a mode."""
    return _TYPES.get(mode, torch.float32)


def precision_of(mode: str) -> str:
    """Argument `precision` of a mode."""
    return "auto" if mode in _TYPES else mode


def inputs(
    layer: Layer, granularity: str, sparsity: float, samples: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, mask and gradient of the output in float32, drawn on the CPU."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((layer.c_out, layer.c_in, 3, 3, 3), generator=random)
    masks = prune.magnitude_masks({"w": weight}, sparsity, granularity=granularity)
    x = torch.randn((samples, layer.c_in, *layer.grid), generator=random)
    g = torch.randn((samples, layer.c_out, *layer.grid), generator=random)
    return x.to(device), weight.to(device), masks["w"].to(device), g.to(device)


def step(
    x: Tensor, weight: Tensor, mask: Tensor, g: Tensor, precision: str, backend: str = "triton"
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients by our kernels."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = masked_conv3d(x, weight, mask, padding=1, precision=precision, backend=backend)
    dx, dw = torch.autograd.grad(y, (x, weight), g)
    return y.detach(), dx, dw


def dense_step(x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients by torch's dense convolution."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = functional.conv3d(x, weight, padding=1)
    dx, dw = torch.autograd.grad(y, (x, weight), g)
    return y.detach(), dx, dw


def disagreements(device: str, layers: tuple[Layer, ...], backend: str) -> Iterator[str]:
    """Compare every mode and format with torch in float64 on the CPU; yields what differs.

    Masks of `topk_mask` have to be equal bit for bit.
    """
    for layer in layers:
        for granularity in FORMATS:
            x, weight, mask, g = inputs(layer, granularity, 0.9, 1, device)
            for mode in modes(device):
                dtype = dtype_of(mode)
                own = tuple(t.to(dtype) for t in (x, weight, g))
                wide = tuple(t.double().cpu() for t in own)
                kept = torch.where(mask.cpu(), wide[1], 0.0)
                right = list(dense_step(wide[0], kept, wide[2]))
                right[2] = torch.where(mask.cpu(), right[2], 0.0)
                got = step(own[0], own[1], mask, own[2], precision_of(mode), backend)
                for name, a, b in zip(("output", "dx", "dw"), got, right, strict=True):
                    worst = float((a.double().cpu() - b).abs().max() / b.abs().max())
                    # A comparison with NaN is false.
                    if not worst <= LIMITS[mode]:
                        where = f"{layer.name}, {granularity}, {mode}"
                        yield f"{where}: {name} is off by {worst:.2g} of its largest value"
    random = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=random) for n in (1_000_003, 17, 65_536)]
    masks = topk_mask([t.to(device) for t in tensors], 100_000, backend=backend)
    expected = topk_mask(tensors, 100_000, backend="reference")
    if not all(torch.equal(a.cpu(), b) for a, b in zip(masks, expected, strict=True)):
        yield "topk_mask: the mask is another one"


def incumbents(tensors: list[Tensor], keep: int) -> dict[str, Callable[[], object]]:
    """Other ways to the same selection, as functions without arguments."""
    flat = [t.reshape(-1) for t in tensors]

    def by_topk() -> None:
        torch.topk(torch.cat(flat).abs(), keep, sorted=False)

    def by_kthvalue() -> list[Tensor]:
        keys = torch.cat(flat).abs()
        threshold = torch.kthvalue(keys, keys.numel() - keep + 1).values
        return [t.abs() >= threshold for t in tensors]

    modules = [nn.Module() for _ in tensors]
    for module, t in zip(modules, tensors, strict=True):
        module.register_parameter("weight", nn.Parameter(t.clone()))

    def by_prune() -> None:
        pairs = [(module, "weight") for module in modules]
        amount = sum(t.numel() for t in tensors) - keep
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=amount)
        for module in modules:
            torch_prune.remove(module, "weight")

    return {
        "torch.topk": by_topk, "torch.kthvalue": by_kthvalue, "torch.nn.utils.prune": by_prune,
    }  # fmt: skip
