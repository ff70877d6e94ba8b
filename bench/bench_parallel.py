"""What it costs to run a kernel that does nothing, beside a small torch op.

Run with ``pytest bench/bench_parallel.py``.
"""

from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import Kernel, kernel

JOB = np.dtype([("next", np.int64), ("parts", np.int64)], align=True)
CALLS = 1000


@pytest.fixture(scope="module")
def empty() -> Kernel:
    take = parallel.take

    @kernel(JOB)
    def take_all(job: Any) -> None:
        parts = job.parts
        while take(job) < parts:
            pass

    return take_all


def _describe(benchmark: BenchmarkFixture, threads: int) -> None:
    benchmark.group = "one call"
    benchmark.extra_info.update(device="cpu", threads=threads, torch=torch.__version__)


@pytest.mark.parametrize("way", ["here", "torch's threads", "python threads"])
def test_run(
    benchmark: BenchmarkFixture, empty: Kernel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = 1 if way == "here" else torch.get_num_threads()
    if way == "python threads":
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    job = empty.job(parts=threads)
    _describe(benchmark, threads)
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        parallel.run,
        args=(empty.address, job, threads),
        rounds=20,
        iterations=CALLS,
        warmup_rounds=2,
    )
    assert job["next"] >= threads


def test_torch_op(benchmark: BenchmarkFixture) -> None:
    # The smallest size that torch spreads over threads.
    x = torch.zeros(1 << 16)
    _describe(benchmark, torch.get_num_threads())
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        x.add_, args=(1.0,), rounds=20, iterations=CALLS, warmup_rounds=2
    )
    assert x[0] == x[-1] != 0
