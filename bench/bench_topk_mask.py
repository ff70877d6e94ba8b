"""Selecting the weights to keep, beside what else selects: NumPy, torch.topk, torch's own pruning.

Run with ``pytest bench/bench_topk_mask.py``. All sides get the same values, made outside the timed
call, and give masks; ``read`` is one sum over the weights, below which nothing can select. torch's
pruning modifies its modules, so it gets fresh ones for every round. The quick ones are warmed by 30
calls: until the allocator keeps their memory, every page of a new mask costs a page fault.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit.ops import topk_mask

SIZES = [3_000_000, 30_000_000]
SPARSITIES = [0.8, 0.9, 0.95, 0.99]
SHARES = [0.02, 0.08, 0.3, 0.6]

parametrize = pytest.mark.parametrize(
    ("size", "sparsity"), [(n, s) for n in SIZES for s in SPARSITIES]
)


@pytest.fixture(scope="module")
def weights() -> Callable[[int], list[Tensor]]:
    """Normal weights of a size, in four tensors as different in size as those of a network."""
    made: dict[int, list[Tensor]] = {}

    def make(size: int) -> list[Tensor]:
        if size not in made:
            made.clear()
            values = torch.randn(size, generator=torch.Generator().manual_seed(1))
            parts = values.split([round(share * size) for share in SHARES])
            made[size] = [part.clone() for part in parts]
        return made[size]

    return make


def _run(
    benchmark: BenchmarkFixture,
    size: int,
    sparsity: float,
    call: Callable[..., Any],
    *args: Any,
    rounds: int = 15,
    warmup_rounds: int = 30,
    **options: Any,
) -> Any:
    benchmark.group = f"{size:,} weights, sparsity {sparsity:.0%}"
    benchmark.extra_info.update(
        weights=size,
        sparsity=sparsity,
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        numpy=np.__version__,
    )
    if "setup" not in options:
        options["args"] = args
    return benchmark.pedantic(  # type: ignore[no-untyped-call]
        call, rounds=rounds, iterations=1, warmup_rounds=warmup_rounds, **options
    )


def _keep(size: int, sparsity: float) -> int:
    return size - int(sparsity * size)


@parametrize
def test_topk_mask(
    benchmark: BenchmarkFixture,
    weights: Callable[[int], list[Tensor]],
    size: int,
    sparsity: float,
) -> None:
    masks = _run(benchmark, size, sparsity, topk_mask, weights(size), _keep(size, sparsity))
    assert sum(int(m.sum()) for m in masks) == _keep(size, sparsity)


@parametrize
def test_read(
    benchmark: BenchmarkFixture,
    weights: Callable[[int], list[Tensor]],
    size: int,
    sparsity: float,
) -> None:
    values = weights(size)
    _run(benchmark, size, sparsity, lambda: [v.sum() for v in values])


@parametrize
def test_numpy_partition(
    benchmark: BenchmarkFixture,
    weights: Callable[[int], list[Tensor]],
    size: int,
    sparsity: float,
) -> None:
    # In one array already: what NumPy would need first is not counted.
    values = torch.cat(weights(size)).numpy()
    rank = size - _keep(size, sparsity)

    def select() -> Any:
        magnitudes = np.abs(values)
        return magnitudes >= np.partition(magnitudes, rank)[rank]

    mask = _run(benchmark, size, sparsity, select)
    # Ties are few here, but NumPy keeps all of them.
    assert 0 <= np.count_nonzero(mask) - _keep(size, sparsity) <= 20


@parametrize
def test_torch_topk(
    benchmark: BenchmarkFixture,
    weights: Callable[[int], list[Tensor]],
    size: int,
    sparsity: float,
) -> None:
    values = torch.cat(weights(size))

    def select() -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[values.abs().topk(_keep(size, sparsity), sorted=False).indices] = True
        return mask

    mask = _run(benchmark, size, sparsity, select, rounds=3, warmup_rounds=1)
    assert int(mask.sum()) == _keep(size, sparsity)


@parametrize
def test_torch_global_unstructured(
    benchmark: BenchmarkFixture,
    weights: Callable[[int], list[Tensor]],
    size: int,
    sparsity: float,
) -> None:
    pruned: list[tuple[nn.Module, str]] = []

    def fresh_modules() -> None:
        pruned.clear()
        for weight in weights(size):
            module = nn.Module()
            module.weight = nn.Parameter(weight.clone())
            pruned.append((module, "weight"))

    def prune() -> None:
        torch_prune.global_unstructured(
            pruned, torch_prune.L1Unstructured, amount=size - _keep(size, sparsity)
        )

    _run(benchmark, size, sparsity, prune, setup=fresh_modules, rounds=2, warmup_rounds=1)
    ours = topk_mask(weights(size), _keep(size, sparsity))
    theirs = [module.get_buffer("weight_mask").bool() for module, _ in pruned]
    # Random weights have few ties, but torch breaks them otherwise.
    assert sum(int((a != b).sum()) for a, b in zip(ours, theirs, strict=True)) <= 20
