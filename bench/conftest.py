"""Fixtures of the benchmarks that compare sides in turns."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekit.bench import machine
from sparsekit.bench.pairs import Case, Turns, quartiles, ratios, rounds_of

Compare = Callable[..., dict[str, Any]]


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Leave in the results file what the tables say about the machine."""
    del config
    machine_info["sparsekit"] = machine.describe()


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    """Run a case's sides in turns and keep all samples.

    pytest-benchmark sees the last side, ours; the others run in its setup, once before each of
    its rounds. Where a sample is several calls, so is pytest-benchmark's.
    """

    def run(case: Case, rounds: int) -> dict[str, Any]:
        turns = Turns(case)
        benchmark.group = ", ".join(str(value) for value in case.labels.values())
        benchmark.pedantic(  # type: ignore[no-untyped-call]
            turns.own, setup=turns.others, rounds=rounds_of(rounds), iterations=1
        )
        row = turns.row()
        over = {
            side: round(quartiles(ratios(row, side, list(case.sides)[-1]))[1], 3)
            for side in list(case.sides)[:-1]
        }
        benchmark.extra_info.update(row=row, times_ours=over)
        return row

    return run
