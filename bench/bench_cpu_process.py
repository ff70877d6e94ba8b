"""What a fresh process pays: memory of a step, compilation at first use, loading after that.

Run with ``pytest bench/bench_cpu_process.py``. Every figure comes from a child process
(`sparsekit.bench.probe`), ours and stock in turns.
"""

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekit.bench import probe
from sparsekit.bench.pairs import is_quick, rounds_of

MEMORY_STEPS = 3


@pytest.mark.parametrize("sparsity", [0.0, 0.95])
def test_memory(benchmark: BenchmarkFixture, sparsity: float) -> None:
    probe.run("ours", sparsity, 1)  # compiles what is not on the disk yet
    runs: dict[str, list[dict[str, object]]] = {"stock": [], "ours": []}

    def child(side: str) -> None:
        runs[side].append(probe.run(side, sparsity, MEMORY_STEPS))

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        child,
        args=("ours",),
        setup=lambda: child("stock"),
        rounds=1 if is_quick() else 3,
        iterations=1,
    )
    benchmark.extra_info["row"] = {
        "what": "memory of a step",
        "sparsity": sparsity,
        "masks": "uniform random",
        "steps": MEMORY_STEPS,
        "processes": runs,
    }


def test_first_step(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    runs: dict[str, list[dict[str, object]]] = {"compiles": [], "loads": []}

    def child(kind: str, folder: Path) -> None:
        runs[kind].append(probe.run("ours", 0.95, 3, folder))

    folders = [tmp_path / f"fresh {number}" for number in range(1 if is_quick() else 2)]
    for folder in folders:
        folder.mkdir()
        child("compiles", folder)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        child, args=("loads", folders[0]), rounds=rounds_of(5), iterations=1
    )
    benchmark.extra_info["row"] = {"what": "first step", "sparsity": 0.95, "processes": runs}
