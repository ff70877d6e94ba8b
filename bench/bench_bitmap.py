"""Masks as bits: the compiled kernels beside NumPy, which is the reference backend.

Run with ``pytest bench/bench_bitmap.py``.
"""

from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from sparsekit.kernels import dispatch

SIZES = [1 << 16, 3_000_000, 30_000_000]
DENSITIES = [0.01, 0.05, 0.2, 0.5]


def _arguments(function: str, n: int, density: float) -> tuple[Any, ...]:
    random = np.random.default_rng(1)
    mask = random.random(n, np.float32) < density
    packed = np.packbits(mask, bitorder="little")
    values = random.integers(1, 2**32, n, np.uint32)
    by_function: dict[str, tuple[Any, ...]] = {
        "pack": (mask,),
        "unpack": (packed, n),
        "compact": (values, packed),
        "expand": (values[mask], packed, n),
    }
    return by_function[function]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("function", ["pack", "unpack", "compact", "expand"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bitmap(
    benchmark: BenchmarkFixture, function: str, n: int, density: float, backend: str
) -> None:
    arguments = _arguments(function, n, density)
    benchmark.group = f"{function} of {n:,} 4-byte entries, density {density:.0%}"
    benchmark.extra_info.update(
        entries=n,
        density=density,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        numpy=np.__version__,
    )
    run, check = (
        dispatch.resolve(f"bitmap_{function}", "cpu", name).implementation.load()
        for name in (backend, "reference")
    )
    result = benchmark.pedantic(  # type: ignore[no-untyped-call]
        run, args=arguments, rounds=5, iterations=1, warmup_rounds=2
    )
    assert np.array_equal(result, check(*arguments))
