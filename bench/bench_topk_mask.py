"""Selecting the weights to keep, beside torch's own global magnitude pruning.

Run with ``pytest bench/bench_topk_mask.py``. Both sides get the same tensors, made outside the
timed call; torch's baseline modifies its modules, so it gets fresh ones for every round.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit.models import BrainAgeCNN
from sparsekit.ops import topk_mask
from sparsekit.prune import prunable_parameters

SPARSITIES = [0.8, 0.95]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The 2,948,000 convolution weights of the default network."""
    model = BrainAgeCNN(generator=torch.Generator().manual_seed(1))
    return {name: p.detach() for name, p in prunable_parameters(model).items()}


def _describe(benchmark: BenchmarkFixture, weights: dict[str, Tensor], sparsity: float) -> int:
    total = sum(w.numel() for w in weights.values())
    keep = total - int(sparsity * total)
    benchmark.group = f"keep {1 - sparsity:.0%} of {total:,}"
    benchmark.extra_info.update(
        weights=total,
        keep=keep,
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    return keep


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_topk_mask(
    benchmark: BenchmarkFixture, weights: dict[str, Tensor], sparsity: float
) -> None:
    keep = _describe(benchmark, weights, sparsity)
    masks = benchmark.pedantic(  # type: ignore[no-untyped-call]
        topk_mask, args=(weights, keep), rounds=10, iterations=1, warmup_rounds=2
    )
    assert sum(int(m.sum()) for m in masks.values()) == keep


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_torch_global_unstructured(
    benchmark: BenchmarkFixture, weights: dict[str, Tensor], sparsity: float
) -> None:
    keep = _describe(benchmark, weights, sparsity)
    pruned: list[tuple[nn.Module, str]] = []

    def fresh_modules() -> None:
        pruned.clear()
        for weight in weights.values():
            module = nn.Module()
            module.weight = nn.Parameter(weight.clone())
            pruned.append((module, "weight"))

    def prune() -> None:
        torch_prune.global_unstructured(
            pruned,
            torch_prune.L1Unstructured,
            amount=sum(w.numel() for w in weights.values()) - keep,
        )

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        prune, setup=fresh_modules, rounds=5, iterations=1, warmup_rounds=1
    )
    ours = topk_mask(weights, keep)
    theirs = [module.get_buffer("weight_mask").bool() for module, _ in pruned]
    # Random weights have few ties, but torch breaks them otherwise.
    differing = sum(int((a != b).sum()) for a, b in zip(ours.values(), theirs, strict=True))
    assert sum(int(m.sum()) for m in theirs) == keep
    assert differing <= 20
