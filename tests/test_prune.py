import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparsekit import prune
from sparsekit.errors import ArgumentError, ArgumentTypeError, EmptiedLayerWarning
from sparsekit.masks import is_nested, masks_of, sparsity
from sparsekit.models import BrainAgeCNN
from sparsekit.nn import MaskedConv3d
from sparsekit.ops import topk_mask


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


SPARSITIES = [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.95, 0.99, 1.0]


def random_tensors(seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"a": (8, 3, 3, 3), "b": (16, 8), "c": (5, 40), "d": (64, 16, 3)}
    scales = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 0.1}
    return {n: scales[n] * torch.randn(s, generator=random) for n, s in shapes.items()}


def count(masks: dict[str, Tensor]) -> int:
    return sum(int(m.sum()) for m in masks.values())


@pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")
@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("scope", ["global", "layer", "erk", "flops"])
@pytest.mark.parametrize("s", SPARSITIES)
def test_counts_are_exact_inside_and_outside_of_a_mask(s: float, scope: str, least: int) -> None:
    tensors = random_tensors()
    sizes = {name: t.numel() for name, t in tensors.items()}
    total = sum(sizes.values())
    random = torch.Generator().manual_seed(2)
    outer = {name: torch.rand(t.shape, generator=random) < 0.3 for name, t in tensors.items()}
    work = {"a": 9.0, "b": 1, "c": 2.5, "d": 40} if scope == "flops" else None
    for within in (None, outer):
        masks = prune.magnitude_masks(
            tensors, s, scope=scope, within=within, min_per_filter=least, work=work
        )
        alive = {n: sizes[n] if within is None else int(within[n].sum()) for n in sizes}
        if scope == "layer":
            for name, mask in masks.items():
                assert int(mask.sum()) == min(sizes[name] - int(s * sizes[name]), alive[name])
        else:
            assert count(masks) == min(total - int(s * total), sum(alive.values()))
        assert within is None or is_nested(masks, within)
        assert list(masks) == list(tensors)


@pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")
def test_without_the_guard_the_global_scope_is_topk_mask() -> None:
    tensors = random_tensors()
    total = sum(t.numel() for t in tensors.values())
    masks = prune.magnitude_masks(tensors, 0.9, min_per_filter=0)
    expected = topk_mask(tensors, total - int(0.9 * total))
    assert all(torch.equal(masks[n], expected[n]) for n in tensors)


def test_a_model_stands_for_its_convolutions_and_linear_layers() -> None:
    model = nn.Sequential(
        nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.ConvTranspose3d(2, 2, 2), nn.Linear(3, 4),
        nn.Conv1d(1, 2, 3), nn.LayerNorm(4), nn.Embedding(3, 3),
    )  # fmt: skip
    names = ["0.weight", "2.weight", "3.weight", "4.weight"]
    assert list(prune.prunable_parameters(model)) == names
    assert list(prune.magnitude_masks(model, 0.5)) == names
    with pytest.raises(ArgumentError, match="no convolution or linear layer"):
        prune.magnitude_masks(nn.BatchNorm3d(2), 0.5)


def test_a_shared_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(prune.prunable_parameters(model)) == ["0.weight"]


def test_a_mapping_is_pruned_whole() -> None:
    masks = prune.magnitude_masks({"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}, 0.4)
    assert masks["w"].tolist() == [[False, True]]
    assert masks["b"].tolist() == [True]


def guard_by_exchange(
    tensors: dict[str, Tensor], masks: dict[str, Tensor], least: int
) -> dict[str, Tensor]:
    """Hand each starved filter its best weights, taking the smallest of filters that can spare."""
    entries = [
        (abs(value), name, row, col)
        for name, t in tensors.items()
        for row, values in enumerate(t.flatten(1).tolist())
        for col, value in enumerate(values)
    ]
    kept = {(n, r, c) for _, n, r, c in entries if bool(masks[n].flatten(1)[r, c])}
    target = len(kept)
    for name, t in tensors.items():
        for row in range(t.shape[0]):
            own = sorted((e for e in entries if e[1:3] == (name, row)), key=lambda e: -e[0])
            kept |= {e[1:] for e in own[:least]}
    for _, name, row, col in sorted(entries):
        if len(kept) == target:
            break
        mates = sum(k[:2] == (name, row) for k in kept)
        if (name, row, col) in kept and mates > least:
            kept.remove((name, row, col))
    result = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in tensors.items()}
    for name, row, col in kept:
        result[name].flatten(1)[row, col] = True
    return result


@pytest.mark.parametrize("least", [1, 2, 3])
@pytest.mark.parametrize("s", [0.5, 0.7, 0.8])
def test_guard_keeps_the_best_of_each_filter_and_drops_the_smallest_elsewhere(
    s: float, least: int
) -> None:
    tensors = {"a": random_tensors()["a"] * 0.01, "c": random_tensors()["c"]}
    plain = topk_mask(tensors, 416 - int(s * 416))
    assert any(bool((m.flatten(1).sum(1) < least).any()) for m in plain.values())
    guarded = prune.magnitude_masks(tensors, s, min_per_filter=least)
    expected = guard_by_exchange(tensors, plain, least)
    assert all(torch.equal(guarded[n], expected[n]) for n in tensors)
    assert all(bool((m.flatten(1).sum(1) >= least).all()) for m in guarded.values())


def test_guard_of_equal_weights_keeps_the_first() -> None:
    masks = prune.magnitude_masks({"w": torch.ones(3, 4)}, 0.5)
    assert masks["w"].tolist() == [
        [True, True, True, True], [True, False, False, False], [True, False, False, False],
    ]  # fmt: skip


def test_guard_leaves_filters_empty_that_have_nothing_alive() -> None:
    within = {"w": torch.tensor([[True, True], [False, False], [True, False]])}
    masks = prune.magnitude_masks({"w": torch.tensor([[3.0, 4.0], [9.0, 9.0], [1.0, 5.0]])}, 0.5,
                                  within=within)  # fmt: skip
    assert masks["w"].tolist() == [[True, True], [False, False], [True, False]]
    masks = prune.magnitude_masks({"w": torch.tensor([[3.0, 4.0], [9.0, 9.0], [1.0, 5.0]])}, 0.7,
                                  within=within)  # fmt: skip
    assert masks["w"].tolist() == [[False, True], [False, False], [True, False]]


def test_too_few_for_the_guard_keeps_the_exact_count_and_warns() -> None:
    tensors = random_tensors()
    with pytest.warns(EmptiedLayerWarning) as caught:
        masks = prune.magnitude_masks(tensors, 0.99)
    total = sum(t.numel() for t in tensors.values())
    assert count(masks) == total - int(0.99 * total)
    texts = [str(w.message) for w in caught]
    assert any("too few to give each filter of a, b, c, d 1 (that needs 93)" in t for t in texts)
    # Each kept weight is the best of another filter.
    assert all(bool((m.flatten(1).sum(1) <= 1).all()) for m in masks.values())


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_an_emptied_layer_is_named(scope: str) -> None:
    tensors = {"kept": torch.ones(2, 2), "lost": torch.full((2, 2), 0.1)}
    with pytest.warns(EmptiedLayerWarning, match="no weight is left in kept, lost"):
        prune.magnitude_masks(tensors, 1.0, scope=scope, min_per_filter=0)
    if scope == "global":
        with pytest.warns(EmptiedLayerWarning, match="no weight is left in lost; choose"):
            prune.magnitude_masks(tensors, 0.5, min_per_filter=0)


@pytest.mark.parametrize("s", [0.5, 0.8, 0.9, 0.95])
def test_erk_densities_follow_the_sum_of_the_sizes(s: float) -> None:
    model = BrainAgeCNN((46, 55, 46), width=0.5)
    weights = prune.prunable_parameters(model)
    masks = prune.magnitude_masks(model, s, scope="erk")
    ratios = []
    for name, w in weights.items():
        kept = int(masks[name].sum())
        if kept < w.numel():
            ratios.append((kept / sum(w.shape), 1 / sum(w.shape)))
    assert len(ratios) >= 2
    for (ratio, step), (other, other_step) in pairwise(ratios):
        assert abs(ratio - other) <= step + other_step
    full = [n for n, w in weights.items() if int(masks[n].sum()) == w.numel()]
    factor = min(ratio for ratio, _ in ratios)
    for name in full:
        assert factor * sum(weights[name].shape) >= weights[name].numel() - 1


@pytest.mark.parametrize(
    ("s", "counts"),
    [
        # 16 kept in proportion 5 : 8 : 20 are 2 14/33, 3 29/33 and 9 23/33.
        pytest.param(0.87, [2, 4, 10], id="largest-remainders-round-up"),
        # 61 kept fill the first; its surplus goes on: 55 in proportion 8 : 20.
        pytest.param(0.5, [6, 16, 39], id="full-layer"),
    ],
)
def test_erk_counts_worked_out_by_hand(s: float, counts: list[int]) -> None:
    random = torch.Generator().manual_seed(1)
    tensors = {str(n): torch.randn(n, generator=random) for n in ((2, 3), (4, 4), (10, 10))}
    masks = prune.magnitude_masks(tensors, s, scope="erk", min_per_filter=0)
    assert [int(m.sum()) for m in masks.values()] == counts


def test_masks_at_rising_sparsity_are_nested() -> None:
    tensors = random_tensors()
    outer: dict[str, Tensor] | None = None
    for i, s in enumerate([0.1, 0.3, 0.6, 0.9]):
        # New values each time: nesting must come from `within`, not from the weights.
        masks = prune.magnitude_masks(random_tensors(seed=i), s, within=outer)
        assert outer is None or is_nested(masks, outer)
        outer = masks
    assert outer is not None
    assert not is_nested(prune.magnitude_masks(tensors, 0.1), outer)
    assert not is_nested({"a": outer["a"]}, outer)


def test_masks_are_a_function_of_weights_and_sparsity_only() -> None:
    first = prune.magnitude_masks(random_tensors(), 0.9)
    again = prune.magnitude_masks(random_tensors(), 0.9)
    assert all(torch.equal(first[n], again[n]) for n in first)


@pytest.mark.parametrize("s", [0.0, 0.3, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "mixed"])
@pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")
def test_paper_rule_is_a_threshold_that_keeps_all_ties(s: float, half: bool) -> None:
    tensors = {n: (t * 8).round() / 8 for n, t in random_tensors().items()}
    tensors["bias"] = torch.linspace(-1, 1, 9)
    if half:
        tensors["bias"] = tensors["bias"].half()
    values = sorted(v for t in tensors.values() for v in t.double().abs().flatten().tolist())
    threshold = values[int(s * len(values))]
    masks = prune.paper_masks(tensors, s)
    for name, t in tensors.items():
        assert torch.equal(masks[name], t.double().abs() >= threshold)


def test_paper_rule_names_what_it_empties() -> None:
    tensors = {"large": torch.ones(9), "small": torch.full((9,), 0.1)}
    with pytest.warns(EmptiedLayerWarning, match="no weight is left in small"):
        prune.paper_masks(tensors, 0.5)


def test_paper_rule_keeps_everything_when_the_threshold_is_zero() -> None:
    masks = prune.paper_masks({"w": torch.tensor([0.0, 0.0, -0.0, 5.0])}, 0.5)
    assert masks["w"].tolist() == [True] * 4
    with pytest.raises(ArgumentError, match=r"from 0 to below 1, got 1.0"):
        prune.paper_masks({"w": torch.ones(3)}, 1.0)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8])
def test_majority_vote_keeps_at_half_of_the_votes(clients: int) -> None:
    # Entry k is kept by k clients.
    votes = [{"w": torch.arange(clients + 1) > i} for i in range(clients)]
    kept = prune.majority_vote(votes)["w"].tolist()
    assert kept == [k >= max(1, clients // 2) for k in range(clients + 1)]


def test_majority_vote_refuses_masks_that_do_not_belong_together() -> None:
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="expected at least one client"):
        prune.majority_vote([])
    with pytest.raises(ArgumentError, match=r"client 1 differs from 0 in \['v'\]"):
        prune.majority_vote([{"w": mask}, {"w": mask, "v": mask}])
    with pytest.raises(ArgumentError, match=r"mask of w of client 1: expected .* shape"):
        prune.majority_vote([{"w": mask}, {"w": torch.ones(3, dtype=torch.bool)}])
    with pytest.raises(ArgumentTypeError, match=r"expected a bool Tensor, got torch.float32"):
        prune.majority_vote([{"w": mask.float()}])


def test_zero_outside_writes_plain_zeros() -> None:
    tensors = {"w": torch.tensor([math.nan, -1.0, 2.0, -0.0, math.inf]), "b": torch.ones(1)}
    prune.zero_outside(tensors, {"w": torch.tensor([False, False, True, False, False])})
    assert tensors["w"].tolist() == [0.0, 0.0, 2.0, 0.0, 0.0]
    assert not bool(tensors["w"].signbit().any())
    with pytest.raises(ArgumentError, match="there is no tensor 'v'"):
        prune.zero_outside(tensors, {"v": torch.ones(1, dtype=torch.bool)})


BAD_CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: prune.magnitude_masks(random_tensors(), 1.1), ArgumentError, "sparsity: expected"),
    (lambda: prune.magnitude_masks(random_tensors(), -0.1), ArgumentError, "sparsity: expected"),
    (lambda: prune.magnitude_masks(random_tensors(), math.nan), ArgumentError, "got nan"),
    (
        lambda: prune.magnitude_masks(random_tensors(), 0.5, scope="speed"),
        ArgumentError,
        "scope: expected one of 'global', 'layer', 'erk', 'flops', got 'speed'",
    ),
    (
        lambda: prune.magnitude_masks(random_tensors(), 0.5, granularity="row"),
        ArgumentError,
        "granularity: expected one of 'weight', 'vector:V', 'block:VxW', 'filter', '2:4' with "
        "whole numbers V and W from 1, got 'row'",
    ),
    (
        lambda: prune.magnitude_masks(random_tensors(), 0.5, min_per_filter=-1),
        ArgumentError,
        "min_per_filter: expected a count >= 0",
    ),
    (
        lambda: prune.magnitude_masks({"w": torch.ones(2)}, 0.5, within={"v": torch.ones(2) > 0}),
        ArgumentError,
        r"within: expected one mask per tensor; without a partner: \['v', 'w'\]",
    ),
    (
        lambda: prune.magnitude_masks({"w": torch.ones(2)}, 0.5, within={"w": torch.ones(3) > 0}),
        ArgumentError,
        r"mask of w: expected the parameter's shape \(2,\), got \(3,\)",
    ),
    (
        lambda: prune.magnitude_masks({"w": torch.tensor([1.0, math.nan])}, 0.5),
        ArgumentError,
        "tensors: 'w' holds NaN",
    ),
    (
        lambda: prune.magnitude_masks({"w": torch.ones(2, dtype=torch.float64)}, 0.5),
        ArgumentTypeError,
        "float64",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_CALLS)
def test_bad_arguments_are_refused(
    call: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def test_the_user_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "pruning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:  # in the order of reading, each with what the ones before made
        exec(compile(block, "docs/pruning.md", "exec"), names)


def test_sparsity_report_counts_over_prunable_weights_and_over_all() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    masks = {"0.weight": torch.arange(20).reshape(5, 4) < 5, "0.bias": torch.arange(5) < 4}
    report = sparsity(model, masks)
    assert (report.prunable, report.overall) == (15 / 20, 16 / 35)
    assert (report.kept, report.total) == (19, 35)
    assert report.by_parameter == {"0.weight": 15 / 20, "0.bias": 1 / 5}
    assert "75.0000% of the prunable weights, 45.7143% of all parameters" in str(report)
    assert sparsity(model).overall == 0.0
    prune.apply_masks(model, masks)
    assert sparsity(model) == report


def test_masks_of_torch_are_adopted() -> None:
    model: Any = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Linear(3, 2))
    parameters = {id(p) for p in model.parameters()}
    torch_prune.random_unstructured(model[0], "weight", amount=0.6)
    torch_prune.l1_unstructured(model[0], "bias", amount=1)
    torch_prune.ln_structured(model[2], "weight", amount=1, n=2, dim=0)
    with torch.no_grad():
        model[0].weight_orig[model[0].weight_mask == 0] = math.nan
    wanted = {
        "0.weight": model[0].weight_mask.bool().clone(),
        "0.bias": model[0].bias_mask.bool().clone(),
        "2.weight": model[2].weight_mask.bool().clone(),
    }
    with pytest.raises(ArgumentError, match=r"call sparsekit.prune.adopt_torch_masks first"):
        prune.apply_masks(model, {"0.weight": wanted["0.weight"]})
    with pytest.raises(ArgumentError, match="computed from other parameters"):
        prune.magnitude_masks(model, 0.5)

    adopted = prune.adopt_torch_masks(model)
    assert adopted.keys() == wanted.keys()
    assert all(torch.equal(adopted[n], wanted[n]) for n in wanted)
    assert {n: m.tolist() for n, m in masks_of(model).items()} == {
        n: m.tolist() for n, m in wanted.items()
    }
    assert {id(p) for p in model.parameters()} == parameters
    assert all(p.is_leaf for p in model.parameters())
    assert not torch_prune.is_pruned(model)
    for name, mask in wanted.items():
        pruned = model.get_parameter(name).detach()[~mask]
        assert torch.equal(pruned, torch.zeros_like(pruned))
    assert prune.adopt_torch_masks(model) == {}


def test_apply_masks_changes_nothing_if_one_mask_does_not_fit() -> None:
    model: Any = nn.Sequential(MaskedConv3d(1, 2, 3), nn.Linear(2, 2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    good = torch.zeros(2, 1, 3, 3, 3, dtype=torch.bool)
    for bad in ({"1.weight": torch.ones(3, dtype=torch.bool)}, {"2.weight": good}):
        with pytest.raises(ArgumentError):
            prune.apply_masks(model, {"0.weight": good, **bad})
    assert all(torch.equal(p.detach(), before[n]) for n, p in model.named_parameters())
    assert model[0].density == 1.0
