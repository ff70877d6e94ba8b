"""All that can be shown of the Triton kernels without a GPU: values, bounds, races, machine code.

1. tests/triton in Triton's interpreter, and in ttsem, which executes what Triton compiles to and
   stops at accesses out of bounds, races and reads of unwritten memory. Every test has to pass in
   one of the two at least, and no launch may be too large for ttsem to look for races.
2. Mutants: every listed mistake is noticed by the check that is named for it.
3. Machine code: kernels compiled for GPUs of NVIDIA and AMD spill nothing, use matrix units and
   16-byte asynchronous copies where claimed, and stay within tools/kernel_budget.json.

`--whole` compiles all tile sizes and writes docs/results/kernels.json; `--budget` writes the
budget.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import kernel_builds
import kernel_layers
import kernel_mutants
import triton

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ROOT / "tools" / "kernel_budget.json"
RESULTS = ROOT / "docs" / "results" / "kernels.json"
_UNCHECKED = re.compile(r"ttsem: (\d+) launch\(es\) too large")


def values(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the tests both ways; what passed, and what is wrong."""
    wrong: list[str] = []
    passed: dict[str, set[str]] = {}
    figures: dict[str, Any] = {}
    for runs in ("interpreter", "ttsem"):
        report = folder / f"{runs}.xml"
        report.unlink(missing_ok=True)
        line, environment = kernel_mutants.command(
            runs, "tests/triton", "-q", f"--junitxml={report}"
        )
        print(f"tests/triton in {runs}:", flush=True)
        began, output = time.monotonic(), []
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for text in process.stdout:
            print(f"  {text}", end="", flush=True)
            output.append(text)
        if process.wait():
            wrong.append(f"tests/triton in {runs} ended with {process.returncode}")
        unchecked = _UNCHECKED.search("".join(output))
        if unchecked:
            wrong.append(f"{unchecked[1]} launches were too large for ttsem to look for races")
        ran = _outcomes(report) if report.exists() else {}
        for test, outcome in ran.items():
            passed.setdefault(test, set())
            if outcome == "passed":
                passed[test].add(runs)
        figures[runs] = {
            "passed": sum(outcome == "passed" for outcome in ran.values()),
            "skipped": sum(outcome == "skipped" for outcome in ran.values()),
            "seconds": round(time.monotonic() - began, 1),
        }
    figures["both"] = sum(len(ways) == 2 for ways in passed.values())
    nowhere = sorted(test for test, ways in passed.items() if not ways)
    wrong += [f"{test} passed neither in the interpreter nor in ttsem" for test in nowhere]
    return figures, wrong


def _outcomes(report: Path) -> dict[str, str]:
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = (
            "skipped" if "skipped" in kinds else "failed" if kinds & {"failure", "error"} else ""
        )
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome or "passed"
    return found


def machine_code(*, whole: bool, budget: dict[str, Any] | None) -> tuple[list[Any], list[str]]:
    """Compile and look; a row per build and target, and what is wrong."""
    wrong, rows = [], []
    for target in kernel_builds.TARGETS:
        print(f"compiling for {target}:", end=" ", flush=True)
        for build in kernel_builds.builds(target, whole=whole):
            figures = kernel_builds.read(build, target)
            rows.append(figures)
            name = f"{target}: {figures.name}"
            if figures.spilled:
                wrong.append(f"{name} spills or uses a stack: {figures.spilled}")
            if lacks := figures.lacks(build):
                wrong.append(f"{name} {lacks}")
            if budget is not None:
                own = budget.get(target, {}).get(figures.name)
                if own is None:
                    wrong.append(f"{name} is not in {BUDGET.name}; make it anew with --budget")
                elif figures.registers > own[0] or figures.shared > own[1]:
                    wrong.append(
                        f"{name} takes {figures.registers} registers and {figures.shared} bytes of "
                        f"shared memory, and {BUDGET.name} allows {own[0]} and {own[1]}"
                    )
        print(f"{sum(row.target == target for row in rows)} builds", flush=True)
    return rows, wrong


def main() -> int:
    """Do what the command line says; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--whole", action="store_true", help="all tile sizes; write the results")
    parser.add_argument("--budget", action="store_true", help="only compile, and write the budget")
    parser.add_argument(
        "--code", type=Path, help="only compile, all sizes; what is wrong goes to this file"
    )
    options = parser.parse_args()
    if options.code or options.budget:
        rows, wrong = machine_code(whole=True, budget=None)
        if options.budget:
            kernel_builds.write_budget(rows, BUDGET)
        print(*wrong, sep="\n")
        if options.code:
            # Of another Triton than the tested one: what is wrong there is reported, no failure.
            figures = {"triton": triton.__version__, "builds": len(rows), "wrong": wrong}
            options.code.write_text(json.dumps(figures, indent=1) + "\n")
            return 0
        return bool(wrong)

    folder = ROOT / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    tests, wrong = values(folder)
    print("mutants:", flush=True)
    outcomes = kernel_mutants.run()
    wrong += [f"mutant not noticed: {outcome.name}" for outcome in outcomes if not outcome.caught]
    budget, newest = json.loads(BUDGET.read_text()), folder / "newest.json"
    rows, found = machine_code(whole=options.whole, budget=budget)
    wrong += found
    if options.whole:
        results = {
            "triton": triton.__version__,
            "tests": tests,
            "mutants": kernel_mutants.as_rows(outcomes),
            "code": [asdict(row) for row in rows],
            "layers": [asdict(layer) for layer in kernel_layers.layers()],
            "newest": json.loads(newest.read_text()) if newest.exists() else None,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{tests}\n{caught} of {len(outcomes)} mutants noticed, {len(rows)} builds")
    print(*(f"WRONG: {text}" for text in wrong), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
