"""Rows of measurements, one per time, as `fit_selector.py` merges and writes them."""

import itertools
import json
from typing import Any


def undisturbed(passes: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each time that was measured in several passes, the shortest."""
    best: dict[str, dict[str, Any]] = {}
    for row in itertools.chain.from_iterable(passes):
        key = json.dumps([row[k] for k in ("layer", "gradients", "threads", "side", "density")])
        if key not in best or row["seconds"] < best[key]["seconds"]:
            best[key] = row
    return list(best.values())


def packed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what was measured side by side into one record."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        common = {key: row[key] for key in ("layer", "gradients", "threads")}
        group = groups.setdefault(json.dumps(common), common | {"seconds": {}, "spread": {}})
        side = row["side"] if row["density"] is None else f"{row['side']} {row['density']}"
        group["seconds"][side] = row["seconds"]
        group["spread"][side] = row["spread"]
    return list(groups.values())


def unpacked(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Undo `packed`."""
    rows = []
    for group in groups:
        for side, seconds in group["seconds"].items():
            kind, _, density = side.partition(" ")
            common = {key: group[key] for key in ("layer", "gradients", "threads")}
            rows.append(
                common
                | {"side": kind, "density": float(density) if density else None}
                | {"seconds": seconds, "spread": group["spread"][side]}
            )
    return rows
