"""Write docs/results/bandwidth.json from a measurement over a slow link, and its page.

    python tools/bandwidth_table.py collect MEASURED.json   # of tools/measure_bandwidth.py
    python tools/bandwidth_table.py write                   # docs/results/bandwidth.md

`write --check` changes nothing and exits with 1 if the page differs from what it would write.
"""

import json
import sys
from pathlib import Path
from typing import Any

from page_command import run

BAR = 0.15


def collect(source: Path) -> dict[str, Any]:
    """Return what was measured."""
    found: dict[str, Any] = json.loads(source.read_text())
    return found


def _rows(pair: dict[str, Any]) -> list[str]:
    dense, sparse = pair["dense"], pair["sparse"]
    byte_ratio = dense["payload_bytes"] / sparse["payload_bytes"]
    time_ratio = dense["seconds"] / sparse["seconds"]
    return [
        "| | dense | sparse | dense / sparse |",
        "|---|---:|---:|---:|",
        f"| payload of a round, both ways (MB) | {dense['payload_bytes'] / 1e6:.2f} "
        f"| {sparse['payload_bytes'] / 1e6:.2f} | {byte_ratio:.2f} |",
        f"| time of a round (s) | {dense['seconds']:.2f} | {sparse['seconds']:.2f} "
        f"| {time_ratio:.2f} |",
        f"| ratio of times over ratio of payloads | | | {time_ratio / byte_ratio:.3f} |",
    ]


def page(results: dict[str, Any]) -> str:
    """Return docs/results/bandwidth.md."""
    machine = results["machine"]
    spread = {
        kind: (min(times), max(times))
        for kind in ("dense", "sparse")
        for times in [results["echo"][kind]["seconds_of_rounds"]]
    }
    lines = [
        "# Rounds over a slow link",
        "",
        "Written by `make bandwidth` from docs/results/bandwidth.json; not by hand.",
        "",
        f"The `processes` engine in a network namespace of its own, whose loopback carries "
        f"{results['mbit']} Mbit/s in all (`tc tbf`, packets of 1500 bytes): server, sites and "
        f"both directions share it. `BrainAgeCNN` at width {results['width']:g}, lossless; sparse "
        f"means {results['sparsity']:.0%} pruned.",
        "",
        f"## The link alone: {results['sites']} sites that send back what they get",
        "",
        *_rows(results["echo"]),
        "",
        f"Means of {len(results['echo']['dense']['seconds_of_rounds'])} and "
        f"{len(results['echo']['sparse']['seconds_of_rounds'])} rounds in a row, from "
        f"{spread['dense'][0]:.2f} to {spread['dense'][1]:.2f} s and from "
        f"{spread['sparse'][0]:.3f} to {spread['sparse'][1]:.3f} s. Wanted: the ratio of times "
        f"within {BAR:.0%} of that of payloads; a test asserts it at width 0.5.",
    ]
    if "runs" in results:
        lines += [
            "",
            f"## Whole runs of {results['runs']['dense']['sites']} sites, training included",
            "",
            *_rows(results["runs"]),
            "",
            "The last of four rounds of `fedavg` and of `fedsparsify-global`, two optimizer steps "
            "a site at 4 mm. What does not travel, training, evaluation and coding, takes its "
            "time in both, so that times fall less than bytes.",
        ]
    lines += ["", f"Measured on {machine['cores']} cores ({machine['processor']}), torch "
              f"{machine['torch']}, Python {machine['python']}.", ""]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(__doc__, "bandwidth", collect, page))
