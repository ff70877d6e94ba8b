"""Write the tables of docs/which-sparsity.md from the results files in docs/results.

    python tools/which_table.py [--check]

Nothing is measured. `--check` changes nothing and exits with 1 if a table is stale.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from page_command import rewrite

from sparsekit.bench.figures import (
    FORWARD,
    GRADIENTS,
    Row,
    best_dense,
    one,
    percent,
    select,
    trained_rows,
)
from sparsekit.bench.network import LAYERS, SPARSITIES
from sparsekit.bench.pages import milliseconds, number, rows_of, table
from sparsekit.bench.pairs import STOCK, quartiles, ratio
from sparsekit.bench.steps import STEP

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "which-sparsity.md"
LINKS = (10, 100, 1000)
_MARKED = re.compile(r"(<!-- which (\w+): begin -->\n).*?(<!-- which \2: end -->\n)", re.DOTALL)
Results = Mapping[str, Any]


def load(name: str) -> Results:
    """Return a results file."""
    found: Results = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))
    return found


def machine_of(results: Results) -> str:
    """A few words about where it was measured."""
    machine = results["machine"]
    return f"{machine['cores']} cores ({machine['processor']}), torch {machine['torch']}"


def cpu_steps() -> str:
    """How much faster a whole training step is, for uniform masks and for those of training."""
    results = load("cpu")
    rows = rows_of(results)
    lines = []
    for sparsity in SPARSITIES:
        row = one(rows, what=STEP, sparsity=sparsity, masks="uniform random")
        # A trained network has what its rounds had: the closest one, if it is close.
        close = [r for r in trained_rows(rows) if abs(r["sparsity"] - sparsity) < 0.02]
        trained = min(close, key=lambda r: abs(r["sparsity"] - sparsity), default=None)
        lines.append(
            [
                percent(sparsity),
                "-" if row is None else f"{number(ratio(row, STOCK)[1])}x",
                "-"
                if trained is None
                else f"{number(ratio(trained, STOCK)[1])}x, at {percent(trained['sparsity'])}",
            ]
        )
    found = table(["pruned", "every layer alike", "as a global threshold left a network"], lines)
    return f"{found}\n\nTimes faster than torch's modules, {machine_of(results)}."


def crossing(points: Sequence[tuple[float, float]]) -> str:
    """Least measured sparsity from which on the ratio is at least 1; `points` in its order."""
    for place, (sparsity, _) in enumerate(points):
        if all(value >= 1.0 for _, value in points[place:]):
            return f"{percent(sparsity)}"
    return "never"


def cpu_layers() -> str:
    """From which sparsity on each layer beats torch's better dense path."""
    rows = rows_of(load("cpu"))
    lines = []
    for name, layer in LAYERS.items():
        cells = [f"{layer.c_in} to {layer.c_out}, {'x'.join(map(str, layer.grid))}"]
        cells[0] += "" if layer.kernel == 3 else f", kernel {layer.kernel}"
        for what in (FORWARD, GRADIENTS):
            found = sorted(select(rows, what=what, layer=name), key=lambda r: float(r["sparsity"]))
            cells.append(crossing([(r["sparsity"], best_dense(r)[1][1]) for r in found]))
        row = one(rows, what=GRADIENTS, layer=name, sparsity=0.95)
        if row is None:
            cells += ["-", "-"]
        else:
            side, values = best_dense(row)
            cells += [f"{number(values[1])}x", f"{milliseconds(row, side)} ms"]
        lines.append(cells)
    header = ["convolution", "forward, from", "with gradients, from", "with gradients at 95 %",
              "dense, with gradients"]  # fmt: skip
    return (
        f"{table(header, lines)}\n\nAgainst the faster of torch's contiguous and channels-last "
        "convolution: the least of the measured sparsities "
        f"({', '.join(map(percent, SPARSITIES))}) from which on ours is not slower."
    )


def _layer_rows(granularity: str, sparsity: float) -> list[Results]:
    return [
        row
        for row in load("kernels")["layers"]
        if row["granularity"] == granularity and row["sparsity"] == sparsity
    ]


def gpu_model() -> str:
    """What the model of an H100 says of the wide layers of the network."""
    layers = load("kernels")["layers"]
    sparsities = sorted({row["sparsity"] for row in layers})
    lines = []
    for granularity in dict.fromkeys(row["granularity"] for row in layers):
        cells = [f"`{granularity}`"]
        for sparsity in sparsities:
            rows = _layer_rows(granularity, sparsity)
            taken = sum(row["taken"] for row in rows)
            ratios = [row["speedup"] for row in rows]
            cells.append(f"{min(ratios):.2g}x to {max(ratios):.2g}x, {taken} of {len(rows)}")
        lines.append(cells)
    header = ["granularity", *(f"{percent(s)} pruned" for s in sparsities)]
    names = ", ".join(dict.fromkeys(row["layer"] for row in layers))
    return (
        f"{table(header, lines)}\n\n**A model of an H100, not a measurement; nobody has timed "
        "these kernels on a GPU.** Step of torch's dense convolution over ours, least to most over "
        f"{names}, 8 scans in bfloat16; and in how many of them `auto` would take our kernels."
    )


def wire_sizes() -> str:
    """Bytes of one whole state and its time on links, by sparsity."""
    results = load("codec")
    rows = [r for r in results["rows"] if r["what"] == "encode" and r["state"] == "trained"]
    back = {r["sparsity"]: r for r in results["rows"]
            if r["what"] == "decode" and r["state"] == "trained"}  # fmt: skip
    lines = []
    for row in rows:
        notes = row["notes"]
        payload, dense = notes["bytes"]["sparsekit"], notes["dense_bytes"]
        coding = sum(_coding_milliseconds(r) for r in (row, back[row["sparsity"]]))
        lines.append(
            [
                percent(1 - 4 * notes["kept"] / dense),
                f"{payload / 1e6:.3g} MB",
                f"{dense / payload:.3g}x",
                *(f"{_seconds(payload, mbit)}" for mbit in LINKS),
                f"{coding:.2g} ms",
                f"{8e-6 * (dense - payload) / coding:.2g} Gbit/s",
            ]
        )
    dense = rows[0]["notes"]["dense_bytes"]
    dense_line = ["not coded", f"{dense / 1e6:.3g} MB", "1x"]
    lines.insert(0, [*dense_line, *(_seconds(dense, mbit) for mbit in LINKS), "-", "-"])
    header = ["pruned", "one message", "less", *(f"{m} Mbit/s" for m in LINKS), "to code, 2 ends",
              "pays up to"]  # fmt: skip
    return (
        f"{table(header, lines)}\n\n`BrainAgeCNN` at width 1, weights of a trained network, "
        "lossless, without a base. Times on links are bytes over bandwidth, calculated, without "
        f"coding. Coding, encode and decode, was measured on one thread: {machine_of(results)}. "
        "*Pays up to*: the bandwidth at which coding takes the time that it saves."
    )


def _coding_milliseconds(row: Row) -> float:
    return quartiles(row["milliseconds"]["sparsekit"])[1]


def _seconds(size: float, mbit: float) -> str:
    seconds = 8 * size / (mbit * 1e6)
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def wire_values() -> str:
    """Bytes of a whole federated run by what travels, and its time on links."""
    results = load("values")
    lines = []
    order = ("lossless", "bf16", "fp16", "int8", "int4")
    runs = {name: results["runs"][name] for name in order if name in results["runs"]}
    both = {name: [run["bytes"][way] for way in ("down", "up")] for name, run in runs.items()}
    dense = sum(way["dense_equivalent"] for way in both["lossless"])
    lines.append(["dense float32", f"{dense / 1e6:.3g} MB", "1x",
                  *(_seconds(dense, m) for m in LINKS), "-"])  # fmt: skip
    for name, run in runs.items():
        payload = sum(way["payload"] for way in both[name])
        mean, low, high = run["difference"]
        lines.append(
            [
                f"`{name}`",
                f"{payload / 1e6:.3g} MB",
                f"{dense / payload:.3g}x",
                *(_seconds(payload, m) for m in LINKS),
                "-" if name == "lossless" else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]",
            ]
        )
    settings = results["settings"]
    _, _, sites = results["people"]
    header = ["`--values`", "all messages", "less", *(f"{m} Mbit/s" for m in LINKS),
              "change of the MAE, years [95 %]"]  # fmt: skip
    return (
        f"{table(header, lines)}\n\nAll messages of a run of {results['strategy']}: {sites} sites, "
        f"{settings['rounds']} rounds from dense to {percent(settings['sparsity'])} pruned, width "
        f"{settings['width']:g}, synthetic people, one seed. Times: all bytes over one link, one "
        "after another, calculated."
    )


def wire_link() -> str:
    """What was measured over a slow link."""
    results = load("bandwidth")
    lines = []
    kinds = {"echo": "messages alone", "runs": "with training and evaluation"}
    for kind, title in kinds.items():
        if kind in results:
            dense, sparse = results[kind]["dense"], results[kind]["sparse"]
            lines.append(
                [
                    title,
                    f"{dense['payload_bytes'] / sparse['payload_bytes']:.3g}x",
                    f"{dense['seconds']:.3g} s",
                    f"{sparse['seconds']:.2g} s",
                    f"{dense['seconds'] / sparse['seconds']:.3g}x",
                ]
            )
    header = ["a round", "fewer bytes", "dense", f"{percent(results['sparsity'])} pruned", "faster"]
    return (
        f"{table(header, lines)}\n\nMeasured over {results['mbit']} Mbit/s shared by "
        f"{results['sites']} sites and both ways: {machine_of(results)}."
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "steps": cpu_steps,
    "layers": cpu_layers,
    "gpu": gpu_model,
    "sizes": wire_sizes,
    "values": wire_values,
    "link": wire_link,
}


def with_tables(page: str) -> str:
    """Return the page with the text between its marks written anew."""
    found = [name for _, name, _ in _MARKED.findall(page)]
    if sorted(found) != sorted(SECTIONS):
        raise SystemExit(f"{PAGE}: expected the marks {sorted(SECTIONS)}, found {sorted(found)}")
    return _MARKED.sub(lambda m: f"{m[1]}{SECTIONS[m[2]]()}\n{m[3]}", page)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or say that they are stale; return the exit code."""
    return rewrite(__doc__, PAGE, with_tables, argv)


if __name__ == "__main__":
    sys.exit(main())
