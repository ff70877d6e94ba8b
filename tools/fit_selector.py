"""Fit the model by which ``backend="auto"`` chooses on a CPU, and write down how well it fits.

    python tools/fit_selector.py                measure (about 12 minutes on an idle machine), fit
    python tools/fit_selector.py --fit-only     fit what docs/results/selector.json has measured

writes docs/results/selector.json with every measurement and the errors, and the coefficients that
the package ships. Both sides of each comparison are interleaved in one process; a time is the
median of its rounds, in the less disturbed of two passes. Layers that are marked as held out take
no part in the fit; the errors of the predictions are theirs.
"""

import argparse
import dataclasses
import itertools
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
from sparsekit.kernels.masked_conv3d import cost, selector
from sparsekit.kernels.masked_conv3d.cost import Call, Gradients, Work
from sparsekit.kernels.masked_conv3d.geometry import Shape

RESULTS = Path(__file__).resolve().parent.parent / "docs/results/selector.json"
DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.15, 0.05, 0.01)
# Masks at least this dense are also measured with grouped channels.
GROUPED_FROM = 0.3
# Other work on the machine disturbs some of a pass.
PASSES = 2
ROUNDS = 5
ROUNDS_SLOW, SLOW_SECONDS = 3, 0.02
LEAST_SECONDS = 2e-4
# Errors up to this (of the logarithm) count fully in the fit.
DOUBTFUL = 0.3
# The kernels are taken if they are predicted faster by this factor.
MARGIN = 1.1


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
    Layer(1, 16, 32, (60, 60, 60)),
    Layer(1, 32, 32, (45, 54, 45), **HELD),
    Layer(2, 40, 36, (20, 20, 20), **HELD),
    Layer(2, 20, 40, (24, 24, 24)),
    Layer(1, 72, 56, (12, 12, 12)),
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
    Layer(1, 24, 24, (20, 20, 20), groups=2),
    Layer(2, 40, 40, (12, 12, 12), groups=8),
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
        sides: dict[str, Callable[[], object]] = {
            "dense": _step(layer, x, weight, masks[0.5], bias, "reference"),
            "stock": _step(layer, x, weight, masks[0.5], bias, "stock"),
        }
        for density, mask in masks.items():
            kinds = ["lists"]
            if density >= GROUPED_FROM and cost.can_group(shape) and not call.single_channel:
                kinds.append("grouped")
            for kind in kinds:
                sides[f"{kind} {density}"] = _step(layer, x, weight, mask, bias, "cpu")
        # The kernels ask the model, which is not there yet, which forward pass to run.
        with mock.patch.object(cost, "grouped_pays", _asks_for_grouped):
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
) -> Callable[[], object]:
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
        return forward
    halved = 2 if layer.op == "conv_norm_pool_relu" else 1
    size = [n // halved for n in layer.shape.out]
    seed = torch.randn(
        layer.samples, layer.c_out, *size, generator=torch.Generator().manual_seed(4)
    )  # fmt: skip

    def step() -> None:
        torch.autograd.grad(forward(), needs, seed)

    return step


_now_running = ""


def _asks_for_grouped(_shape: Shape, _density: float) -> bool:
    return _now_running.startswith("grouped")


def _start(side: str) -> float:
    global _now_running
    _now_running = side
    return time.perf_counter()


def _interleaved(sides: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Median and relative spread (half the range) of each side's seconds per call."""
    repeats = {}
    for name, run in sides.items():
        _start(name)
        run()
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - begin)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(ROUNDS):
        for name, run in sides.items():
            if round_ >= ROUNDS_SLOW and statistics.median(times[name]) > SLOW_SECONDS:
                continue
            begin = _start(name)
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - begin) / repeats[name])
    return {
        name: (statistics.median(t), (max(t) - min(t)) / 2 / statistics.median(t))
        for name, t in times.items()
    }


def fit(rows: list[dict[str, Any]]) -> dict[str, Work]:
    """Coefficients of all models, from the layers that are not held out."""
    samples: dict[str, list[tuple[Work, float, float]]] = {}
    for row in rows:
        if row["layer"]["held_out"] or row["side"] == "stock":
            continue
        call = call_of(row)
        if row["side"] != "dense":
            model, work = cost.kernel_work(call, row["density"], grouped=row["side"] == "grouped")
        elif call.op == "masked_conv3d":
            model, work = cost.dense_work(call)
        else:
            continue
        samples.setdefault(model, []).append((work, row["seconds"], row["seconds"]))
    fitted = {model: _fit(seen) for model, seen in sorted(samples.items())}
    # What a fused block's dense side takes beyond its convolution.
    rest: dict[str, list[tuple[Work, float, float]]] = {}
    for row in rows:
        call = call_of(row)
        if row["layer"]["held_out"] or row["side"] != "dense" or call.op == "masked_conv3d":
            continue
        model, work = cost.dense_work(call)
        beyond = max(0.0, row["seconds"] - cost.seconds(fitted[model], work))
        model, work = cost.norm_pool_work(call)
        rest.setdefault(model, []).append((work, beyond, row["seconds"]))
    return fitted | {model: _fit(seen) for model, seen in sorted(rest.items())}


def _fit(samples: list[tuple[Work, float, float]]) -> Work:
    """Coefficients of 0 or more for (work, seconds to explain, seconds that an error counts by)."""
    names = sorted({name for work, _, _ in samples for name in work})
    counts = np.array([[work.get(name, 0.0) for name in names] for work, _, _ in samples])
    wanted = np.array([seconds for _, seconds, _ in samples])
    scale = np.array([by for _, _, by in samples])
    largest = np.maximum(counts.max(axis=0), 1e-30)
    weights = 1 / scale
    found = np.zeros(len(names))
    for _ in range(10):
        found, _ = nnls(counts / largest * weights[:, None], wanted * weights, maxiter=1000)
        # Twice as fast and twice as slow are equally wrong.
        predicted = counts / largest @ found + scale - wanted
        predicted = np.maximum(predicted, 0.05 * scale)
        # Far off is a measurement that was disturbed, or an oddity of one size: it counts less.
        off = np.abs(np.log(predicted / scale)) / DOUBTFUL
        weights = 1 / np.sqrt(scale * predicted * np.maximum(1.0, off))
    return {
        name: float(f"{value:.6g}")
        for name, value in zip(names, found / largest, strict=True)
        if value > 0
    }


def call_of(row: dict[str, Any]) -> Call:
    """Rebuild the call that a row has timed."""
    layer = Layer(**{**row["layer"], "size": tuple(row["layer"]["size"])})
    return Call(layer.op, layer.shape, layer.samples, row["gradients"], row["threads"])


def errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Predicted by measured times of the held-out layers, by side."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if not row["layer"]["held_out"] or row["side"] == "stock":
            continue
        call = call_of(row)
        if row["side"] == "dense":
            predicted = cost.dense_seconds(call)
        else:
            grouped = row["side"] == "grouped"
            predicted = cost.predict(*cost.kernel_work(call, row["density"], grouped=grouped))
        ratios.setdefault(row["side"], []).append(predicted / row["seconds"])
    return {
        side: {
            "measurements": len(found),
            "median_ratio": round(statistics.median(found), 3),
            "median_error": round(statistics.median([_error(r) for r in found]), 3),
            "worst_ratio": round(max(found, key=_error), 3),
        }
        for side, found in ratios.items()
    }


def _error(ratio: float) -> float:
    return max(ratio, 1 / ratio) - 1


def regrets(rows: list[dict[str, Any]], *, held_out: bool) -> list[dict[str, Any]]:
    """How much slower each choice is than the better path, and than the dense one."""
    cases: dict[str, dict[str, float]] = {}
    dense: dict[str, dict[str, float]] = {}
    keys = {}
    for row in rows:
        if row["layer"]["held_out"] != held_out:
            continue
        case = json.dumps([row["layer"], row["gradients"], row["threads"]])
        if row["density"] is None:
            dense.setdefault(case, {})[row["side"]] = row["seconds"]
        else:
            cases.setdefault(f"{case} {row['density']}", {})[row["side"]] = row["seconds"]
            keys[f"{case} {row['density']}"] = case, row
    found = []
    for key, kernels in cases.items():
        case, row = keys[key]
        decision = selector.decide(call_of(row), row["density"])
        taken = "grouped" if decision.grouped and "grouped" in kernels else "lists"
        picked = dense[case]["dense"] if decision.dense else kernels[taken]
        best = min(dense[case]["dense"], *kernels.values())
        found.append(
            {
                "case": [row["layer"], row["gradients"], row["threads"], row["density"]],
                "picked": "dense" if decision.dense else taken,
                "regret": round(picked / best - 1, 3),
                "against_dense": round(picked / dense[case]["dense"], 3),
                "against_stock": round(picked / dense[case]["stock"], 3),
            }
        )
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, mean and worst of the regrets."""
    values = [case["regret"] for case in found]
    return {
        "choices": len(values),
        "median": round(statistics.median(values), 3),
        "mean": round(statistics.fmean(values), 4),
        "ninth_decile": round(float(np.quantile(values, 0.9)), 3),
        "worst": max(values),
        "slower_than_dense_by_5_percent": sum(c["against_dense"] > 1 / 0.95 for c in found),
        "worst_against_dense": max(c["against_dense"] for c in found),
    }


def write(rows: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    """Fit, then write the coefficients and the results file."""
    models = fit(rows)
    shipped: dict[str, Any] = {"machine": machine, "margin": MARGIN, "coefficients": models}
    _ship(shipped)
    held, fitted = (regrets(rows, held_out=held_out) for held_out in (True, False))
    shipped["errors"] = errors(rows)
    shipped["regret"] = {"held_out": summary(held), "fitted": summary(fitted)}
    _ship(shipped)
    worst = sorted(held + fitted, key=lambda case: -case["regret"])[:10]
    results = shipped | {"worst": worst}
    text = json.dumps(results | {"measurements": []}, indent=1)
    # One line each.
    lines = ",\n".join(f"  {json.dumps(group)}" for group in _packed(rows))
    RESULTS.write_text(text.replace('"measurements": []', f'"measurements": [\n{lines}\n ]') + "\n")
    shown = {key: results[key] for key in ("errors", "regret", "worst")}
    print(json.dumps(shown, indent=1))


def _packed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what was measured side by side into one record."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        common = {key: row[key] for key in ("layer", "gradients", "threads")}
        group = groups.setdefault(json.dumps(common), common | {"seconds": {}, "spread": {}})
        side = row["side"] if row["density"] is None else f"{row['side']} {row['density']}"
        group["seconds"][side] = row["seconds"]
        group["spread"][side] = row["spread"]
    return list(groups.values())


def _unpacked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        for side, seconds in group["seconds"].items():
            kind, _, density = side.partition(" ")
            common = {key: group[key] for key in ("layer", "gradients", "threads")}
            rows.append(
                common
                | {"side": kind, "density": float(density) if density else None}
                | {"seconds": seconds, "spread": group["spread"][side]}
            )
    return rows


def _ship(content: dict[str, Any]) -> None:
    cost.COEFFICIENTS.write_text(json.dumps(content, indent=2) + "\n")
    selector.forget()


def undisturbed(passes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each time that was measured in several passes, the shortest."""
    best: dict[str, dict[str, Any]] = {}
    for row in itertools.chain.from_iterable(passes):
        key = json.dumps([row[k] for k in ("layer", "gradients", "threads", "side", "density")])
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return list(best.values())


def _machine() -> dict[str, Any]:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Fit the model behind backend='auto' on a CPU.")
    parser.add_argument("--fit-only", action="store_true", help="fit what was measured before")
    if parser.parse_args().fit_only:
        before = json.loads(RESULTS.read_text())
        write(_unpacked(before["measurements"]), before["machine"])
        return
    passes = []
    for number in range(1, PASSES + 1):
        rows = []
        for i, layer in enumerate(LAYERS):
            print(f"pass {number}, {i + 1} of {len(LAYERS)}: {layer}", file=sys.stderr)
            rows += measure(layer)
        passes.append(rows)
    write(undisturbed(passes), _machine())


if __name__ == "__main__":
    main()
