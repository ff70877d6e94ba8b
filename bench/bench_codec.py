"""Encode and decode a pruned BrainAgeCNN on one thread, beside what people use otherwise.

``make bench-codec`` runs it and writes docs/results/codec.*. One state is the paper's network with
heavy-tailed random weights (Student t, 5 degrees of freedom), pruned by global magnitude. The
other is a run's (``BENCH_TRAINED``, a folder of `fed run`): of its rounds that whose sparsity comes
closest. Both have 3 million weights, 11.8 MB dense. Sides take turns; `memcpy` copies the dense
bytes between two arrays that exist: the yardstick for speed.
"""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from sparsekit.bench.codecs import SPARSITIES, codec_case, random_state
from sparsekit.bench.conftest import Compare
from sparsekit.bench.rivals import State
from sparsekit.bench.trained import closest_round, read_weights

TRAINED = os.environ.get("BENCH_TRAINED", "")


@cache
def state_of(kind: str, sparsity: float) -> State:
    """Weights of the paper's network, of which the given share is zero; biases stay."""
    if kind == "trained":
        return read_weights(Path(TRAINED), closest_round(Path(TRAINED), sparsity))
    return random_state(sparsity)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("kind", ["synthetic", "trained"])
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_codec(compare: Compare, what: str, kind: str, sparsity: float) -> None:
    if kind == "trained" and not TRAINED:
        pytest.skip("BENCH_TRAINED is not set")
    labels = {"state": kind, "sparsity": sparsity}
    compare(codec_case(state_of(kind, sparsity), what, labels), 9)
