"""Markdown of the CPU benchmarks, made from docs/results/cpu.json and nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsekit.bench import steps
from sparsekit.bench.figures import (
    FORWARD,
    GRADIENTS,
    NEVER_SLOWER,
    Figure,
    Row,
    best_dense,
    figures,
    one,
    percent,
    select,
    trained_rows,
)
from sparsekit.bench.network import LAYERS, SPARSITIES
from sparsekit.bench.pairs import OURS, STOCK, quartiles, ratio
from sparsekit.bench.roofline import ceilings, points
from sparsekit.bench.steps import LEFT_DENSE, STEP

BEGIN, END = "<!-- cpu table: begin -->", "<!-- cpu table: end -->"
_ALTERNATIVES = (steps.CHANNELS_LAST, steps.BFLOAT16, steps.COMPILED)
_MISSING = "not measured"
_FEWEST_ROUNDS = 5


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """All rows of a results file."""
    return [row for name in sorted(results["files"]) for row in results["files"][name]["rows"]]


def number(value: float) -> str:
    """Three digits, as in 13.8 and 0.217."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float] | None, unit: str = "x") -> str:
    """Median and quartiles."""
    if values is None:
        return _MISSING
    low, middle, high = map(number, values)
    return f"**{middle}{unit}** ({low} to {high})"


def milliseconds(row: Row, side: str) -> str:
    """Median time of a side."""
    return number(quartiles(row["milliseconds"][side])[1])


def where(results: Mapping[str, Any]) -> str:
    """One sentence about machine and method."""
    machine = results["machine"]
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    return (
        f"Measured on {machine['cores']} cores ({machine['processor']}, {machine['instructions']}; "
        f"{caches}), {machine['threads']} threads on each side, torch {machine['torch']}, Numba "
        f"{machine['numba']}; batch 1, float32."
    )


def step_table(rows: Sequence[Row]) -> str:
    """Whole training step: stock's time over that of each way to run it."""
    dense = one(rows, what="training step, dense alternatives")
    others = {name: _alternative(dense, name) for name in _ALTERNATIVES}
    lines = []
    for sparsity in SPARSITIES:
        labels = {"sparsity": sparsity, "masks": "uniform random"}
        row, left = (one(rows, what=what, **labels) for what in (STEP, LEFT_DENSE))
        lines.append(
            [
                percent(sparsity),
                _MISSING if row is None else milliseconds(row, STOCK),
                _MISSING if row is None else milliseconds(row, OURS),
                _MISSING if row is None else f"**{number(ratio(row, STOCK)[1])}x**",
                _MISSING if left is None else f"{number(ratio(left, STOCK)[1])}x",
                *others.values(),
            ]
        )
    header = ["pruned", "stock, ms", "sparsekit, ms", "sparsekit", "first layer left dense"]
    return table([*header, *_ALTERNATIVES], lines)


def _alternative(row: Row | None, name: str) -> str:
    if row is None:
        return _MISSING
    if name in row["milliseconds"]:
        return f"{number(ratio(row, STOCK, name)[1])}x"
    text: str = row["notes"][name]
    return text


def summary(results: Mapping[str, Any]) -> str:
    """What the README shows."""
    rows = rows_of(results)
    lines = [
        step_table(rows),
        "",
        *([warning, ""] if (warning := _warning(rows)) else []),
        "One training step (zero_grad, forward, loss, backward, SGD with the masks enforced) of "
        "`BrainAgeCNN` on a 91 x 109 x 91 scan: times faster than the same network of torch's "
        "modules in eager mode. The last three columns are dense and do not depend on the masks, "
        "which are uniform random here. " + where(results),
    ]
    trained = trained_rows(rows)
    if trained:
        shown = ", ".join(
            f"{number(ratio(row, STOCK)[1])}x at {percent(row['sparsity'])}" for row in trained
        )
        lines[-1] += (
            " With the masks of a really trained network, whose first layers keep more of their "
            f"weights: {shown}."
        )
    own, stock = _memory(rows)
    if own and stock:
        lines[-1] += (
            f" Peak memory of a step at 95 %: {own} beyond libraries and weights, stock {stock}."
        )
    return "\n".join(lines)


def _memory(rows: Sequence[Row]) -> tuple[str, str]:
    row = one(rows, what="memory of a step", sparsity=0.95)
    if row is None:
        return "", ""
    own, stock = (
        quartiles([run["peak_bytes"] - run["resident_before_bytes"] for run in row["processes"][s]])
        for s in (OURS, STOCK)
    )
    return f"{own[1] / 1e6:.0f} MB", f"{stock[1] / 1e6:.0f} MB"


def page(results: Mapping[str, Any]) -> str:
    """Return docs/results/cpu.md."""
    rows = rows_of(results)
    found = figures(rows)
    bars = [figure for figure in found if figure.bar is not None]
    kept = sum(figure.holds is True for figure in bars)
    missing = sum(figure.value is None for figure in bars)
    dates = sorted({value["measured"] for value in results["files"].values()})
    parts = [
        "# CPU benchmarks",
        "Written by `make bench-cpu` from docs/results/cpu.json; not by hand.",
        where(results) + f" {' and '.join(dict.fromkeys([dates[0], dates[-1]]))}.",
        _warning(rows),
        "Baseline (stock): torch eager, contiguous tensors, `nn.Conv3d`, `nn.InstanceNorm3d`, "
        "`nn.MaxPool3d(2)`, `nn.ReLU`. All sides of a comparison run in turns in one process; a "
        "ratio is taken within each round, and its median and quartiles over the rounds are shown. "
        "Outputs and gradients are compared first, and kernels compiled. Masks are uniform random "
        "in every layer unless a table says otherwise. Stock enforces no masks: it trains densely.",
        "## Whole training step",
        step_table(rows),
        "Stock's time over that of each column. The last three are dense alternatives, measured "
        "once in turns with stock.",
        "## Bars",
        f"{kept} of {len(bars)} bars hold" + (f", {missing} not measured." if missing else "."),
        _figures(found),
        "## Never slower than dense",
        f"Time of the best dense path (eager, contiguous or channels last) over ours, layer by "
        f"layer; the bar is {NEVER_SLOWER}. Values below it are marked with !.",
        "### Forward",
        _never_slower(rows, FORWARD),
        "### Forward and gradients",
        _never_slower(rows, GRADIENTS),
        _trained(rows),
        "## What limits the kernels",
        _roofline(rows, results["machine"]),
        "## Agreement of the whole step",
        _agreement(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _warning(rows: Sequence[Row]) -> str:
    rounds = [len(row["milliseconds"][OURS]) for row in rows if OURS in row.get("milliseconds", ())]
    if min(rounds, default=_FEWEST_ROUNDS) >= _FEWEST_ROUNDS:
        return ""
    return "**Made with BENCH_QUICK, 3 rounds each: to see that all runs, not for figures.**"


def _figures(found: Sequence[Figure]) -> str:
    lines = []
    for figure in found:
        unit = "x" if figure.unit == "x" else " s"
        bar, holds = "report", ""
        if figure.bar is not None:
            bar = f"{'<=' if figure.at_most else '>='} {figure.bar:g}{unit}"
            holds = {True: "yes", False: "**no**", None: _MISSING}[figure.holds]
        lines.append([figure.what, figure.case, spread(figure.value, unit), bar, holds])
    return table(["figure", "pruned, or layer", "median (quartiles)", "bar", "holds"], lines)


def _never_slower(rows: Sequence[Row], what: str) -> str:
    lines = []
    for name in LAYERS:
        cells = []
        for sparsity in SPARSITIES:
            row = one(rows, what=what, layer=name, sparsity=sparsity)
            if row is None:
                cells.append(_MISSING)
                continue
            _, value = best_dense(row)
            cells.append(f"{number(value[1])}x" + (" !" if value[1] < NEVER_SLOWER else ""))
        lines.append([name, *cells])
    return table(["layer", *map(percent, SPARSITIES)], lines)


def _trained(rows: Sequence[Row]) -> str:
    found = trained_rows(rows)
    if not found:
        return ""
    run = found[0]["notes"]["run"]
    settings = ", ".join(f"{name} {value}" for name, value in run.items())
    lines = [
        [
            percent(row["sparsity"]),
            str(row["notes"]["round"]),
            *(percent(row["notes"]["density_by_layer"][name]) for name in LAYERS),
            milliseconds(row, STOCK),
            milliseconds(row, OURS),
            spread(ratio(row, STOCK)),
        ]
        for row in found
    ]
    header = ["pruned in all", "round", *(f"{name} keeps" for name in LAYERS)]
    return "\n\n".join(
        [
            "## Masks of a really trained network",
            "A federated run of FedSparsify with one global threshold over all layers, on a small "
            f"synthetic cohort ({settings}). Its checkpoints hold a model for every round; taken "
            "are the rounds whose sparsity comes closest to that of the other tables.",
            table([*header, "stock, ms", "sparsekit, ms", "times faster"], lines),
        ]
    )


def _roofline(rows: Sequence[Row], machine: Mapping[str, Any]) -> str:
    limits = ceilings(rows, machine)
    if limits is None:
        return "Ceilings were not measured."
    lines = []
    for point in points(rows, limits):
        memory = "in cache" if point.memory_seconds is None else f"{1e3 * point.memory_seconds:.2f}"
        lines.append(
            [
                "forward" if point.what == FORWARD else "forward + gradients",
                point.layer,
                percent(point.sparsity),
                f"{point.flops / 1e9:.2f}",
                f"{point.bytes / 1e6:.1f}",
                f"{1e3 * point.seconds:.2f}",
                f"{point.flops / point.seconds / 1e9:.0f}",
                f"{point.bytes / point.seconds / 1e9:.1f}",
                f"{1e3 * point.loads_seconds:.2f}",
                memory,
                f"{point.limit}, {point.bound_seconds / point.seconds:.0%}",
            ]
        )
    text = (
        f"Ceilings of this machine with all threads, measured by bench/bench_cpu_ceilings.py: "
        f"{2 * limits.forward / 1e9:.0f} GFLOP/s forward, with one load from the first cache for "
        f"each multiply-add; {2 * limits.backward / 1e9:.0f} GFLOP/s backward, where a loaded "
        f"vector serves both gradients; {limits.stream / 1e9:.0f} GB/s to and from memory. FLOPs "
        "count unpruned weights only, 2 for each output voxel and pass. Bytes are the layer's "
        "tensors, each once; the padded copies that the kernels work on come on top. `limit` names "
        "the larger of the two least times and its share of the measured time: the rest is loads "
        "that miss the first cache, padding between rows, packing, and the start of a call."
    )
    header = [
        "pass", "layer", "pruned", "GFLOP", "MB", "ms", "GFLOP/s", "GB/s", "loads, least ms",
        "memory, least ms", "limit",
    ]  # fmt: skip
    return text + "\n\n" + table(header, lines)


def _agreement(rows: Sequence[Row]) -> str:
    found = [*select(rows, what=STEP, masks="uniform random"), *trained_rows(rows)]
    if not found:
        return ""
    lines = []
    for row in found:
        agreement: Mapping[str, float] = row["notes"]["agreement"]
        cells = [f"{agreement[name]:.0e}" for name in ("prediction", *LAYERS)]
        lines.append([f"{percent(row['sparsity'])}, {row['masks'].split(',')[0]}", *cells])
    text = (
        "Difference of the prediction, over its value, and of each weight's gradient, by its "
        "length, between ours and stock, both float32. Limits: "
        f"{steps.PREDICTION_LIMIT:g} and {steps.GRADIENT_LIMIT:g}. Where two voxels of a pooling "
        "window are equal but for rounding, the sides send the gradient to different ones, and the "
        "layers below that one get other numbers: hence the jumps. Layer by layer, without that, "
        "sparsekit.bench.convolutions demands more."
    )
    return text + "\n\n" + table(["pruned, masks", "prediction", *LAYERS], lines)
