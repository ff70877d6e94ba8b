"""The command line of a tool that collects a results file and writes a page from it."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run(
    description: str | None,
    name: str,
    collect: Callable[[Path], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    argv: Sequence[str] | None = None,
) -> int:
    """Collect docs/results/NAME.json, or write NAME.md from it; return the exit code."""
    results, target = (ROOT / "docs" / "results" / f"{name}.{kind}" for kind in ("json", "md"))
    parser = argparse.ArgumentParser(description=description)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("collect").add_argument("source", type=Path)
    commands.add_parser("write").add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.command == "collect":
        results.write_text(json.dumps(collect(options.source), indent=1, sort_keys=True) + "\n")
        return 0
    wanted = page(json.loads(results.read_text()))
    if target.exists() and target.read_text() == wanted:
        return 0
    if options.check:
        print(f"{target.relative_to(ROOT)} is stale: run {sys.argv[0]} write", file=sys.stderr)
        return 1
    target.write_text(wanted)
    return 0


def rewrite(
    description: str | None,
    target: Path,
    rewritten: Callable[[str], str],
    argv: Sequence[str] | None = None,
) -> int:
    """Write tables anew within a page, or say that they are stale; return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    page = target.read_text(encoding="utf-8")
    wanted = rewritten(page)
    if wanted == page:
        return 0
    if options.check:
        print(f"{target.relative_to(ROOT)} is stale: run {sys.argv[0]}", file=sys.stderr)
        return 1
    target.write_text(wanted, encoding="utf-8")
    return 0
