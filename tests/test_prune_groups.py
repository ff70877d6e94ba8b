"""Pruning by groups against plain loops over the weights."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsekit import prune
from sparsekit.errors import ArgumentError, EmptiedLayerWarning
from sparsekit.masks import is_nested
from sparsekit.models import BrainAgeCNN

Member = tuple[int, ...]
quiet = pytest.mark.filterwarnings("ignore::sparsekit.errors.EmptiedLayerWarning")


def sizes_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    outputs, inputs = (*shape, 1, 1)[:2]
    return outputs, inputs, int(np.prod(shape[2:], dtype=int))


def groups_by_loops(shape: tuple[int, ...], v: int, w: int) -> list[list[int]]:
    """Flat indices of each group's weights, groups and weights in C order; v = 0 is a filter."""
    outputs, inputs, taps = sizes_of(shape)
    if v == 0:
        return [list(range(o * inputs * taps, (o + 1) * inputs * taps)) for o in range(outputs)]
    return [
        [
            (o * inputs + i) * taps + tap
            for o in range(row, min(row + v, outputs))
            for i in range(column, min(column + w, inputs))
        ]
        for row in range(0, outputs, v)
        for column in range(0, inputs, w)
        for tap in range(taps)
    ]


def whole_groups(shape: tuple[int, ...], v: int, w: int) -> list[list[int | None]]:
    """The same with None where a group reaches beyond the tensor."""
    outputs, inputs, taps = sizes_of(shape)
    if v == 0:
        return [list(group) for group in groups_by_loops(shape, v, w)]
    return [
        [
            (o * inputs + i) * taps + tap if o < outputs and i < inputs else None
            for o in range(row, row + v)
            for i in range(column, column + w)
        ]
        for row in range(0, outputs, v)
        for column in range(0, inputs, w)
        for tap in range(taps)
    ]


def score(values: npt.NDArray[np.float32], alive: int) -> np.float32:
    """Halves added until one number is left, and divided: in float32."""
    numbers = list(values)
    power = 1
    while power < len(numbers):
        power *= 2
    numbers += [np.float32(0)] * (power - len(numbers))
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = [a + b for a, b in zip(numbers[:half], numbers[half:], strict=True)]
    return np.float32(numbers[0] / np.float32(max(alive, 1)))


def masks_by_loops(
    tensors: dict[str, Tensor], keep: int, v: int, w: int, within: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Sort all groups by score, and take them from the first on while there is room."""
    ranked = []
    for (name, tensor), place in zip(tensors.items(), itertools.count()):
        flat = tensor.abs().float().reshape(-1).numpy()
        allowed = [True] * flat.size if within is None else within[name].reshape(-1).tolist()
        for number, group in enumerate(whole_groups(tuple(tensor.shape), v, w)):
            magnitudes = np.array(
                [0 if i is None or not allowed[i] else flat[i] for i in group], np.float32
            )
            members = [i for i in group if i is not None and allowed[i]]
            if members:
                ranked.append((-score(magnitudes, len(members)), place, number, name, members))
    masks = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in tensors.items()}
    for _, _, _, name, members in sorted(ranked, key=lambda entry: entry[:3]):
        if len(members) > keep:
            break
        keep -= len(members)
        masks[name].view(-1)[members] = True
    return masks


def random_tensors(seed: int = 1) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "conv": (8, 6, 3, 1, 2), "odd": (5, 7, 2, 2), "linear": (9, 10), "bias": (7,), "one": (),
        "none": (0, 4, 3),
    }  # fmt: skip
    scales = [1.0, 0.5, 2.0, 1.0, 0.1, 1.0]
    return {
        name: scale * torch.randn(shape, generator=random)
        for (name, shape), scale in zip(shapes.items(), scales, strict=True)
    }


FORMS = [("vector:4", 4, 1), ("vector:16", 16, 1), ("block:2x3", 2, 3), ("block:4x4", 4, 4),
         ("block:1x16", 1, 16), ("filter", 0, 0)]  # fmt: skip


@quiet
@pytest.mark.parametrize(("granularity", "v", "w"), FORMS)
@pytest.mark.parametrize("s", [0.0, 0.3, 0.8, 0.97, 1.0])
@pytest.mark.parametrize("make", ["continuous", "ties", "half"])
def test_masks_are_those_of_a_loop(granularity: str, v: int, w: int, s: float, make: str) -> None:
    tensors = random_tensors()
    if make == "ties":
        tensors = {name: (t * 2).round() for name, t in tensors.items()}
    if make == "half":
        tensors = {n: t.to((torch.float16, torch.bfloat16)[i % 2])
                   for i, (n, t) in enumerate(tensors.items())}  # fmt: skip
    total = sum(t.numel() for t in tensors.values())
    random = torch.Generator().manual_seed(2)
    outer = {name: torch.rand(t.shape, generator=random) < 0.6 for name, t in tensors.items()}
    for within in (None, outer):
        masks = prune.magnitude_masks(
            tensors, s, granularity=granularity, within=within, min_per_filter=0
        )
        alive = total if within is None else sum(int(m.sum()) for m in within.values())
        keep = min(total - int(s * total), alive)
        expected = masks_by_loops(tensors, keep, v, w, within)
        assert all(torch.equal(masks[n], expected[n]) for n in tensors)
        assert list(masks) == list(tensors)
        assert within is None or is_nested(masks, within)


@quiet
@pytest.mark.parametrize("least", [0, 1, 2])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("granularity", ["vector:1", "block:1x1"])
def test_groups_of_one_weight_are_weights(granularity: str, scope: str, least: int) -> None:
    tensors = random_tensors()
    random = torch.Generator().manual_seed(4)
    outer = {name: torch.rand(t.shape, generator=random) < 0.6 for name, t in tensors.items()}
    for within, s in itertools.product((None, outer), (0.2, 0.85, 0.99)):
        options: dict[str, Any] = {"scope": scope, "within": within, "min_per_filter": least}
        masks = prune.magnitude_masks(tensors, s, granularity=granularity, **options)
        expected = prune.magnitude_masks(tensors, s, **options)
        assert all(torch.equal(masks[n], expected[n]) for n in tensors)


@quiet
@pytest.mark.parametrize("scope", ["layer", "erk", "flops"])
@pytest.mark.parametrize(("granularity", "v", "w"), FORMS)
def test_other_scopes_fill_each_tensor_by_itself(
    granularity: str, v: int, w: int, scope: str
) -> None:
    tensors = {name: t for name, t in random_tensors().items() if t.ndim > 1}
    work = dict(zip(tensors, (3, 1, 10, 2, 7, 5), strict=False)) if scope == "flops" else None
    options: dict[str, Any] = {"scope": scope, "min_per_filter": 0, "work": work}
    masks = prune.magnitude_masks(tensors, 0.6, granularity=granularity, **options)
    exact = prune.magnitude_masks(tensors, 0.6, **options)
    for name, tensor in tensors.items():
        keep = int(exact[name].sum())
        expected = masks_by_loops({name: tensor}, keep, v, w, None)[name]
        assert torch.equal(masks[name], expected)


@quiet
def test_counts_are_exact_where_groups_divide() -> None:
    model = BrainAgeCNN((46, 55, 46), width=0.5)
    weights = {n: p for n, p in model.named_parameters() if p.ndim == 5 and p.shape[1] % 16 == 0
               and p.shape[0] % 16 == 0}  # fmt: skip
    total = sum(p.numel() for p in weights.values())
    for s in (0.5, 0.9, 0.95):
        masks = prune.magnitude_masks(weights, s, granularity="block:16x16", min_per_filter=0)
        kept = sum(int(m.sum()) for m in masks.values())
        assert kept == (total - int(s * total)) // 256 * 256


@quiet
@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 9), inputs=st.integers(1, 9), taps=st.integers(1, 4),
    v=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 99),
    sparsities=st.lists(st.floats(0, 1), min_size=2, max_size=4),
)  # fmt: skip
def test_rounds_of_pruning_are_nested_whole_and_within_the_count(
    outputs: int, inputs: int, taps: int, v: int, w: int, seed: int, sparsities: list[float]
) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs, taps, 1, 1)
    tensors = {"w": torch.randn(shape, generator=random), "b": torch.randn(4, 4, generator=random)}
    total = sum(t.numel() for t in tensors.values())
    within: dict[str, Tensor] | None = None
    for s in sorted(sparsities):
        alive = total if within is None else sum(int(m.sum()) for m in within.values())
        masks = prune.magnitude_masks(
            tensors, s, granularity=f"block:{v}x{w}", within=within, min_per_filter=0
        )
        kept = sum(int(m.sum()) for m in masks.values())
        room = min(total - int(s * total), alive) - kept
        assert room >= 0
        assert kept == alive or room < v * w
        assert within is None or is_nested(masks, within)
        flat = masks["w"].reshape(-1)
        for group in groups_by_loops(shape, v, w):
            assert len({bool(flat[i]) for i in group}) == 1
        within = masks


@pytest.mark.parametrize(("granularity", "v", "w"), FORMS[:5])
@pytest.mark.parametrize("least", [1, 2, 5])
def test_guard_gives_each_channel_its_share(granularity: str, v: int, w: int, least: int) -> None:
    random = torch.Generator().manual_seed(7)
    tensors = {"a": torch.randn(8, 12, 3, generator=random) * 1e-3,
               "b": torch.randn(8, 64, generator=random)}  # fmt: skip
    total = sum(t.numel() for t in tensors.values())
    with pytest.warns(EmptiedLayerWarning, match="no weight is left in a"):
        prune.magnitude_masks(tensors, 0.6, granularity=granularity, min_per_filter=0)
    masks = prune.magnitude_masks(tensors, 0.6, granularity=granularity, min_per_filter=least)
    for name, mask in masks.items():
        assert bool((mask.flatten(1).sum(1) >= least).all())
        flat = mask.reshape(-1)
        for group in groups_by_loops(tuple(tensors[name].shape), v, w):
            assert len({bool(flat[i]) for i in group}) == 1
    kept = sum(int(m.sum()) for m in masks.values())
    assert 0 <= total - int(0.6 * total) - kept < v * w
    # No more of the small tensor than the shares need.
    per_group = min(v, 8) * w
    rows = -(-8 // v)
    assert int(masks["a"].sum()) <= rows * -(-least // min(w, 12)) * per_group


def test_guard_of_filters_keeps_the_best_one_of_each_tensor() -> None:
    tensors = {"a": torch.arange(1.0, 13.0).view(4, 3) / 1000, "b": torch.ones(4, 6),
               "c": torch.ones(3) * 2}  # fmt: skip
    masks = prune.magnitude_masks(tensors, 0.5, granularity="filter")
    assert masks["a"].all(1).tolist() == [False, False, False, True]
    assert masks["b"].all(1).tolist() == [True, True, False, False]
    assert masks["c"].tolist() == [True, True, True]
    with pytest.warns(EmptiedLayerWarning, match="no weight is left in a"):
        prune.magnitude_masks(tensors, 0.5, granularity="filter", min_per_filter=0)


def test_too_few_weights_for_the_guard_are_named() -> None:
    tensors = {"a": torch.arange(64.0).view(8, 8)}
    with pytest.warns(EmptiedLayerWarning, match=r"6 kept weights are too few .* of a"):
        masks = prune.magnitude_masks(tensors, 0.91, granularity="vector:2")
    assert int(masks["a"].sum()) == 6
    assert torch.equal(masks["a"][:, 7], torch.tensor([False] * 2 + [True] * 6))


def two_of_four_by_loops(tensor: Tensor, within: Tensor | None) -> Tensor:
    outputs, inputs, taps = sizes_of(tuple(tensor.shape))
    flat = tensor.abs().float().reshape(outputs, inputs, taps)
    allowed = torch.ones_like(flat) if within is None else within.reshape(flat.shape)
    mask = torch.zeros(flat.shape, dtype=torch.bool)
    for o, first, tap in itertools.product(range(outputs), range(0, inputs, 4), range(taps)):
        members = [i for i in range(first, min(first + 4, inputs)) if allowed[o, i, tap]]
        ranked = sorted((-float(flat[o, i, tap]), i) for i in members)
        for _, i in ranked[:2]:
            mask[o, i, tap] = True
    return mask.reshape(tensor.shape)


@quiet
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_two_of_four_are_those_of_a_loop(scope: str) -> None:
    random = torch.Generator().manual_seed(3)
    for tensors in (random_tensors(), {n: (t * 2).round() for n, t in random_tensors().items()}):
        outer = {n: torch.rand(t.shape, generator=random) < 0.6 for n, t in tensors.items()}
        for within in (None, outer):
            masks = prune.magnitude_masks(
                tensors, 0.5, scope=scope, granularity="2:4", within=within
            )
            for name, tensor in tensors.items():
                inside = None if within is None else within[name]
                assert torch.equal(masks[name], two_of_four_by_loops(tensor, inside))


def test_two_of_four_follow_the_input_channels() -> None:
    weight = torch.zeros(1, 8, 1, 1, 2)
    weight[0, [1, 2, 3, 4, 5, 6], 0, 0, 1] = torch.tensor([3.0, 2.0, 1.0, 1.0, 2.0, -3.0])
    mask = prune.magnitude_masks({"w": weight}, 0.5, granularity="2:4")["w"]
    assert mask[0, :, 0, 0, 1].nonzero().flatten().tolist() == [1, 2, 5, 6]
    assert mask[0, :, 0, 0, 0].nonzero().flatten().tolist() == [0, 1, 4, 5]


def test_a_linear_layer_is_a_convolution_with_one_tap() -> None:
    linear, conv = nn.Linear(8, 8), nn.Conv3d(8, 8, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view(8, 8, 1, 1, 1))
    for granularity in ("vector:4", "block:2x4", "filter"):
        flat = prune.magnitude_masks(linear, 0.4, granularity=granularity)["weight"]
        deep = prune.magnitude_masks(conv, 0.4, granularity=granularity)["weight"]
        assert torch.equal(flat, deep.view(8, 8))


def test_scores_do_not_depend_on_strides() -> None:
    tensor = random_tensors()["conv"]
    strided = tensor.to(memory_format=torch.preserve_format).transpose(0, 1).contiguous()
    for granularity in ("vector:4", "block:4x3", "filter"):
        masks = [
            prune.magnitude_masks({"w": t}, 0.7, granularity=granularity)["w"]
            for t in (tensor, strided.transpose(0, 1))
        ]
        assert torch.equal(*masks)


@pytest.mark.parametrize("granularity", ["vector:2", "block:2x2", "filter", "2:4"])
def test_nan_is_refused_by_name_also_where_it_cannot_be_kept(granularity: str) -> None:
    tensors = {"a": torch.ones(4, 4), "b": torch.ones(4, 4)}
    tensors["b"][1, 1] = float("nan")
    within = {name: torch.ones(4, 4, dtype=torch.bool) for name in tensors}
    within["b"][1, 1] = False
    with pytest.raises(ArgumentError, match="tensors: 'b' holds NaN"):
        prune.magnitude_masks(tensors, 0.5, granularity=granularity, within=within)


@pytest.mark.parametrize(
    "granularity",
    ["vector", "vector:0", "vector:-4", "vector:4x4", "block:4", "block:0x4", "block:4x", "4:8",
     "filters", "", 4],
)  # fmt: skip
def test_unknown_granularities_are_refused(granularity: Any) -> None:
    with pytest.raises(ArgumentError, match="granularity: expected one of 'weight', 'vector:V'"):
        prune.magnitude_masks({"w": torch.ones(4, 4)}, 0.5, granularity=granularity)


def test_two_of_four_is_half() -> None:
    with pytest.raises(ArgumentError, match=r"sparsity: '2:4' prunes 2 of 4, expected 0\.5, got"):
        prune.magnitude_masks({"w": torch.ones(4, 4)}, 0.75, granularity="2:4")


def test_float64_is_refused_for_groups_too() -> None:
    with pytest.raises(TypeError, match="float64"):
        prune.magnitude_masks({"w": torch.ones(4, 4).double()}, 0.5, granularity="vector:2")
