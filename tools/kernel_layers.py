"""What masks of each format leave for a GPU to do in BrainAgeCNN: counts, and a model.

Executed work is counted from the lists that the kernels would take, and so exact. Times are those
of `sparsekit.kernels.masked_conv3d.gpu_cost`: a model, none of it measured.
"""

import math
from dataclasses import dataclass

import torch

from sparsekit import prune
from sparsekit.kernels.masked_conv3d import gpu_cost, gpu_plan, gpu_work
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.tiles import Architecture, Kind
from sparsekit.models import BrainAgeCNN

FORMATS = ("weight", "vector:16", "block:16x16", "block:32x32")
SPARSITIES = (0.8, 0.9, 0.95)
SAMPLES = 8
_ONES, _PAD = (1, 1, 1), (1, 1, 1)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer under one mask."""

    layer: str
    granularity: str
    sparsity: float
    density: float
    executed: tuple[float, float, float]
    """Work of forward, input gradient and weight gradient, as shares of the dense layer's."""
    filling: float
    """Share of the executed work that only fills up lists."""
    speedup: float
    """Modelled: the dense step's time over the kernels'."""
    taken: bool
    """Whether `auto` takes the kernels."""


def layers(architecture: Architecture = "sm_90") -> list[Layer]:
    """Every wide layer of the network of width 1 at 91 x 109 x 91, in bfloat16."""
    torch.manual_seed(0)
    model = BrainAgeCNN()
    kind = Kind(architecture, torch.bfloat16, "ieee")
    weights = {
        name: p.detach()
        for name, p in model.named_parameters()
        if name.startswith("blocks.") and p.ndim == 5 and p.shape[1] > 1
    }
    found = []
    for granularity in FORMATS:
        for sparsity in SPARSITIES:
            masks = prune.magnitude_masks(weights, sparsity, scope="layer", granularity=granularity)
            for index in range(1, 5):
                name = f"blocks.{index}.conv.weight"
                size = tuple(n >> index for n in model.in_shape)
                found.append(_layer(name, granularity, sparsity, masks[name], size, kind))
    return found


def _layer(
    name: str, granularity: str, sparsity: float, mask: torch.Tensor, size: tuple[int, ...],
    kind: Kind,
) -> Layer:  # fmt: skip
    c_out, c_in = mask.shape[:2]
    grid = (size[0], size[1], size[2])
    shape = Shape(c_in, c_out, grid, (3, 3, 3), _ONES, _PAD, _ONES, 1)
    choice = gpu_cost.decide(shape, SAMPLES, kind, gpu_cost.count_columns(mask, 1), train=True)
    settings = choice.settings
    plan = gpu_plan.make(mask, shape, settings)
    dense = 2 * SAMPLES * math.prod(grid) * mask.numel()
    (backward,) = plan.backward
    works = (
        gpu_work.product(plan.forward, settings.forward, SAMPLES, c_out, kind.dtype, bias=True),
        gpu_work.product(backward, settings.input_gradient, SAMPLES, c_in, kind.dtype, bias=False),
        gpu_work.weight_gradient(plan, SAMPLES, kind.dtype),
    )
    total = sum(work.products for work in works)
    ratio = choice.dense_seconds / choice.kernel_seconds
    return Layer(
        name.removesuffix(".weight"),
        granularity,
        sparsity,
        float(mask.float().mean()),
        (works[0].products / dense, works[1].products / dense, works[2].products / dense),
        sum(work.filling for work in works) / total if total else 0.0,
        ratio,
        not choice.dense,
    )
