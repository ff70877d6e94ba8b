"""What a convolution costs on the CPU: counts of the work in it, times measured coefficients.

Two models share one form. The kernels' time is a sum over what their loops do (`kernel_work`),
torch's over what its dense convolution does (`dense_work`); each count has a coefficient in seconds
that `tools/fit_selector.py` has fitted and that stands in ``selector.json``. All coefficients are
0 or more, and no count of `kernel_work` grows as weights are pruned: a sparser layer is never
predicted to be slower.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from sparsekit.kernels.masked_conv3d.geometry import (
    BLOCK_GRADIENT_BYTES,
    CHANNELS_AT_ONCE,
    Shape,
    Tiling,
    block_channels,
    geometry,
)
from sparsekit.kernels.vector import LANES, REGISTERS

Op = Literal["masked_conv3d", "conv_norm_pool_relu"]
Gradients = Literal["none", "weight", "input", "both"]
Work = dict[str, float]

COEFFICIENTS = Path(__file__).parent / "selector.json"
# Below this size torch runs its own convolution, not oneDNN's (`use_mkldnn` in Convolution.cpp).
_ONEDNN_SIZE = 20480
# Channels that oneDNN computes at a time, whatever the number of those that there are.
_ONEDNN_CHANNELS = 16
# What is beyond a last cache that we can count on waits for the memory, on all threads together.
_CACHE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """All that the cost of a convolution depends on, the mask aside."""

    op: Op
    shape: Shape
    samples: int
    gradients: Gradients
    """What the backward pass will compute; ``"none"`` if there is none."""
    threads: int
    onednn: bool = True
    """Whether torch may use oneDNN."""

    @property
    def single_channel(self) -> bool:
        """Whether the kernels of a fused block for one input channel run."""
        ones = (1, 1, 1)
        shape = self.shape
        return (
            self.op == "conv_norm_pool_relu"
            and shape.c_in == 1
            and shape.kernel == (3, 3, 3)
            and shape.stride == shape.padding == shape.dilation == ones
            and self.gradients in ("none", "weight")
        )


@cache
def shipped() -> dict[str, Any]:
    """Return what the package's file holds."""
    read: dict[str, Any] = json.loads(COEFFICIENTS.read_text())
    return read


def coefficients() -> dict[str, Work]:
    """Seconds per unit of work, by model."""
    models: dict[str, Work] = shipped()["coefficients"]
    return models


def margin() -> float:
    """How many times faster the kernels must be predicted than the dense convolution."""
    return float(shipped()["margin"])


def kernel_seconds(call: Call, density: float) -> float:
    """Predict the time of the kernels at a density of the mask."""
    return min(
        predict(*kernel_work(call, density, grouped=grouped))
        for grouped in ((False, True) if can_group(call.shape) else (False,))
    )


def can_group(shape: Shape) -> bool:
    """Whether the kernels have a forward pass that computes pruned weights as well."""
    return (
        shape.groups == 1
        and shape.stride == (1, 1, 1)
        and shape.c_out >= CHANNELS_AT_ONCE
        and REGISTERS >= 32
    )


@lru_cache(maxsize=1024)
def grouped_pays(shape: Shape, density: float) -> bool:
    """Whether a forward pass that computes pruned weights, too, is faster than one by lists.

    A list reads a vector for each multiply-add, a group of output channels one for several.
    """
    if not can_group(shape):
        return False
    call = Call("masked_conv3d", shape, 1, "none", 1)
    lists, group = (
        predict(*kernel_work(call, density, grouped=grouped)) for grouped in (False, True)
    )
    return group < lists


def dense_seconds(call: Call, density: float) -> float:
    """Predict the time of torch's dense convolution, with norm and pooling if the op has them.

    A density of 1 saves the selection of the weights.
    """
    masked = density < 1.0
    if call.gradients == "input":
        # What both gradients cost, less the weight's.
        total = 0.0
        parts: tuple[tuple[Gradients, int], ...] = (("both", 1), ("weight", -1), ("none", 1))
        for gradients, sign in parts:
            total += sign * predict(*dense_work(replace(call, gradients=gradients), masked=masked))
    else:
        total = predict(*dense_work(call, masked=masked))
    if call.op == "conv_norm_pool_relu":
        total += predict(*norm_pool_work(call))
    return total


def predict(model: str, work: Work) -> float:
    """Predict the seconds that a model's work takes."""
    return seconds(coefficients().get(model, {}), work)


def seconds(model: Work, work: Work) -> float:
    """Weigh counts of work with the coefficients of a model."""
    return sum(model.get(name, 0.0) * count for name, count in work.items())


def kernel_work(call: Call, density: float, *, grouped: bool = False) -> tuple[str, Work]:
    """Name of the model and counts of what the kernels do.

    With `grouped`, the forward pass computes pruned weights as well.
    """
    if call.single_channel:
        return _single_channel_work(call, density)
    shape, n, threads = call.shape, call.samples, call.threads
    is_block = call.op == "conv_norm_pool_relu"
    layout = geometry(shape, LANES, REGISTERS, BLOCK_GRADIENT_BYTES if is_block else None)
    group_in = shape.c_in // shape.groups
    weights = shape.c_out * group_in * math.prod(shape.kernel)
    entries = density * weights
    out = n * shape.c_out * math.prod(shape.out)
    inputs = n * shape.c_in * math.prod(shape.size)
    padded = n * layout.source.sample
    moved = 4.0 * (inputs + padded + out)
    work = {"call": 1.0, "call_threads": float(threads > 1)}
    if grouped:
        tiling = layout.grouped
        rows = -(-shape.c_out // CHANNELS_AT_ONCE)
        vectors = n * tiling.tiles * tiling.rows * tiling.columns / threads
        work["grouped_products"] = rows * CHANNELS_AT_ONCE * weights / shape.c_out * vectors
        work["grouped_tiles"] = rows * vectors
        work["grouped_weights"] = weights / threads
        work["grouped_bytes_beyond_cache"] = max(0.0, 4.0 * out - _CACHE_BYTES) / threads
    else:
        block = block_channels(layout, density, layout.source, layout.forward)
        lists = shape.c_out * -(-group_in // block)
        work |= _walk("forward", layout.forward, entries, lists, n / threads)
        work["gathered"] = entries / threads
    if call.gradients != "none":
        block = block_channels(layout, density, layout.gradient, layout.backward)
        lists = layout.source.channels * -(-shape.c_out // block)
        work |= _walk("backward", layout.backward, entries, lists, n / threads)
        work["backward_gathered"] = entries / threads
        work["weights"] = float(weights)
        moved += 4.0 * (out + n * shape.c_out * layout.gradient.channel + padded)
        if call.gradients != "weight":
            moved += 4.0 * inputs
    if shape.stride != (1, 1, 1):
        # The copy into classes is not split over threads.
        directions = 2 if call.gradients in ("input", "both") else 1
        work["strided_bytes"] = 4.0 * directions * (inputs + padded)
    if is_block:
        work["normed"] = out / threads
    work["bytes"] = moved / threads
    work["bytes_beyond_cache"] = max(0.0, moved - _CACHE_BYTES)
    kind = "block" if is_block else "conv"
    return f"kernels.{kind}.{_pass(call.gradients)}", work


def _walk(name: str, tiling: Tiling, entries: float, lists: int, samples: float) -> Work:
    """Walk over all tiles with lists of weights; `samples` per thread."""
    tiles = samples * tiling.tiles
    vectors = tiles * tiling.rows * tiling.columns
    return {
        f"{name}_products": entries * vectors,
        f"{name}_entries": entries * tiles,
        f"{name}_list_vectors": lists * vectors,
        f"{name}_lists": lists * tiles,
    }


def _single_channel_work(call: Call, density: float) -> tuple[str, Work]:
    shape, n, threads = call.shape, call.samples, call.threads
    d, h, w = shape.out
    voxels = n * d * h * w
    rows = n * d * h * -(-w // LANES)
    entries = density * shape.c_out * 27
    work = {
        "products": entries * rows / threads,
        "outputs": shape.c_out * rows / threads,
        "inputs": voxels / threads,
        "statistics": entries * n,
        "call": 1.0,
        "call_threads": float(threads > 1),
    }
    return f"kernels.single_channel.{_pass(call.gradients)}", work


def torch_path(shape: Shape, samples: int, threads: int, onednn: bool) -> Literal["own", "onednn"]:
    """Which of its convolutions torch takes for float32: its own or oneDNN's.

    The rule is that of torch's ``ConvParams::use_mkldnn``; a test compares it with torch's answer.
    """
    ones = (1, 1, 1)
    _, k_h, k_w = shape.kernel
    large = (
        shape.groups > 1
        or (k_h > 3 and k_w > 3)
        or samples > 1
        or samples * shape.c_in * shape.size[0] * shape.size[1] > _ONEDNN_SIZE
    )
    suits = (
        shape.stride != ones
        or shape.dilation != ones
        or samples >= 16
        or k_h != 1
        or k_w != 1
        or threads > 1
    )
    return "onednn" if onednn and large and suits else "own"


def dense_work(call: Call, *, masked: bool = True, checked: bool = True) -> tuple[str, Work]:
    """Name of the model and counts of what torch's dense convolution does.

    Parameters
    ----------
    call : Call
    masked : bool
        Whether weights are selected by a mask first.
    checked : bool
        Whether the convolution is called through `sparsekit.ops`, which checks its arguments.
    """
    shape, samples, threads, gradients = call.shape, call.samples, call.threads, call.gradients
    path = torch_path(shape, samples, threads, call.onednn)
    group_in, group_out = shape.c_in // shape.groups, shape.c_out // shape.groups
    taps = math.prod(shape.kernel)
    voxels = samples * math.prod(shape.out)
    weights = shape.c_out * group_in * taps
    inputs, out = samples * shape.c_in * math.prod(shape.size), shape.c_out * voxels
    directions = {"none": 0, "weight": 1, "input": 1, "both": 2}[gradients]
    per_vector = taps * voxels / LANES / threads
    moved = 4.0 * (1 + directions) * (inputs + out)
    work = {
        "weights": float(weights),
        "masked_weights": float(masked * weights),
        "call": 1.0,
        "checked_call": float(checked),
        "call_threads": float(threads > 1),
    }
    products = shape.groups * per_vector
    in_whole, out_whole = _whole_channels(group_in), _whole_channels(group_out)
    passes = ("forward", "weight", "input")[: 1 + directions]
    # Kinds of convolutions differ in speed, not in what a call costs.
    kind = "pointwise_" if taps == 1 else ""
    if path == "own":
        # A matrix product with every input voxel copied once for each tap.
        copies = shape.c_in * taps * voxels
        for name in passes:
            work[f"{kind}{name}_products"] = products * group_in * group_out
            work[f"{kind}{name}_copies"] = copies / threads
        work["copied_beyond_cache"] = len(passes) * max(0.0, 4.0 * copies - _CACHE_BYTES)
        work["groups"] = float(shape.groups * samples)
    elif group_in == 1 and shape.groups > 1:
        kind = "depthwise_"
        for name in passes:
            work[f"{kind}{name}_products"] = products * group_out
    else:
        if taps > 1:
            kind = _onednn_kind(group_in, group_out, shape.groups)
        for name in passes:
            # Which side is filled up depends on the pass and the number of channels.
            filled = group_out * in_whole if name == "input" else group_in * out_whole
            work[f"{kind}{name}_products"] = products * filled
            work[f"{kind}{name}_padded"] = products * in_whole * out_whole
        if kind == "narrow_":
            # It is copied with channels filled up.
            moved = inputs // group_in * in_whole + out // group_out * out_whole
            moved *= 4.0 * (1 + directions)
    work[f"{kind}bytes"] = moved / threads
    work[f"{kind}bytes_beyond_cache"] = max(0.0, moved - _CACHE_BYTES)
    return f"dense.{path}.{_pass(gradients)}", work


def _onednn_kind(group_in: int, group_out: int, groups: int) -> str:
    whole = _ONEDNN_CHANNELS
    for channels in (group_in, group_out):
        # Groups cannot be filled up one by one.
        if channels % whole and (channels > whole or (groups > 1 and whole % channels)):
            return "uneven_"
    return "narrow_" if group_in < whole else ""


def norm_pool_work(call: Call) -> tuple[str, Work]:
    """Name of the model and counts of what instance norm and pooling do behind a convolution."""
    out = call.samples * call.shape.c_out * math.prod(call.shape.out)
    work = {"normed": out / call.threads, "bytes": 4.0 * out, "call": 1.0}
    return f"norm_pool.{_pass(call.gradients)}", work


def _whole_channels(channels: int) -> int:
    return -(-channels // _ONEDNN_CHANNELS) * _ONEDNN_CHANNELS


def _pass(gradients: Gradients) -> str:
    return "forward" if gradients == "none" else "train"
