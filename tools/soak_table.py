"""Write docs/results/soak.json from the accounts of `make soak`, and its page.

    python tools/soak_table.py collect FOLDER   # holds PART/PART.json for each part
    python tools/soak_table.py write            # docs/results/soak.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from page_command import run

from sparsekit.fed.result import describe_machine

PARTS = ("engine", "sites", "state", "rounds", "kills")
RUNS = {"sites": "many sites", "state": "a large model", "rounds": "many rounds"}
MOST_ROUND_SECONDS = 0.05
MOST_FRAMING = 0.001
MOST_NOTICE_SECONDS = 1.0
MOST_GROWTH = 0.02


def collect(folder: Path) -> dict[str, Any]:
    """Return the accounts of all parts that were played."""
    parts = {}
    for part in PARTS:
        path = folder / part / f"{part}.json"
        if path.exists():
            parts[part] = json.loads(path.read_text(encoding="utf-8"))
    return {"machine": describe_machine(), "parts": parts}


def _growth(rounds: dict[str, Any], key: str) -> float:
    return float(rounds["late"][key] / rounds["early"][key] - 1)


def figures(parts: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield what was measured, its value, what was wanted, and whether that holds."""
    connections = [parts[name]["connections"] for name in RUNS if name in parts]
    if engine := parts.get("engine"):
        large, small = engine["megabyte"], engine["hundred_kilobytes"]
        connections += [large["connections"], small["connections"]]
        middle = large["seconds"]["median"]
        low, high = large["seconds"]["quartiles"]
        yield (
            f"a round of {engine['sites']} sites that only echo, 1 MB each way, median [quartiles]",
            f"{1000 * middle:.1f} ms [{1000 * low:.1f}, {1000 * high:.1f}]",
            "at most 50 ms",
            middle <= MOST_ROUND_SECONDS,
        )
        yield (
            f"framing at {small['payload_bytes'] // 1000} kB payloads",
            f"{small['framing_bytes']} B, {small['framing_share']:.3%}",
            "less than 0.1 %",
            small["framing_share"] < MOST_FRAMING,
        )
        killed = engine["killed_site"]
        yield (
            f"a killed site until its round ended, {killed['kills']} times, median / most",
            f"{killed['seconds']['median']:.3f} / {killed['seconds']['most']:.3f} s",
            "less than 1 s",
            killed["seconds"]["most"] < MOST_NOTICE_SECONDS,
        )
    in_order = sum(one["in_order"] for one in connections)
    equal = sum(one["equal"] for one in connections)
    yield (
        "connections closed in order whose bytes equal the operating system's",
        f"{equal} of {in_order}",
        "all",
        equal == in_order > 0,
    )
    if kills := parts.get("kills"):
        yield (
            f"random kills of the server in one run of {kills['rounds']} rounds, resumed",
            f"{kills['kills']}, the end identical: {'yes' if kills['identical'] else 'no'}",
            f"{kills['kills_wanted']}, identical",
            kills["identical"],
        )
    if rounds := parts.get("rounds"):
        late = rounds["late"]
        same = all(
            late[key] == rounds["early"][key]
            for key in ("files", "sockets", "threads", "processes", "most_sockets")
        )
        growth = max(_growth(rounds, key) for key in ("server_bytes", "sites_bytes"))
        yield (
            f"memory late in {rounds['rounds']} rounds, against early ones",
            f"server {_growth(rounds, 'server_bytes'):+.2%}, "
            f"sites {_growth(rounds, 'sites_bytes'):+.2%}",
            "at most 2 % more",
            growth <= MOST_GROWTH,
        )
        yield (
            "files, sockets, threads, processes late in them",
            f"{late['files']}, {late['sockets']}, {late['threads']}, {late['processes']}",
            "as many as early",
            same,
        )
    left = {
        name: parts[name]["processes_left"]
        for name in ("sites", "state", "rounds")
        if name in parts
    }
    yield (
        "processes left after the runs",
        str(sum(left.values())),
        "0",
        not any(left.values()),
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _runs(parts: dict[str, Any]) -> Iterator[str]:
    yield (
        "| run | sites | rounds | weights | until the first round | rounds | server, peak "
        "| largest site, peak | all together, peak |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for part, name in RUNS.items():
        if part not in parts:
            yield f"| {name} | not played |"
            continue
        one = parts[part]
        yield (
            f"| {name} | {one['sites']} | {one['rounds']} | {_megabytes(one['state_bytes'])} "
            f"| {one['seconds_until_the_first_round']:.0f} s "
            f"| {one['seconds_of_the_rounds']:.0f} s "
            f"| {_megabytes(one['server_peak_bytes'])} | {_megabytes(one['site_peak_bytes'])} "
            f"| {_megabytes(one['most_bytes_together'])} |"
        )


def page(results: dict[str, Any]) -> str:
    """Return docs/results/soak.md."""
    parts, machine = results["parts"], results["machine"]
    lines = [
        "# Under load, and killed again and again",
        "",
        "Written by `make soak` from docs/results/soak.json; not by hand.",
        "",
        "| what | measured | wanted | holds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {what} | {value} | {wanted} | {'yes' if holds else '**no**'} |"
        for what, value, wanted, holds in figures(parts)
    ]
    missing = [part for part in PARTS if part not in parts]
    if missing:
        lines += ["", f"Not played: {', '.join(missing)}."]
    lines += ["", *_runs(parts), ""]
    lines.append(
        "Engine `processes`; synthetic people on the 4 mm grid. A peak of one process counts the "
        "libraries that it shares with others in full, that of all together counts them once. "
        "The large model is trained dense, one step a site, one site at a time."
    )
    if state := parts.get("state"):
        times = [state[f"{who}_peak_bytes"] / state["state_bytes"] for who in ("server", "site")]
        lines[-1] += (
            f" Its peaks are {times[0]:.0f} times (server) and {times[1]:.0f} times (site) the "
            "bytes of its weights."
        )
    if kills := parts.get("kills"):
        when = ", ".join(f"{count} {name}" for name, count in kills["kills_when"].items())
        lines += [
            "",
            f"Kills (SIGKILL, moments drawn from seed {kills['seed']}): {when}. After each the "
            f"sites were gone within {kills['most_seconds_until_sites_were_gone']:.1f} s. Weights, "
            "accuracy, FLOPs and every row of the ledger were compared with those of a run that "
            "was left alone, on the in-process engine; whole models instead of differences in the "
            "downloads after a resumption are the one thing that may differ.",
        ]
    lines += [
        "",
        f"Measured on {machine['cores']} cores ({machine['processor']}), torch {machine['torch']}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, "soak", collect, page))
