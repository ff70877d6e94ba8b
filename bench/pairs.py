"""Timing several sides of one comparison in turns, so that a drifting machine drifts for all.

A round runs every side once; the ratio of two sides is taken within each round, and its median
and quartiles over the rounds are reported. Quick calls are repeated within a sample, which is then
their mean. Garbage is not collected during a sample.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OURS = "ours"
STOCK = "stock"
_LEAST_SAMPLE_SECONDS = 0.004
_MOST_CALLS = 200


def is_quick() -> bool:
    """Whether BENCH_QUICK asks for few rounds: to see that everything runs, not for figures."""
    return os.environ.get("BENCH_QUICK", "") not in ("", "0")


def rounds_of(wanted: int) -> int:
    """Rounds to run where `wanted` are for figures."""
    return min(wanted, 3) if is_quick() else wanted


@dataclass
class Case:
    """One comparison: what it is, and a call for each side."""

    labels: dict[str, Any]
    """What the row is about: ``what``, ``layer``, ``sparsity`` and so on."""
    sides: Mapping[str, Callable[[], object]]
    """The last one is ours."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Anything else that belongs into the results."""
    every: dict[str, int] = field(default_factory=dict)
    """Sides that run in every so many rounds only, because they take long."""


class Turns:
    """The rounds of one case."""

    def __init__(self, case: Case, warmup: int = 2) -> None:
        self.case = case
        self.calls: dict[str, int] = {}
        self.samples: dict[str, list[float | None]] = {name: [] for name in case.sides}
        self._round = 0
        gc.collect()
        for name, call in case.sides.items():
            for _ in range(1 if name in case.every or is_quick() else warmup):
                call()
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            calls = int(_LEAST_SAMPLE_SECONDS / max(seconds, 1e-7)) + 1
            self.calls[name] = min(calls, _MOST_CALLS)

    def _sample(self, name: str) -> None:
        if self._round % self.case.every.get(name, 1):
            self.samples[name].append(None)
            return
        call, calls = self.case.sides[name], self.calls[name]
        gc.disable()
        try:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            self.samples[name].append((time.perf_counter() - start) / calls)
        finally:
            gc.enable()

    def others(self) -> None:
        """Sample every side but the last: the first part of a round."""
        for name in list(self.case.sides)[:-1]:
            self._sample(name)

    def own(self) -> None:
        """Sample the last side, which ends the round."""
        self._sample(list(self.case.sides)[-1])
        self._round += 1

    def run(self, rounds: int) -> "Turns":
        """Run whole rounds."""
        for _ in range(rounds):
            self.others()
            self.own()
        return self

    def row(self) -> dict[str, Any]:
        """Return what the results file keeps, with every sample in milliseconds."""
        return {
            **self.case.labels,
            **({"notes": self.case.notes} if self.case.notes else {}),
            "threads": torch.get_num_threads(),
            "calls_per_sample": self.calls,
            "milliseconds": {
                name: [None if s is None else _digits(1e3 * s) for s in values]
                for name, values in self.samples.items()
            },
        }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def quartiles(values: Sequence[float | None]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of what is not None."""
    known = sorted(v for v in values if v is not None)
    if len(known) == 1:
        return known[0], known[0], known[0]
    low, middle, high = statistics.quantiles(known, n=4, method="inclusive")
    return low, middle, high


def ratios(row: Mapping[str, Any], side: str, over: str = OURS) -> list[float | None]:
    """Time of `side` over that of `over` in every round; None where one of them did not run."""
    milliseconds = row["milliseconds"]
    return [
        None if a is None or b is None else a / b
        for a, b in zip(milliseconds[side], milliseconds[over], strict=True)
    ]


def ratio(row: Mapping[str, Any], side: str, over: str = OURS) -> tuple[float, float, float]:
    """Quartiles of `ratios`."""
    return quartiles(ratios(row, side, over))
