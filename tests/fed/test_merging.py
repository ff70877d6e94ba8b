"""Updates added up one at a time, and what is pruned of their average."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from sparsekit import prune
from sparsekit.fed.algorithm import aggregate, initial_state, is_prunable
from sparsekit.fed.config import RunConfig
from sparsekit.fed.merging import Merger, Update


def added(updates: Mapping[str, Update]) -> Merger:
    merger = Merger()
    for site in sorted(updates):
        merger.add(updates[site])
    return merger


def test_the_average_is_rounded_once() -> None:
    random = np.random.default_rng(5)
    counts = {"a": 3, "b": 50, "c": 7}
    numbers = {site: random.standard_normal(1001).astype(np.float32) for site in counts}
    updates = {s: Update({"w": torch.from_numpy(n)}, None, counts[s]) for s, n in numbers.items()}
    exact = np.sum([numbers[s].astype(np.longdouble) * n for s, n in counts.items()], axis=0) / 60
    found = added(updates).average()["w"].numpy()
    assert np.array_equal(found, exact.astype(np.float32))


def test_an_update_is_not_held_once_it_is_added() -> None:
    merger = Merger()
    for _ in range(3):
        weights = torch.ones(5)
        merger.add(Update({"w": weights}, None, 1))
        assert sys.getrefcount(weights) == 2
    assert merger.average()["w"].tolist() == [1.0] * 5


@pytest.mark.parametrize("granularity", ["vector:2", "block:2x4", "filter", "2:4"])
def test_groups_are_pruned_as_one(granularity: str) -> None:
    once: dict[str, Any] = {"rounds": 2, "sparsity": 0.5, "granularity": granularity}
    config = RunConfig(cohort="unused", width=0.05, **once)
    first = initial_state(config, in_shape=(12, 12, 12), mean_age=60.0)
    state = dataclasses.replace(first, round=1)
    merged = aggregate(state, added({"a": Update(dict(state.weights), None, 1)}), config)
    prunable = {name: t for name, t in state.weights.items() if is_prunable(name, t)}
    expected = prune.magnitude_masks(prunable, 0.5, granularity=granularity)
    assert merged.masks is not None
    assert merged.masks.keys() == expected.keys()
    for name, mask in expected.items():
        assert torch.equal(merged.masks[name], mask)
        assert not bool(merged.weights[name][~mask].any())
