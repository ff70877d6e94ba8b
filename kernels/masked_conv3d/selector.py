"""Which path a convolution takes on the CPU where the caller leaves it open.

The choice is a function of the layer's sizes, the mask's density, the gradients that are wanted and
the number of threads, through coefficients that are part of the package: nothing is timed while a
program runs, so that a run and its repetition take the same paths.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsekit.kernels import calls
from sparsekit.kernels.masked_conv3d import cost
from sparsekit.kernels.masked_conv3d.cost import Call, Gradients, Op
from sparsekit.kernels.masked_conv3d.geometry import BLOCK_GRADIENT_BYTES, Shape, geometry
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache
from sparsekit.kernels.vector import LANES, REGISTERS

_PASSES: dict[Gradients, str] = {
    "none": "forward",
    "weight": "forward and weight gradient",
    "input": "forward and input gradient",
    "both": "forward and both gradients",
}


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and the predictions behind it."""

    dense: bool
    """Whether torch's dense convolution is taken."""
    grouped: bool
    """Whether the kernels, if they are taken, compute pruned weights in the forward pass."""
    kernel_seconds: float
    dense_seconds: float
    reason: str

    @property
    def dense_forward(self) -> bool:
        """Whether the forward pass computes pruned weights."""
        return self.dense or self.grouped


@lru_cache(maxsize=1024)
def decide(call: Call, density: float) -> Decision:
    """Choose between the kernels and torch's dense convolution.

    The kernels have to be predicted faster by the model's own margin of error. What is chosen for
    a density is chosen for every lower one if it is the kernels.
    """
    dense = cost.dense_seconds(call, density)
    at_once = BLOCK_GRADIENT_BYTES if call.op == "conv_norm_pool_relu" else None
    layout = geometry(call.shape, LANES, REGISTERS, at_once)
    if not (call.single_channel or layout.fits_offsets):
        reason = "a scan is too large for the offsets of the CPU kernels"
        return Decision(True, False, math.inf, dense, reason)
    kernels = cost.kernel_seconds(call, density)
    takes_dense = kernels * cost.margin() > dense
    grouped = not call.single_channel and cost.grouped_pays(call.shape, density)
    reason = (
        f"{_PASSES[call.gradients]} predicted at density {density:.3g}: "
        f"kernels {_text(kernels)}, dense {_text(dense)}"
    )
    return Decision(takes_dense, grouped, kernels, dense, reason)


def decide_for(
    op: Op, shape: Shape, samples: int, density: float, gradients: Gradients
) -> Decision:
    """Choose with torch's present settings; sizes as `sparsekit.ops` checked them."""
    onednn = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return _decide_sizes(op, shape, samples, gradients, torch.get_num_threads(), onednn, density)


@lru_cache(maxsize=4096)
def _decide_sizes(
    op: Op, shape: Shape, samples: int, gradients: Gradients, threads: int, onednn: bool,
    density: float,
) -> Decision:  # fmt: skip
    return decide(Call(op, shape, samples, gradients, threads, onednn), density)


_CACHED = decide, _decide_sizes, cost.grouped_pays, cost.shipped


def forget() -> None:
    """Decide anew, after the coefficients have changed."""
    for cached in _CACHED:
        cached.cache_clear()
    calls.forget()


def density_of(mask: Tensor) -> float:
    """Share of kept weights; counted again only when the mask has changed.

    The plan that the same call asks for next is not compared with the mask again.
    """
    return PlanCache.compare(mask).density


def take_no_plan() -> None:
    """Say that no plan will be asked for after `density_of`."""
    PlanCache.forget()


def gradients_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    """Which gradients a backward pass through a convolution of these would compute."""
    if not torch.is_grad_enabled():
        return "none"
    own = weight.requires_grad or (bias is not None and bias.requires_grad)
    if x.requires_grad:
        return "both" if own else "input"
    return "weight" if own else "none"


def _text(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
