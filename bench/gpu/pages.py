"""Tables and the roofline plot of the GPU benchmark, from its results file."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.bench.gpu.cases import LAYERS
from sparsekit.bench.pages import table
from sparsekit.kernels.masked_conv3d.gpu_cost import RATES

Row = dict[str, Any]
_DENSE = ("dense", "dense, channels last")


def median(row: Row, side: str) -> float:
    """Milliseconds of a side."""
    return float(np.median(row["milliseconds"][side]))


def speedup(row: Row) -> float:
    """Time of the best other side over ours."""
    others = [side for side in row["milliseconds"] if side != "sparsekit"]
    return min(median(row, side) for side in others) / median(row, "sparsekit")


def _spread(row: Row, side: str) -> str:
    low, middle, high = np.percentile(row["milliseconds"][side], [25, 50, 75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def line(row: Row) -> str:
    """One row in words."""
    what = [row[k] for k in ("layer", "mode", "format", "weights") if k in row]
    where = ", ".join(map(str, [*what, f"{row['sparsity']:.0%} pruned"]))
    return f"{where}: {_spread(row, 'sparsekit')} ms, {speedup(row):.2f}x of the best other"


def page(results: Row) -> str:
    """Return the page's text."""
    machine = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    parts = [
        "# The Triton kernels on a GPU",
        "",
        "Written by `python -m sparsekit.bench.gpu` from results.json; not by hand. Milliseconds "
        f"of a training step: median [quartiles] of {results['rounds']} rounds, sides "
        f"interleaved. {machine}.",
    ]
    for kind in ("convolution", "selection"):
        rows = [row for row in results["rows"] if row["what"] == kind]
        if not rows:
            continue
        labels = [k for k in ("layer", "mode", "format", "weights", "sparsity") if k in rows[0]]
        sides = list(rows[0]["milliseconds"])
        cells = [
            [*(str(row[k]) for k in labels), *(_spread(row, side) for side in sides),
             f"{speedup(row):.2f}", row.get("auto", "")]
            for row in rows
        ]  # fmt: skip
        header = [*labels, *sides, "best other / sparsekit", "auto took"]
        parts += ["", f"## {kind.capitalize()}", "", table(header, cells)]
    return "\n".join(parts) + "\n"


def plot(results: Row, path: Path) -> None:
    """Draw executed rate against operations a byte; does nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5))
    axes = figure.subplots()
    grids = {layer.name: layer for layer in LAYERS}
    for row in (row for row in results["rows"] if row["what"] == "convolution"):
        layer = grids[row["layer"]]
        voxels = row["samples"] * math.prod(layer.grid)
        work = 3 * 2 * voxels * layer.c_in * layer.c_out * 27 * row["density"]
        moved = 3 * voxels * (layer.c_in + layer.c_out) * (2 if "16" in row["mode"] else 4)
        seconds = median(row, "sparsekit") / 1e3
        axes.loglog(work / moved, work / seconds / 1e12, ".", color=f"C{len(row['mode']) % 8}")
    rates = RATES["sm_90"]
    reach = np.logspace(-1, 4, 50)
    for name, peak in (("bf16", rates.half), ("tf32", rates.tf32), ("fp32", rates.plain)):
        axes.loglog(reach, np.minimum(peak, reach * rates.memory), "-", label=f"{name} (H100)")
    axes.set_xlabel("kept operations a byte")
    axes.set_ylabel("kept 10^12 operations a second")
    axes.legend()
    figure.savefig(path, dpi=150)
