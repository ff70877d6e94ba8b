"""Encode and decode a pruned BrainAgeCNN on one thread, beside what people use otherwise.

``make bench-codec`` runs it and writes docs/results/codec.*. One state is the paper's network with
heavy-tailed random weights (Student t, 5 degrees of freedom), pruned by global magnitude. The
other is a run's (``BENCH_TRAINED``, a folder of `fed run`): of its rounds that whose sparsity comes
closest. Both have 3 million weights, 11.8 MB dense. Sides take turns; `memcpy` copies the dense
bytes between two arrays that exist: the yardstick for speed.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit import codec
from sparsekit.bench.conftest import Compare
from sparsekit.bench.pairs import Case
from sparsekit.bench.rivals import SLOW, Rival, State, rivals
from sparsekit.bench.trained import closest_round, read_weights
from sparsekit.codec.core import Level
from sparsekit.models import BrainAgeCNN

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
LARGE = 50_000
MEMCPY = "memcpy"
TRAINED = os.environ.get("BENCH_TRAINED", "")


@cache
def state_of(kind: str, sparsity: float) -> State:
    """Weights of the paper's network, of which the given share is zero; biases stay."""
    if kind == "trained":
        return read_weights(Path(TRAINED), closest_round(Path(TRAINED), sparsity))
    generator = np.random.default_rng(1990)
    state = {
        name: torch.from_numpy(generator.standard_t(5, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in BrainAgeCNN().state_dict().items()
    }
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    sizes = torch.cat([weight.abs().reshape(-1) for weight in weights])
    threshold = sizes.sort().values[int(sparsity * sizes.numel())]
    for weight in weights:
        weight[weight.abs() < threshold] = 0.0
    return state


def ours(level: Level) -> Rival:
    """Return this library at a level."""
    return Rival(
        lambda state: codec.encode(state, level=level), lambda payload, _: codec.decode(payload)
    )


def entropy(n: int, k: int) -> float:
    """Bits of a mask that keeps `k` of `n` at random."""
    p = k / n
    return 0.0 if p in (0, 1) else -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def masks_of(payload: bytes) -> dict[str, Any]:
    """Bits of the masks beside their entropy: of large tensors one by one, and of all."""
    records = codec.inspect(payload).records
    bits = [(8 * r.mask_bytes, entropy(r.n, r.k), r.n) for r in records if r.n]
    large = [b / h for b, h, n in bits if n >= LARGE and h]
    return {
        "worst_large": max(large, default=None),
        "mask_bits": sum(b for b, _, _ in bits),
        "mask_entropy": sum(h for _, h, _ in bits),
        "bound_bits": sum(h for _, h, _ in bits) + 32 * sum(r.k for r in records),
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def copier(state: State) -> Callable[[], object]:
    dense = np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])
    target = np.empty_like(dense)
    return lambda: np.copyto(target, dense)


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(tensor.view(torch.int32), right[name].view(torch.int32))
        for name, tensor in left.items()
    )


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", ["synthetic", "trained"])
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_codec(compare: Compare, what: str, kind: str, sparsity: float) -> None:
    if kind == "trained" and not TRAINED:
        pytest.skip("BENCH_TRAINED is not set")
    # +0.0 for -0.0, which is all that this library would change.
    state: dict[str, Tensor] = {name: t + 0.0 for name, t in state_of(kind, sparsity).items()}
    found, missing = rivals()
    found = found | {"sparsekit, fast": ours("fast"), "sparsekit": ours("balanced")}
    sides: dict[str, Callable[[], object]] = {MEMCPY: copier(state)}
    sizes = {}
    for name, rival in found.items():
        payload = rival.encode(state)
        assert same(rival.decode(payload, state), state), name
        sizes[name] = len(payload)

        def encode(rival: Rival = rival) -> object:
            return rival.encode(state)

        def decode(rival: Rival = rival, payload: bytes = payload) -> object:
            return rival.decode(payload, state)

        sides[name] = encode if what == "encode" else decode
    n = sum(tensor.numel() for tensor in state.values())
    notes = {
        "bytes": sizes, "missing": missing, "dense_bytes": 4 * n,
        "kept": sum(int(t.count_nonzero()) for t in state.values()),
        **masks_of(codec.encode(state)),
    }  # fmt: skip
    labels = {"what": what, "state": kind, "sparsity": sparsity}
    compare(Case(labels, sides, notes, dict.fromkeys(SLOW, 100)), 9)
