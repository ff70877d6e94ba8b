"""What the history says of a round: errors, sparsity, bytes, how far the weights moved."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sparsekit.codec import inspect
from sparsekit.fed.algorithm import Order, ServerState, is_prunable
from sparsekit.fed.ledger import LedgerRow
from sparsekit.fed.merging import pieces
from sparsekit.fed.plan import Report
from sparsekit.types import Masks, State


def layer_sparsity(masks: Masks | None) -> dict[str, float]:
    """Return the fraction pruned of every tensor that has a mask."""
    return {name: 1.0 - float(mask.double().mean()) for name, mask in (masks or {}).items()}


def sum_bytes(rows: Iterable[LedgerRow], direction: str, level: str) -> int | None:
    """Add up one level of bytes in one direction; None if any of them is not known."""
    counts = [getattr(row, level) for row in rows if row.direction == direction]
    return None if None in counts else sum(counts)


def evaluation(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Combine the sites' errors on their held-out people, in years."""
    sites: dict[str, float | None] = {}
    counts: dict[str, int] = {}
    total = 0.0
    people = 0
    diverged = False
    for site in sorted(reports):
        report = reports[site]
        if report.test_abs_error_sum is None:
            diverged = True
            sites[site] = None
        elif report.test_n:
            sites[site] = report.test_abs_error_sum / report.test_n
            counts[site] = report.test_n
            total += report.test_abs_error_sum
            people += report.test_n
    mae = total / people if people and not diverged else None
    return {
        "test_mae": mae,
        "test_n": people,
        "site_mae": sites,
        "site_n": counts,
        "train_n": sum(report.n_train for report in reports.values()),
    }


def weight_change(before: State, server: ServerState) -> float:
    """Return the norm of a round's change over that of the weights, of prunable kept ones."""
    changed = kept = 0.0
    for name, after in server.weights.items():
        if not is_prunable(name, after):
            continue
        masks = server.masks or {}
        old, new = before[name].reshape(-1), after.reshape(-1)
        mask = masks[name].reshape(-1) if name in masks else None
        for piece in pieces(len(old)):
            was = old[piece].double()
            if mask is not None:
                was = was * mask[piece]
            changed += float((new[piece].double() - was).square().sum())
            kept += float(was.square().sum())
    return math.sqrt(changed / kept) if kept else 0.0


def mask_bits_per_weight(order: Order) -> float:
    """Return the bits that the masks of a round's download take, over all weights."""
    info = inspect(order.payload)
    return 8 * info.mask_bytes / info.n


def history_entry(
    server: ServerState, number: int, rows: list[LedgerRow], seconds: float
) -> dict[str, Any]:
    """Return the history's line for the model after round ``number``."""
    pruned = sum(int((~mask).sum()) for mask in (server.masks or {}).values())
    prunable = sum(t.numel() for n, t in server.weights.items() if is_prunable(n, t))
    every = sum(tensor.numel() for tensor in server.weights.values())
    in_prunable = sum(
        int((~mask).sum())
        for name, mask in (server.masks or {}).items()
        if is_prunable(name, server.weights[name])
    )
    return {
        "round": number,
        "sparsity_prunable": in_prunable / prunable,
        "sparsity_all": pruned / every,
        "layer_sparsity": layer_sparsity(server.masks),
        "payload_down": sum_bytes(rows, "down", "payload_bytes"),
        "payload_up": sum_bytes(rows, "up", "payload_bytes"),
        "transport_down": sum_bytes(rows, "down", "transport_bytes"),
        "transport_up": sum_bytes(rows, "up", "transport_bytes"),
        "flops_counted": sum(row.flops_counted for row in rows),
        "flops_executed": sum(row.flops_executed for row in rows),
        "seconds": seconds,
    }
