"""Exact selection against a stable sort over everything, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.ops import topk_mask

pytestmark = pytest.mark.parametrize("backend", ["reference", "cpu"])


def brute_force(
    tensors: list[Tensor], keep: int, within: list[Tensor] | None = None
) -> list[Tensor]:
    """Sort (magnitude down, position up) in Python; Python floats hold all these dtypes exactly."""
    values = [abs(v) for t in tensors for v in t.double().flatten().tolist()]
    allowed = [True] * len(values)
    if within is not None:
        allowed = [bool(v) for m in within for v in m.flatten().tolist()]
    order = sorted((i for i in range(len(values)) if allowed[i]), key=lambda i: (-values[i], i))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:keep]] = True
    parts = chosen.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bool
        assert torch.equal(a, b)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SETS = {
    "one": [randn(97)],
    "several": [randn(5, 7), randn(3, seed=2), randn(2, 3, 4, seed=3)],
    "with-empty": [randn(0), randn(4, 0, 3), randn(11), randn(0, 2)],
    "zero-d": [torch.tensor(-2.0), randn(3), torch.tensor(2.0)],
    "all-equal": [torch.ones(4, 5), -torch.ones(7)],
    "zeros": [torch.tensor([0.0, -0.0, 0.0]), torch.tensor([-0.0, 1e-45, 0.0])],
    "subnormal": [torch.tensor([1e-45, -3e-45, 1e-40, 0.0, -1e-39]), torch.tensor([2e-45])],
    "infinite": [torch.tensor([float("inf"), 1.0, -float("inf")]), torch.tensor([3e38, -3.4e38])],
    "many-ties": [(randn(60) * 2).round() / 4, (randn(60, seed=9) * 2).round() / 4],
    "half": [randn(40).half(), randn(40, seed=4).half()],
    "bfloat16": [randn(40).bfloat16(), randn(40, seed=4).bfloat16()],
    "mixed": [randn(20).half(), randn(20, seed=4), randn(20, seed=5).bfloat16()],
}


@pytest.mark.parametrize("name", SETS)
def test_equals_a_stable_sort_for_every_count(backend: str, name: str) -> None:
    tensors = SETS[name]
    total = sum(t.numel() for t in tensors)
    for keep in range(total + 1):
        masks = topk_mask(tensors, keep, backend=backend)
        assert sum(int(m.sum()) for m in masks) == keep
        assert_same(masks, brute_force(tensors, keep))


@pytest.mark.parametrize("name", ["several", "with-empty", "all-equal", "zeros", "many-ties"])
def test_stays_within(backend: str, name: str) -> None:
    tensors = SETS[name]
    random = torch.Generator().manual_seed(8)
    within = [torch.rand(t.shape, generator=random) < 0.5 for t in tensors]
    alive = sum(int(m.sum()) for m in within)
    for keep in range(alive + 1):
        masks = topk_mask(tensors, keep, within=within, backend=backend)
        assert not any(bool((m & ~w).any()) for m, w in zip(masks, within, strict=True))
        assert_same(masks, brute_force(tensors, keep, within))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    data=st.data(),
    sizes=st.lists(st.integers(0, 12), max_size=4),
)
def test_equals_a_stable_sort_on_drawn_values(
    backend: str, data: st.DataObject, sizes: list[int]
) -> None:
    # Few distinct values, so that ties are the rule.
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, float("inf")])
    tensors = [
        torch.tensor(data.draw(st.lists(value, min_size=n, max_size=n)), dtype=torch.float32)
        for n in sizes
    ]
    within = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
        for n in sizes
    ]
    keep = data.draw(st.integers(0, sum(int(m.sum()) for m in within)))
    assert_same(
        topk_mask(tensors, keep, within=within, backend=backend), brute_force(tensors, keep, within)
    )


def test_equals_a_stable_sort_on_many_values(backend: str) -> None:
    tensors = [randn(64, 32, 27, seed=1), randn(31, 97, seed=2).round(decimals=1)]
    keys = np.concatenate([np.abs(t.numpy()).ravel() for t in tensors])
    keep = keys.size // 20
    chosen = np.zeros(keys.size, np.bool_)
    chosen[np.argsort(-keys, kind="stable")[:keep]] = True
    masks = topk_mask(tensors, keep, backend=backend)
    assert np.array_equal(np.concatenate([m.numpy().ravel() for m in masks]), chosen)


def test_memory_order_of_a_tensor_does_not_matter(backend: str) -> None:
    base = (randn(6, 5, 4) * 2).round()
    turned = base.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    spaced = torch.stack([base, base + 9], dim=-1)[..., 0]
    assert not turned.is_contiguous()
    for keep in (0, 1, 17, 60, 120):
        expected = topk_mask([base], keep, backend=backend)
        assert_same(topk_mask([turned], keep, backend=backend), expected)
        assert_same(topk_mask([spaced], keep, backend=backend), expected)


def test_input_is_left_alone_and_gradients_are_not_needed(backend: str) -> None:
    weight = randn(9).requires_grad_()
    before = weight.detach().clone()
    (mask,) = topk_mask([weight], 4, backend=backend)
    assert torch.equal(weight.detach(), before)
    assert not mask.requires_grad
    mask.fill_(True)
    assert torch.equal(topk_mask([weight], 4, backend=backend)[0], brute_force([before], 4)[0])
