"""Write docs/results/cpu.json from finished benchmarks, and the tables made from it.

    python tools/cpu_table.py collect FILES...   # what pytest --benchmark-json wrote
    python tools/cpu_table.py write              # docs/results/cpu.md and the README's table

`collect` replaces the rows of the benchmark files that it is given and keeps those of others, so
that one file can be measured again. `write --check` changes nothing and exits with 1 if a table
differs from what it would write.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsekit.bench.figures import figures
from sparsekit.bench.pages import BEGIN, END, page, summary

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "results" / "cpu.md"
README = ROOT / "README.md"


def collect(paths: Sequence[Path], old: dict[str, Any]) -> dict[str, Any]:
    """Return the results with the rows of these files, and the old rows of all others."""
    files: dict[str, Any] = dict(old.get("files", {}))
    machine: dict[str, Any] = {}
    for path in paths:
        report = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = report["benchmarks"]
        if not benchmarks:
            continue
        own = report["machine_info"]["sparsekit"]
        if machine and own != machine:
            raise SystemExit(f"{path}: measured on another machine than the files before it")
        machine = own
        name = Path(benchmarks[0]["fullname"].split("::")[0]).name
        rows = [b["extra_info"]["row"] for b in benchmarks if "row" in b["extra_info"]]
        files[name] = {"measured": report["datetime"][:10], "rows": rows}
    machine = machine or old.get("machine", {})
    if old and machine != old["machine"] and set(files) & set(old["files"]):
        # Rows of two machines do not belong into one table.
        kept = {Path(path).stem for path in paths}
        files = {name: value for name, value in files.items() if _stem(name) in kept}
    rows = [row for name in sorted(files) for row in files[name]["rows"]]
    return {
        "machine": machine,
        "figures": [figure.as_json() for figure in figures(rows)],
        "files": {name: files[name] for name in sorted(files)},
    }


def _stem(name: str) -> str:
    return Path(name).stem.removeprefix("bench_cpu_")


def dump(results: dict[str, Any]) -> str:
    """Return the results as JSON with a line for each figure and each row."""

    def lines(values: Sequence[Any]) -> str:
        return "[\n" + ",\n".join("  " + json.dumps(value) for value in values) + "\n ]"

    files = ",\n".join(
        f"  {json.dumps(name)}: {{\n   "
        f'"measured": {json.dumps(value["measured"])},\n   "rows": {lines(value["rows"])}}}'
        for name, value in results["files"].items()
    )
    machine = json.dumps(results["machine"])
    figures_ = lines(results["figures"])
    return f'{{\n "machine": {machine},\n "figures": {figures_},\n "files": {{\n{files}\n }}\n}}\n'


def with_table(readme: str, results: dict[str, Any]) -> str:
    """Return the README with the table between its two marks replaced."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{summary(results)}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Collect or write; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("files", nargs="+", type=Path)
    writing = commands.add_parser("write")
    writing.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if options.command == "collect":
        RESULTS.write_text(dump(collect(options.files, old)), encoding="utf-8")
        return 0
    wanted = {PAGE: page(old), README: with_table(README.read_text(encoding="utf-8"), old)}
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from docs/results/cpu.json", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
