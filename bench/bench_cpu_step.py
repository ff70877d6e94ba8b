"""The whole training step of the network beside the same network of torch's modules.

Run with ``pytest bench/bench_cpu_step.py``. The masks of a really trained network come from a short
run that ``make bench-cpu`` makes first; BENCH_TRAINED names its checkpoints, without which those
rows are skipped.
"""

import os
from pathlib import Path

import pytest

from sparsekit.bench.conftest import Compare
from sparsekit.bench.network import SPARSITIES
from sparsekit.bench.steps import alternatives_case, step_case, trained_case
from sparsekit.bench.trained import closest_round, read_run

TRAINED = os.environ.get("BENCH_TRAINED", "")


@pytest.mark.parametrize("first_dense", [False, True])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_step(compare: Compare, sparsity: float, first_dense: bool) -> None:
    compare(step_case(sparsity, first_dense=first_dense), 13)


@pytest.mark.skipif(not TRAINED, reason="BENCH_TRAINED names no run; make bench-cpu makes one")
@pytest.mark.parametrize("sparsity", SPARSITIES[1:])
def test_trained_masks(compare: Compare, sparsity: float) -> None:
    masks, notes = read_run(Path(TRAINED), closest_round(Path(TRAINED), sparsity))
    compare(trained_case(masks, notes), 13)


def test_alternatives(compare: Compare) -> None:
    compare(alternatives_case(0.95), 9)
