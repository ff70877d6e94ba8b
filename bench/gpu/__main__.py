"""Benchmark the Triton kernels on this machine's GPU: python -m sparsekit.bench.gpu OUT.

First every mode and format is compared with torch in float64; if anything differs, nothing is
timed. Then OUT gets results.json, results.md and, with matplotlib, roofline.png.
"""

import argparse
import json
import sys
from itertools import chain
from pathlib import Path

import torch

from sparsekit.bench.gpu import cases, pages


def main() -> int:
    """Do as the command line says; 1 if the kernels disagree, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m sparsekit.bench.gpu", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each timing")
    parser.add_argument("--samples", type=int, default=8, help="scans of a batch")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use; `sparsekit doctor` says what is here", file=sys.stderr)
        return 2
    wrong = list(cases.disagreements("cuda", cases.LAYERS, "triton"))
    if wrong:
        print(*wrong, "the kernels disagree with torch: nothing is timed", sep="\n")
        return 1
    from sparsekit.bench.gpu import measure

    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "results.json"
    results = {"machine": measure.machine(), "rounds": options.rounds, "rows": []}
    rounds, samples = options.rounds, options.samples
    for row in chain(measure.convolutions(rounds, samples), measure.selections(rounds)):
        results["rows"].append(row)
        print(pages.line(row), flush=True)
        # After every row: a run that is cut off has lost nothing.
        target.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "results.md").write_text(pages.page(results), encoding="utf-8")
    pages.plot(results, options.out / "roofline.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
