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
from selector_layers import LAYERS, Layer
from selector_rows import packed, undisturbed, unpacked
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
        if row["layer"]["held_out"]:
            continue
        call, plain = call_of(row), row["side"] == "stock"
        if not (plain or row["side"] == "dense"):
            model, work = cost.kernel_work(call, row["density"], grouped=row["side"] == "grouped")
        elif call.op == "masked_conv3d":
            model, work = cost.dense_work(call, masked=not plain, checked=not plain)
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
            predicted = cost.dense_seconds(call, 0.5)
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
        # What has no mask to apply is stock's convolution, but for the checks.
        plain = dense[case]["stock" if row["density"] == 1.0 else "dense"]
        picked = plain if decision.dense else kernels[taken]
        best = min(plain, *kernels.values())
        found.append(
            {
                "case": [row["layer"], row["gradients"], row["threads"], row["density"]],
                "picked": "dense" if decision.dense else taken,
                "regret": round(picked / best - 1, 3),
                "against_dense": round(picked / plain, 3),
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
    lines = ",\n".join(f"  {json.dumps(group)}" for group in packed(rows))
    RESULTS.write_text(text.replace('"measurements": []', f'"measurements": [\n{lines}\n ]') + "\n")
    shown = {key: results[key] for key in ("errors", "regret", "worst")}
    print(json.dumps(shown, indent=1))


def _ship(content: dict[str, Any]) -> None:
    cost.COEFFICIENTS.write_text(json.dumps(content, indent=2) + "\n")
    selector.forget()


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
        write(unpacked(before["measurements"]), before["machine"])
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
