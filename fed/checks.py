"""Checks of single settings."""

import math

from sparsekit.errors import UsageError


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` unless a setting is one of its named values."""
    if value not in allowed:
        raise UsageError(f"{name}: expected one of {', '.join(allowed)}; got {value!r}")


def in_range(
    name: str,
    value: float,
    low: float,
    high: float | None,
    *,
    open_below: bool = False,
    open_above: bool = False,
) -> None:
    """Raise `UsageError` unless a setting is a finite number in its range."""
    # An integer is always finite, and may be too large for isfinite.
    finite = isinstance(value, int) or math.isfinite(value)
    fine = finite and (value > low if open_below else value >= low)
    if fine and high is not None:
        fine = value < high if open_above else value <= high
    if not fine:
        left, right = "(" if open_below else "[", ")" if open_above or high is None else "]"
        bound = "infinity" if high is None else high
        raise UsageError(f"{name}: expected a number in {left}{low}, {bound}{right}, got {value}")
