"""Write the page of what was shown of the Triton kernels, from docs/results/kernels.json.

    python tools/kernels_table.py write          # docs/results/kernels.md

`make check-kernels-full` makes the results file. `write --check` changes nothing and exits with 1
if the page differs from what it would write.
"""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from page_command import run

from sparsekit.bench.pages import table

Row = dict[str, Any]
_FIGURES = ("registers", "shared", "tensor", "copies")


def _tests(results: Row) -> Iterator[str]:
    tests = results["tests"]
    rows = [
        [runs, str(tests[runs]["passed"]), str(tests[runs]["skipped"])]
        for runs in ("interpreter", "ttsem")
    ]
    yield table(["run in", "passed", "left to the other"], rows)
    yield ""
    yield (
        f"{tests['both']} tests pass both ways, every other one in one of the two. "
        "No launch was too large for ttsem to look for races."
    )


def _mutants(results: Row) -> Iterator[str]:
    rows = [
        [
            row["name"], f"`{row['file']}`", row["runs"], f"`{row['check'].split('::')[-1]}`",
            "yes" if row["caught"] else "**no**",
        ]
        for row in results["mutants"]
    ]  # fmt: skip
    yield table(["mistake", "in", "run in", "check", "noticed"], rows)


def _code(rows: list[Row], triton: str) -> Iterator[str]:
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    by_name = sorted(rows, key=lambda row: row["name"])
    for name, of in groupby(by_name, key=lambda row: row["name"]):
        own = {row["target"]: row for row in of}
        cells = []
        for target in targets:
            row = own.get(target, {})
            figures = [str(row[key]) for key in _FIGURES if key in row]
            cells.append(" / ".join(figures))
        lines.append([name, *cells])
    spilled = sum(row["spilled"] > 0 for row in rows)
    yield (
        f"Triton {triton}: {len(rows)} builds, {spilled} of them with spills or a stack. "
        "Each cell: registers / bytes of shared memory / matrix instructions / 16-byte copies. "
        "On NVIDIA the last two are those of the main loop, and the copies are asynchronous; "
        "on AMD they are those of the whole kernel, and 16-byte loads."
    )
    yield ""
    yield table(["kernel", *targets], lines)


def _layers(results: Row) -> Iterator[str]:
    rows = []
    for row in results["layers"]:
        shares = [f"{share:.3f}" for share in row["executed"]]
        rows.append(
            [
                row["layer"], row["granularity"], f"{row['sparsity']:.0%}",
                f"{row['density']:.3f}", *shares, f"{row['filling']:.1%}",
                f"{row['speedup']:.2f}", "kernels" if row["taken"] else "dense",
            ]
        )  # fmt: skip
    yield table(
        [
            "layer", "format", "pruned", "density", "forward", "input gradient", "weight gradient",
            "filling", "model: dense / kernels", "`auto` takes",
        ],
        rows,
    )  # fmt: skip


def page(results: Row) -> str:
    """Return the page's text."""
    newest = results.get("newest")
    lines = [
        "# What is shown of the Triton kernels without a GPU",
        "",
        "Written by `make check-kernels-full` from docs/results/kernels.json; not by hand. Nothing "
        "here was timed on a GPU: `bench/gpu` is for whoever has one.",
        "",
        "## Values, bounds and races",
        "",
        *_tests(results),
        "",
        "## Mistakes that are noticed",
        "",
        "Each is put into a copy of the code, where the check that is named has to fail.",
        "",
        *_mutants(results),
        "",
        "## Work that masks leave",
        "",
        "BrainAgeCNN of width 1 on 91 x 109 x 91, 8 scans in bfloat16, magnitude masks of random "
        "weights. Executed work of each pass as a share of the dense layer's, lists' filling "
        "included; filling is the part that fills up lists to whole steps, and what it multiplies "
        "is 0. **The last two columns are a model** of an H100 (`gpu_cost.py`), not measured: time "
        "of a step with torch's dense convolution over that with the kernels.",
        "",
        *_layers(results),
        "",
        "## Machine code",
        "",
        *_code(results["code"], results["triton"]),
    ]
    if newest:
        lines += [
            "",
            f"With Triton {newest['triton']}, {newest['builds']} builds: "
            + (f"{len(newest['wrong'])} are not as they should be." if newest["wrong"] else
               "none spills, and all have the matrix instructions and copies that they should."),
            "",
            *(f"- {text}" for text in newest["wrong"]),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def collect(path: Path) -> Row:
    """Return what `tools/check_kernels.py --whole` wrote."""
    results: Row = json.loads(path.read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    sys.exit(run(__doc__, "kernels", collect, page))
