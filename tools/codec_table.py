"""Write docs/results/codec.json from a finished benchmark, and the page made from it.

    python tools/codec_table.py collect FILE   # what pytest --benchmark-json wrote
    python tools/codec_table.py write          # docs/results/codec.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from page_command import run

from sparsekit.bench.pages import number, table
from sparsekit.bench.pairs import quartiles, ratio

OURS, FAST, MEMCPY = "sparsekit", "sparsekit, fast", "memcpy"
Row = dict[str, Any]


def collect(path: Path) -> dict[str, Any]:
    """Return machine and rows of a benchmark."""
    report = json.loads(path.read_text(encoding="utf-8"))
    rows = [b["extra_info"]["row"] for b in report["benchmarks"] if "row" in b["extra_info"]]
    return {
        "machine": report["machine_info"]["sparsekit"],
        "measured": report["datetime"][:10],
        "rows": rows,
    }


def _select(rows: Sequence[Row], **labels: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in labels.items())]


def _of_memcpy(row: Row, side: str) -> float:
    return ratio(row, MEMCPY, side)[1]


def _gigabytes(row: Row, side: str) -> float:
    return float(row["notes"]["dense_bytes"] / quartiles(row["milliseconds"][side])[1] / 1e6)


def bars(rows: Sequence[Row]) -> Iterator[tuple[str, str, float, bool]]:
    """Every bar: what, the bar, the measured number, whether it holds."""
    for row in _select(rows, what="encode"):
        where = f"{row['state']}, {row['sparsity']:.0%}"
        notes, sizes = row["notes"], row["notes"]["bytes"]
        ours, others = sizes[OURS], {n: b for n, b in sizes.items() if n not in (OURS, FAST)}
        best = min(others, key=lambda name: others[name])
        if row["sparsity"] >= 0.5:
            share = notes["mask_bits"] / notes["mask_entropy"]
            yield f"masks in sum, {where}", "<= 1.035 of the entropy", share, share <= 1.035
            worst = notes["worst_large"]
            if worst is not None:
                yield f"worst large mask, {where}", "<= 1.035 of its entropy", worst, worst <= 1.035
            most = 0.85 if row["sparsity"] == 0.99 else 0.82
            share = 8 * ours / notes["bound_bits"]
            yield f"payload, {where}", f"<= {most} of the bound", share, share <= most
        times = notes["dense_bytes"] / ours
        wanted = {0.95: 20.0, 0.99: 85.0}.get(row["sparsity"])
        if wanted:
            yield f"payload, {where}", f">= {wanted:g}x under dense", times, times >= wanted
        over = ours / others[best]
        most = 1.0 if row["sparsity"] >= 0.8 else 1.01
        yield f"payload beside the best rival ({best}), {where}", f"<= {most}", over, over <= most
    for row in rows:
        where = f"{row['what']}, {row['state']}, {row['sparsity']:.0%}"
        if row["sparsity"] == 0.9:
            least = 0.10 if row["what"] == "encode" else 0.22
            found = _of_memcpy(row, OURS)
            yield f"balanced, {where}", f">= {least} of memcpy", found, found >= least
        if row["sparsity"] >= 0.5:
            found = _of_memcpy(row, FAST)
            yield f"fast, {where}", ">= 0.45 of memcpy", found, found >= 0.45


def _sizes(rows: Sequence[Row], state: str) -> str:
    chosen = _select(rows, what="encode", state=state)
    lines = []
    for name in chosen[0]["notes"]["bytes"]:
        cells = [name]
        for row in chosen:
            bits = 8 * row["notes"]["bytes"][name] / (row["notes"]["dense_bytes"] / 4)
            cells.append(number(bits))
        lines.append(cells)
    bound = ["entropy of the masks + 32 bits a kept value"]
    bound += [
        number(row["notes"]["bound_bits"] / (row["notes"]["dense_bytes"] / 4)) for row in chosen
    ]
    header = ["bits a weight", *(f"{1 - r['notes']['kept'] * 4 / r['notes']['dense_bytes']:.1%}"
                                 for r in chosen)]  # fmt: skip
    return table(header, [*lines, bound])


def _speeds(rows: Sequence[Row], state: str) -> str:
    lines = []
    wanted = (0.5, 0.9, 0.99)
    for name in [MEMCPY, *_select(rows, what="encode", state=state)[0]["notes"]["bytes"]]:
        cells = [name]
        for sparsity in wanted:
            for what in ("encode", "decode"):
                (row,) = _select(rows, what=what, state=state, sparsity=sparsity)
                cells.append(number(_gigabytes(row, name)))
        lines.append(cells)
    header = [
        "GB/s of dense bytes",
        *(f"{what} {s:.0%}" for s in wanted for what in ("enc", "dec")),
    ]
    return table(header, lines)


def page(results: dict[str, Any]) -> str:
    """Return docs/results/codec.md."""
    rows, machine = results["rows"], results["machine"]
    found = list(bars(rows))
    holding = sum(holds for *_, holds in found)
    missing = {k: v for row in rows for k, v in row["notes"]["missing"].items()}
    parts = [
        "# The codec beside others",
        "",
        "Written by `make bench-codec` from docs/results/codec.json; not by hand.",
        "",
        f"Measured on one thread ({machine['processor']}, {machine['instructions']}), torch "
        f"{machine['torch']}, NumPy {machine['numpy']}, {results['measured']}. The network has 3 "
        "million weights, 11.8 MB; sides take turns, medians. *Synthetic*: heavy-tailed random "
        "weights, pruned by global magnitude. *Trained*: the rounds of the run in "
        "bench/trained.toml. Rivals by hand (packbits, CSR, pyroaring) carry no names and shapes.",
        "",
        *(f"Not installed here: {name} ({why})." for name, why in missing.items()),
        f"{holding} of {len(found)} bars hold.",
        "",
        table(
            ["bar", "wanted", "found", "holds"],
            [[w, b, number(v), "yes" if h else "**no**"] for w, b, v, h in found],
        ),
        "",
    ]
    for state in dict.fromkeys(row["state"] for row in rows):
        parts += [f"## {state.capitalize()} weights", "", _sizes(rows, state), ""]
        parts += [_speeds(rows, state), ""]
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(run(__doc__, "codec", collect, page))
