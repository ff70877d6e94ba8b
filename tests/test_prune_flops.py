"""The scope that weighs magnitudes against work."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekit import flops, prune
from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.masks import is_nested
from sparsekit.models import BrainAgeCNN

WORK = {"a": 64.0, "b": 9.0, "c": 1.0}


def tensors_of(seed: int) -> dict[str, Tensor]:
    """Small integers, so that squares and sums are exact and ties are many."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (4, 2, 3), "b": (5, 7), "c": (60,)}
    return {n: torch.randint(-9, 10, s, generator=random).float() for n, s in shapes.items()}


def counts_by_fractions(tensors: dict[str, Tensor], keep: int) -> dict[str, int]:
    """Count what `flops_counts` documents in exact numbers, squared to be rational."""
    scores = []
    for order, (name, tensor) in enumerate(tensors.items()):
        energy = Fraction(0)
        for rank, size in enumerate(sorted(tensor.abs().flatten().tolist(), reverse=True)):
            square = Fraction(size) ** 2
            energy += square
            value = (square / energy if energy else Fraction(0)) ** 2 / Fraction(WORK[name])
            scores.append((-value, order, rank, name))
    counts = dict.fromkeys(tensors, 0)
    for *_, name in sorted(scores)[:keep]:
        counts[name] += 1
    return counts


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("s", [0.0, 0.2, 0.5, 0.8, 0.9, 0.97, 1.0])
@pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")
def test_counts_are_those_of_exact_fractions(seed: int, s: float) -> None:
    tensors = tensors_of(seed)
    total = sum(t.numel() for t in tensors.values())
    masks = prune.magnitude_masks(tensors, s, scope="flops", work=WORK, min_per_filter=0)
    expected = counts_by_fractions(tensors, total - int(s * total))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == expected
    for name, mask in masks.items():
        kept = {name: tensors[name]}
        share = 1 - expected[name] / mask.numel()
        again = prune.magnitude_masks(kept, share, scope="layer", min_per_filter=0)
        assert abs(int(again[name].sum()) - expected[name]) <= 1
        if mask.any() and not mask.all():
            assert tensors[name][mask].abs().min() >= tensors[name][~mask].abs().max()


def test_equal_magnitudes_are_split_by_the_root_of_the_work() -> None:
    tensors = {name: torch.ones(1000) for name in ("a", "b", "c")}
    work = {"a": 16.0, "b": 4.0, "c": 1.0}
    masks = prune.magnitude_masks(tensors, 1 - 700 / 3000, scope="flops", work=work)
    assert [int(mask.sum()) for mask in masks.values()] == [100, 200, 400]
    # The first of equal weights.
    assert masks["a"][:100].all()


def test_scale_of_a_tensor_and_unit_of_work_do_not_matter() -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(50, 9, generator=random) for name in ("a", "b", "c")}
    options: dict[str, Any] = {"scope": "flops", "min_per_filter": 0}
    plain = prune.magnitude_masks(tensors, 0.9, work=WORK, **options)
    scaled = {name: t * 2.0**-i for i, (name, t) in enumerate(tensors.items())}
    hours = {name: 4.0 * one for name, one in WORK.items()}
    other = prune.magnitude_masks(scaled, 0.9, work=hours, **options)
    assert all(torch.equal(plain[name], other[name]) for name in tensors)


def test_less_work_is_left_than_under_the_scopes_that_do_not_see_it() -> None:
    torch.manual_seed(0)
    model, shape = BrainAgeCNN((42, 52, 42), width=0.25), (1, 1, 42, 52, 42)
    work = flops.work_per_weight(model, shape)
    left = {}
    for scope in ("global", "erk", "flops"):
        given = work if scope == "flops" else None
        masks = prune.magnitude_masks(model, 0.95, scope=scope, work=given)
        left[scope] = flops.count(model, shape, masks).train_step
    assert left["flops"] < 0.5 * left["erk"] < 0.5 * left["global"]
    # No layer is emptied, as dividing magnitudes by the work would.
    assert all(int(mask.sum()) > 50 for name, mask in masks.items() if name != "out.weight")


def test_masks_at_rising_sparsity_are_nested_and_exact() -> None:
    outer = None
    for seed, s in enumerate([0.1, 0.5, 0.9]):
        tensors = tensors_of(seed)
        masks = prune.magnitude_masks(
            tensors, s, scope="flops", work=WORK, within=outer, min_per_filter=0
        )
        assert outer is None or is_nested(masks, outer)
        assert sum(int(mask.sum()) for mask in masks.values()) == 119 - int(s * 119)
        outer = masks


@pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_numbers_count_as_their_float32_values(dtype: torch.dtype) -> None:
    tensors = tensors_of(3)
    expected = prune.magnitude_masks(tensors, 0.8, scope="flops", work=WORK)
    half = {name: t.to(dtype) for name, t in tensors.items()}
    masks = prune.magnitude_masks(half, 0.8, scope="flops", work=WORK)
    assert all(torch.equal(masks[name], expected[name]) for name in tensors)


def test_zeros_are_worth_nothing_and_infinity_as_much_as_the_largest() -> None:
    tensors = {"a": torch.tensor([0.0, -0.0, 1.0]), "b": torch.tensor([math.inf, 3.0, -math.inf])}
    masks = prune.magnitude_masks(
        tensors, 0.5, scope="flops", work={"a": 1e9, "b": 1.0}, min_per_filter=0
    )
    assert masks["a"].tolist() == [False, False, True]
    assert masks["b"].tolist() == [True, False, True]


def test_work_is_that_of_a_training_step() -> None:
    model = BrainAgeCNN((20, 24, 20), width=0.1)
    shape = (1, 1, 20, 24, 20)
    work = flops.work_per_weight(model, shape)
    weights = prune.prunable_parameters(model)
    assert set(work) == set(weights)
    total = sum(work[name] * weight.numel() for name, weight in weights.items())
    assert total == flops.count(model, shape).dense_train_step


def test_work_of_groups_shared_frozen_and_unused_layers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv3d(2, 4, 1, groups=2)
            self.twice = nn.Conv3d(4, 4, 1)
            self.frozen = nn.Conv3d(4, 1, 1).requires_grad_(False)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.frozen(self.twice(self.twice(self.first(x))))
            return y

    # 27 positions; forward and weight gradient; both gradients, twice; no weight gradient.
    expected = {"first.weight": 2 * 27 * 2, "twice.weight": 2 * 2 * 27 * 3, "frozen.weight": 108}
    assert flops.work_per_weight(Odd(), (1, 2, 3, 3, 3)) == expected


def masks(tensors: dict[str, Tensor] | None = None, **options: Any) -> object:
    return prune.magnitude_masks(tensors or tensors_of(0), 0.5, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: masks(scope="flops"), ArgumentError, r"work: missing; .*\.work_per_weight"),
        (lambda: masks(work=WORK), ArgumentError, "work: only for scope='flops', and scope is 'gl"),
        (
            lambda: masks(scope="flops", work={"a": 1, "c": 2}),
            ArgumentError,
            r"one entry per tensor, got none for \['b'\]",
        ),
        (
            lambda: masks(scope="flops", work=WORK | {"b": 0}),
            ArgumentError,
            "work: expected positive numbers, got 0 for 'b'",
        ),
        (
            lambda: masks(scope="flops", work=WORK | {"b": math.nan}),
            ArgumentError,
            "got nan for 'b'",
        ),
        (
            lambda: masks({"a": torch.tensor([1.0, math.nan])}, scope="flops", work=WORK),
            ArgumentError,
            "tensors: 'a' holds NaN",
        ),
        (
            lambda: masks({"a": torch.ones(2, dtype=torch.float64)}, scope="flops", work=WORK),
            ArgumentTypeError,
            "float64",
        ),
    ],
)
def test_bad_arguments_are_refused(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_counts_never_rise_where_work_does() -> None:
    random = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(400, generator=random) for name in ("a", "b")}
    kept = []
    for work in (1.0, 2.0, 8.0, 64.0):
        counts = prune.magnitude_masks(tensors, 0.8, scope="flops", work={"a": work, "b": 1.0})
        kept.append(int(counts["a"].sum()))
    assert all(more > less for more, less in pairwise(kept))
