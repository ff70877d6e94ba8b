"""Fit the model by which ``backend="auto"`` chooses on a CPU, and write down how well it fits.

    python tools/fit_selector.py                measure, then fit (about 8 minutes on an idle machine)
    python tools/fit_selector.py --fit-only     fit what docs/results/selector.json has measured

writes docs/results/selector.json with every measurement and the errors, and the coefficients that
the package ships. Both sides of each comparison are interleaved in one process; a time is the
median of its rounds. Layers that are marked as held out take no part in the fit; all errors are
theirs.
"""

import argparse
import dataclasses
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numba
import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional

from sparsekit import ops
from sparsekit.kernels.masked_conv3d import cost
from sparsekit.kernels.masked_conv3d.cost import Call, Gradients, Work
from sparsekit.kernels.masked_conv3d.geometry import Shape

RESULTS = Path(__file__).resolve().parent.parent / "docs/results/selector.json"
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.15, 0.05, 0.01)
# Masks at least this dense are also measured with grouped channels.
GROUPED_FROM = 0.3
ROUNDS = 5
ROUNDS_SLOW, SLOW_SECONDS = 3, 0.02
LEAST_SECONDS = 2e-4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution to measure."""

    samples: int
    c_in: int
    c_out: int
    size: tuple[int, int, int]
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    op: cost.Op = "masked_conv3d"
    held_out: bool = False
    weight_alone: bool = False
    """Also measure the step of a layer whose input needs no gradient."""

    @property
    def shape(self) -> Shape:
        """Sizes, padded to keep the map at stride 1."""
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return Shape(
            self.c_in, self.c_out, self.size, (k, k, k), (s, s, s), (p, p, p), (1, 1, 1),
            self.groups,
        )  # fmt: skip


def _blocks(*rows: tuple[Any, ...]) -> list[Layer]:
    return [Layer(*row[:4], op="conv_norm_pool_relu", held_out=len(row) > 4) for row in rows]


HELD = {"held_out": True}
LAYERS = [
    # The default network, at full and at half resolution.
    Layer(1, 32, 64, (45, 54, 45)),
    Layer(1, 64, 128, (22, 27, 22)),
    Layer(1, 128, 256, (11, 13, 11)),
    Layer(1, 256, 256, (5, 6, 5)),
    Layer(2, 64, 128, (22, 27, 22), **HELD),
    Layer(2, 128, 256, (11, 13, 11)),
    Layer(4, 256, 256, (5, 6, 5)),
    Layer(1, 32, 64, (23, 27, 23)),
    Layer(2, 32, 64, (23, 27, 23), **HELD),
    Layer(1, 64, 128, (11, 13, 11), **HELD),
    Layer(4, 64, 128, (11, 13, 11)),
    Layer(1, 128, 256, (5, 6, 5), weight_alone=True),
    # Narrow ones: the demo's.
    Layer(4, 1, 8, (46, 55, 46)),
    Layer(1, 1, 8, (46, 55, 46)),
    Layer(2, 1, 8, (46, 55, 46), **HELD),
    Layer(4, 8, 16, (23, 27, 23)),
    Layer(1, 8, 16, (23, 27, 23), weight_alone=True),
    Layer(8, 8, 16, (23, 27, 23), **HELD),
    Layer(4, 16, 32, (11, 13, 11), weight_alone=True),
    Layer(1, 16, 32, (11, 13, 11)),
    Layer(2, 16, 32, (11, 13, 11), **HELD),
    Layer(4, 32, 64, (5, 6, 5)),
    Layer(1, 32, 64, (5, 6, 5)),
    Layer(1, 1, 32, (60, 60, 60)),
    Layer(1, 3, 32, (40, 40, 40), weight_alone=True),
    Layer(2, 4, 24, (32, 32, 32), weight_alone=True),
    Layer(1, 8, 8, (48, 48, 48)),
    Layer(1, 16, 16, (48, 48, 48)),
    Layer(1, 12, 20, (40, 40, 40), **HELD),
    Layer(1, 24, 24, (32, 32, 32), weight_alone=True),
    Layer(1, 48, 48, (32, 32, 32)),
    Layer(2, 40, 36, (20, 20, 20), **HELD),
    Layer(1, 7, 13, (23, 29, 31), **HELD),
    Layer(1, 96, 96, (16, 16, 16)),
    Layer(1, 320, 320, (8, 8, 8), **HELD),
    # Maps on which the constant part of a call decides.
    Layer(1, 1, 1, (3, 3, 3)),
    Layer(1, 4, 8, (4, 4, 4)),
    Layer(8, 16, 16, (3, 3, 3)),
    Layer(2, 8, 16, (6, 6, 6), **HELD, weight_alone=True),
    # 1 x 1 x 1.
    Layer(1, 256, 64, (2, 3, 2), kernel=1),
    Layer(4, 64, 16, (2, 3, 2), kernel=1),
    Layer(1, 64, 1, (1, 1, 1), kernel=1),
    Layer(4, 16, 1, (1, 1, 1), kernel=1, weight_alone=True),
    Layer(1, 256, 64, (11, 13, 11), kernel=1, weight_alone=True),
    Layer(1, 64, 256, (22, 27, 22), kernel=1),
    Layer(2, 32, 64, (32, 32, 32), kernel=1),
    Layer(1, 128, 128, (16, 16, 16), kernel=1, **HELD),
    Layer(8, 16, 8, (2, 3, 2), kernel=1, **HELD),
    # Strides, larger kernels, groups.
    Layer(1, 32, 64, (45, 54, 45), stride=2),
    Layer(1, 64, 128, (22, 27, 22), stride=2),
    Layer(4, 16, 32, (16, 16, 16), stride=2, weight_alone=True),
    Layer(2, 32, 32, (24, 24, 24), stride=2, **HELD),
    Layer(1, 8, 8, (32, 32, 32), kernel=5, weight_alone=True),
    Layer(1, 16, 32, (20, 20, 20), kernel=5),
    Layer(1, 24, 16, (24, 24, 24), kernel=5, **HELD),
    Layer(1, 64, 128, (22, 27, 22), groups=2),
    Layer(1, 64, 64, (22, 27, 22), groups=8, weight_alone=True),
    Layer(1, 64, 64, (22, 27, 22), groups=16),
    Layer(2, 48, 48, (16, 16, 16), groups=4, **HELD),
    Layer(1, 64, 64, (22, 27, 22), groups=64),
    Layer(1, 32, 32, (32, 32, 32), groups=32),
    Layer(4, 96, 96, (8, 8, 8), groups=96, weight_alone=True),
    Layer(2, 48, 48, (16, 16, 16), groups=48, **HELD),
    *_blocks(
        (1, 32, 64, (45, 54, 45)),
        (1, 64, 128, (22, 27, 22)),
        (1, 128, 256, (11, 13, 11)),
        (1, 256, 256, (5, 6, 5)),
        (4, 8, 16, (23, 27, 23)),
        (1, 8, 16, (23, 27, 23)),
        (4, 16, 32, (11, 13, 11)),
        (1, 16, 32, (11, 13, 11)),
        (4, 32, 64, (5, 6, 5)),
        (2, 4, 8, (4, 4, 4)),
        (2, 32, 64, (23, 27, 23)),
        (1, 16, 16, (32, 32, 32), "held out"),
        (2, 128, 256, (5, 6, 5), "held out"),
        (2, 8, 16, (23, 27, 23), "held out"),
        (2, 16, 32, (11, 13, 11), "held out"),
        (1, 1, 32, (91, 109, 91)),
        (4, 1, 8, (46, 55, 46)),
        (1, 1, 8, (46, 55, 46)),
        (1, 1, 8, (16, 16, 16)),
        (2, 1, 8, (46, 55, 46), "held out"),
        (1, 1, 16, (30, 30, 30), "held out"),
    ),
]  # fmt: skip


def measure(layer: Layer) -> list[dict[str, Any]]:
    """Time a layer on both sides, with one and with all threads."""
    rows = []
    most = torch.get_num_threads()
    try:
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            rows += _measure(layer, threads)
    finally:
        torch.set_num_threads(most)
    return rows


def _measure(layer: Layer, threads: int) -> Iterator[dict[str, Any]]:
    random = torch.Generator().manual_seed(3)
    shape = layer.shape
    x = torch.randn(layer.samples, shape.c_in, *shape.size, generator=random)
    weight = torch.randn(
        shape.c_out, shape.c_in // shape.groups, *shape.kernel, generator=random
    )  # fmt: skip
    bias = torch.randn(shape.c_out, generator=random)
    ranks = torch.rand(weight.shape, generator=random)
    masks = {density: ranks < density for density in DENSITIES}
    # The first layer of a network needs no gradient of its input.
    passes: list[Gradients] = ["none", "weight"] if shape.c_in == 1 else ["none", "both"]
    if layer.weight_alone:
        passes.append("weight")
    for gradients in passes:
        x.requires_grad_(gradients == "both")
        weight.requires_grad_(gradients != "none")
        bias.requires_grad_(gradients != "none")
        call = Call(layer.op, shape, layer.samples, gradients, threads)
        sides: dict[str, Callable[[], None]] = {
            "dense": _step(layer, x, weight, masks[0.5], bias, "reference"),
            "stock": _step(layer, x, weight, masks[0.5], bias, "stock"),
        }
        for density, mask in masks.items():
            kinds = ["lists"]
            if density >= GROUPED_FROM and cost.can_group(shape) and not call.single_channel:
                kinds.append("grouped")
            for kind in kinds:
                step = _step(layer, x, weight, mask, bias, "cpu")
                sides[f"{kind} {density}"] = _with_grouped(step, kind == "grouped")
        times = _interleaved(sides)
        for side, (median, spread) in times.items():
            kind, _, density_text = side.partition(" ")
            yield {
                "layer": dataclasses.asdict(layer),
                "gradients": gradients,
                "threads": threads,
                "side": kind,
                "density": float(density_text) if density_text else None,
                "seconds": float(f"{median:.4g}"),
                "spread": round(spread, 3),
            }


def _step(
    layer: Layer, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, backend: str
) -> Callable[[], None]:
    settings = {"stride": layer.stride, "padding": layer.kernel // 2, "groups": layer.groups}
    needs = [t for t in (x, weight, bias) if t.requires_grad]

    def forward() -> Tensor:
        if layer.op == "conv_norm_pool_relu" and backend == "cpu":
            return ops.conv_norm_pool_relu(
                x, weight, mask, bias, padding=layer.kernel // 2, backend="cpu"
            )
        if backend == "stock":
            y = functional.conv3d(x, weight, bias, **settings)  # type: ignore[arg-type]
        else:
            y = ops.masked_conv3d(x, weight, mask, bias, **settings, backend=backend)  # type: ignore[arg-type]
        return ops.norm_pool_relu(y) if layer.op == "conv_norm_pool_relu" else y

    if not needs:
        return lambda: None if forward() is None else None
    halved = 2 if layer.op == "conv_norm_pool_relu" else 1
    size = [n // halved for n in layer.shape.out]
    seed = torch.randn(
        layer.samples, layer.c_out, *size, generator=torch.Generator().manual_seed(4)
    )  # fmt: skip

    def step() -> None:
        torch.autograd.grad(forward(), needs, seed)

    return step


def _with_grouped(step: Callable[[], None], grouped: bool) -> Callable[[], None]:
    def forced() -> None:
        with mock.patch.object(cost, "grouped_pays", lambda *_: grouped):
            step()

    return forced


def _interleaved(sides: dict[str, Callable[[], None]]) -> dict[str, tuple[float, float]]:
    """Median and relative spread (half the range) of each side's seconds per call."""
    repeats = {}
    for name, run in sides.items():
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(ROUNDS):
        for name, run in sides.items():
            if round_ >= ROUNDS_SLOW and statistics.median(times[name]) > SLOW_SECONDS:
                continue
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {
        name: (statistics.median(t), (max(t) - min(t)) / 2 / statistics.median(t))
        for name, t in times.items()
    }
