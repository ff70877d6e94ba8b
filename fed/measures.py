"""What the history says of a round: errors, sparsity, bytes, how far the weights moved."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sparsekit.codec import inspect
from sparsekit.fed.algorithm import Order, ServerState, is_prunable
from sparsekit.fed.ledger import LedgerRow
from sparsekit.fed.rounds import Answer
from sparsekit.types import Masks, State


def layer_sparsity(masks: Masks | None) -> dict[str, float]:
    """Return the fraction pruned of every tensor that has a mask."""
    return {name: 1.0 - float(mask.double().mean()) for name, mask in (masks or {}).items()}


def sum_bytes(rows: Iterable[LedgerRow], direction: str, level: str) -> int | None:
    """Add up one level of bytes in one direction; None if any of them is not known."""
    counts = [getattr(row, level) for row in rows if row.direction == direction]
    return None if None in counts else sum(counts)


def evaluation(answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Combine the sites' errors on their held-out people, in years."""
    sites: dict[str, float | None] = {}
    counts: dict[str, int] = {}
    total = 0.0
    people = 0
    diverged = False
    for site in sorted(answers):
        report = answers[site].report
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
        "train_n": sum(answer.report.n_train for answer in answers.values()),
    }


def weight_change(before: State, server: ServerState) -> float:
    """Return the norm of a round's change over that of the weights, of prunable kept ones."""
    changed = kept = 0.0
    for name, after in server.weights.items():
        if not is_prunable(name, after):
            continue
        old = before[name].double()
        if server.masks is not None and name in server.masks:
            old = old * server.masks[name]
        changed += float((after.double() - old).square().sum())
        kept += float(old.square().sum())
    return math.sqrt(changed / kept) if kept else 0.0


def mask_bits_per_weight(order: Order) -> float:
    """Return the bits that the masks of a round's download take, over all weights."""
    info = inspect(order.payload)
    return 8 * info.mask_bytes / info.n
