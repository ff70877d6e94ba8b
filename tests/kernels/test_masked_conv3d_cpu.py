"""The CPU kernels of the masked convolution against the reference in float64.

Memory is poisoned (conftest.py): a number that a kernel leaves unwritten, or takes from an earlier
call, is NaN here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.kernels.masked_conv3d import geometry, packing, run
from sparsekit.kernels.masked_conv3d.plan import WeightList, build
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache
from sparsekit.kernels.vector import LANES, REGISTERS
from sparsekit.ops import explain, masked_conv3d
from tests.kernels.convolutions import (
    CASES,
    DENSITIES,
    Case,
    Compare,
    drawn,
    make_inputs,
    operands,
    run_op,
)

OP = "masked_conv3d_cpu"
THREE = (3, 3, 3)
ONES = (1, 1, 1)

MORE_CASES = [
    pytest.param(Case(3, 5, 7, (5, 3, 11), padding=ONES), id="batch-3-prime"),
    pytest.param(Case(3, 2, 3, (9, 10, 11), padding=ONES, stride=(2, 2, 2)), id="batch-3-strided"),
    pytest.param(Case(1, 2, 3, (1, 1, 1), padding=ONES), id="one-voxel-padded"),
    pytest.param(Case(1, 2, 3, (1, 1, 9), padding=ONES), id="one-row"),
    pytest.param(Case(1, 2, 3, (9, 1, 1), padding=ONES), id="one-column-deep"),
    pytest.param(Case(1, 2, 3, (1, 9, 1), padding=ONES), id="one-row-high"),
    pytest.param(Case(2, 2, 3, (2, 3, 2), ONES, padding=(4, 3, 5)), id="padding-without-reach"),
    pytest.param(Case(2, 2, 3, (2, 3, 2), (2, 2, 2), padding=(4, 3, 5)), id="padding-beyond-reach"),
    pytest.param(
        Case(2, 2, 3, (3, 4, 3), (2, 1, 2), (2, 3, 2), (5, 4, 3)), id="padding-beyond-reach-strided"
    ),
    pytest.param(Case(2, 3, 2, (6, 7, 8), (1, 2, 3), padding=(0, 1, 2)), id="kernel-123"),
    pytest.param(Case(2, 3, 2, (6, 7, 8), (4, 5, 2), padding=(2, 0, 1)), id="kernel-452"),
    pytest.param(Case(1, 2, 2, (7, 7, 7), (5, 5, 5), padding=(2, 2, 2)), id="kernel-555"),
    pytest.param(Case(1, 2, 2, (9, 6, 7), (5, 2, 4), (3, 1, 2), (2, 1, 0)), id="kernel-524"),
    pytest.param(Case(1, 2, 2, (9, 9, 9), THREE, ONES, (4, 4, 4), (4, 4, 4)), id="dilation-4"),
    pytest.param(
        Case(1, 2, 2, (9, 8, 9), THREE, (2, 3, 1), (3, 2, 4), (3, 2, 4)), id="dilated-strided"
    ),
    pytest.param(Case(2, 4, 6, (6, 5, 7), ONES, (2, 2, 2)), id="pointwise-strided"),
    pytest.param(Case(2, 4, 6, (6, 5, 7), ONES, (4, 5, 7)), id="stride-skips-voxels"),
    pytest.param(Case(2, 4, 6, (5, 5, 5), (2, 2, 2), (3, 3, 3)), id="stride-beyond-kernel"),
    pytest.param(Case(2, 6, 9, (5, 6, 7), THREE, padding=ONES, groups=3), id="groups-3"),
    pytest.param(Case(2, 5, 15, (4, 5, 6), THREE, padding=ONES, groups=5), id="depthwise-3-each"),
    pytest.param(Case(1, 1, 3, (6, 7, 5), padding=ONES), id="one-channel-in"),
    pytest.param(Case(1, 3, 1, (6, 7, 5), padding=ONES), id="one-channel-out"),
    pytest.param(Case(1, 130, 67, (4, 5, 6), padding=ONES), id="many-channels"),
    pytest.param(Case(1, 2, 3, (3, 40, 45), padding=ONES), id="several-tiles-per-plane"),
    pytest.param(Case(1, 2, 3, (40, 2, 3), padding=ONES), id="deep"),
    pytest.param(Case(1, 2, 2, (3, 4, 200), padding=ONES), id="long-rows"),
]  # fmt: skip


def named(name: str) -> Case:
    (case,) = (p.values[0] for p in [*CASES, *MORE_CASES] if p.id == name)
    assert isinstance(case, Case)
    return case


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def voxel_mask(case: Case, kind: str) -> Tensor:
    shared = {"shared": 0.4, "sparse": 0.02}
    random = torch.Generator().manual_seed(5)
    if kind in shared:
        return torch.rand(case.out, generator=random) < shared[kind]
    found = torch.zeros(case.batch, 1, *case.out, dtype=torch.bool)
    if kind == "per-scan":
        found = torch.rand(found.shape, generator=random) < 0.4
    elif kind == "one-voxel":
        found[-1, 0, -1, case.out[1] // 2, -1] = True
    elif kind == "full":
        found[:] = True
    return found


def check(
    compare: Compare, leaves: list[Tensor], mask: Tensor, grad: Tensor, case: Case, **more: Any
) -> list[Tensor]:
    found = run_op(leaves, mask, grad, case, **more)
    doubles = [t.double() for t in leaves]
    exact = run_op(doubles, mask, grad.double(), case, "reference", **more)
    for direction, result, wanted in zip(
        ("forward", "input", "weight", "bias"), found, exact, strict=True
    ):
        compare(OP, direction, result, wanted.numpy())
        assert result.is_contiguous()
    assert not bool(found[2][~mask].any())
    return found


def check_case(case: Case, density: str, compare: Compare) -> None:
    leaves, mask, grad = operands(case, density)
    check(compare, leaves, mask, grad, case)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", [*CASES, *MORE_CASES])
def test_values_and_gradients(case: Case, density: str, compare: Compare) -> None:
    if case.batch == 0:
        leaves, mask, grad = operands(case, density)
        found = run_op(leaves, mask, grad, case, "auto")
        assert found[0].shape == (0, case.c_out, *case.out)
        assert not any(bool(t.any()) for t in found)
        assert str(explain()).count("x is empty")
        return
    check_case(case, density, compare)


# What is decided by size, forced. Every mode changes the way through the kernels.
MODES: dict[str, dict[str, int]] = {
    "one-channel-blocks": {"_FIRST_CACHE_BYTES": 1, "_SECOND_CACHE_BYTES": 1},
    "blocks-of-3": {"_FIRST_CACHE_BYTES": 0, "_SECOND_CACHE_BYTES": -3},
    "stream": {"_STREAM_BYTES": 0},
    "prefetch": {"_PREFETCH_BYTES": 0},
    "threads": {"_WORK_PER_THREAD": 0, "_BYTES_PER_THREAD": 0},
    "all": {
        "_FIRST_CACHE_BYTES": 1, "_SECOND_CACHE_BYTES": 1, "_STREAM_BYTES": 0,
        "_PREFETCH_BYTES": 0, "_WORK_PER_THREAD": 0, "_BYTES_PER_THREAD": 0,
    },
}  # fmt: skip


def set_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    for name, value in MODES[mode].items():
        if value >= 0:
            (owner,) = [m for m in (geometry, packing, run) if hasattr(m, name)]
            monkeypatch.setattr(owner, name, value)
        else:
            # Blocks of so many channels, whatever their size.
            monkeypatch.setattr(run, "block_channels", lambda *_, n=-value: n)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name",
    [
        "same-size", "groups-3", "dilated-strided", "several-tiles-per-plane", "deep",
        "batch-3-prime", "padding-beyond-reach", "long-rows", "everything", "many-channels",
    ],
)  # fmt: skip
def test_every_way_through_the_kernels(
    name: str, mode: str, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = named(name)
    set_mode(monkeypatch, mode)
    check_case(case, "half", compare)


def test_the_modes_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(1, 7, 8, (4, 5, 6), padding=ONES)
    leaves, mask, _ = operands(case, "half")
    shape = geometry.shape_of(leaves[0], leaves[1], ONES, ONES, ONES, 1)
    assert run.plan_of(mask.clone(), shape).forward.blocks == 1
    set_mode(monkeypatch, "one-channel-blocks")
    made = run.plan_of(mask.clone(), shape)
    assert (made.forward.blocks, made.backward.blocks) == (7, 8)
    set_mode(monkeypatch, "blocks-of-3")
    made = run.plan_of(mask.clone(), shape)
    assert (made.forward.blocks, made.backward.blocks) == (3, 3)


@pytest.mark.parametrize("kind", ["shared", "sparse", "per-scan", "one-voxel", "full", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "same-size", "stride-uneven", "everything", "padding-without-reach",
        "several-tiles-per-plane", "deep", "batch-3-prime", "kernel-452",
    ],
)  # fmt: skip
def test_voxel_masks(name: str, kind: str, compare: Compare) -> None:
    case = named(name)
    leaves, mask, grad = operands(case, "half")
    voxels = voxel_mask(case, kind)
    found = check(compare, leaves, mask, grad, case, voxel_mask=voxels)
    assert not bool(found[0][(~voxels).expand_as(found[0])].any())


def test_what_lies_outside_a_voxel_mask_may_hold_anything() -> None:
    case = Case(2, 3, 4, (5, 6, 20), padding=ONES)
    leaves, mask, grad = operands(case, "half")
    voxels = torch.zeros(case.out, dtype=torch.bool)
    voxels[:2, :2] = True
    expected = run_op(leaves, mask, grad, case, voxel_mask=voxels)
    # Neither the gradient there nor what only those voxels read.
    dirty_grad = torch.where(voxels, grad, float("nan"))
    dirty_x = leaves[0].detach().clone()
    dirty_x[:, :, 4:] = float("nan")
    found = run_op([dirty_x, *leaves[1:]], mask, dirty_grad, case, voxel_mask=voxels)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[3], expected[3])


def spread_out(x: Tensor) -> Tensor:
    """The same numbers, with NaN between them."""
    wide = torch.full((*x.shape, 3), float("nan"), dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "turned": lambda x: x.transpose(2, 4).contiguous().transpose(2, 4),
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "spread-out": spread_out,
    "offset": lambda x: torch.cat([x.new_full((3,), float("nan")), x.flatten()])[3:].view(x.shape),
    "flipped": lambda x: x.flip(3).contiguous().flip(3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_memory_layouts_change_no_bit(layout: str, stride: int) -> None:
    case = Case(2, 3, 5, (6, 7, 9), padding=ONES, stride=(stride, stride, stride))
    leaves, mask, grad = operands(case, "half")
    expected = run_op(leaves, mask, grad, case)
    change = LAYOUTS[layout]
    x, weight = change(leaves[0].detach()), change(leaves[1].detach())
    bias = spread_out(leaves[2].detach())
    laid_mask = mask.transpose(2, 4).contiguous().transpose(2, 4)
    assert torch.equal(x, leaves[0])
    assert not laid_mask.is_contiguous()
    found = run_op([x, weight, bias], laid_mask, change(grad), case)
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result, wanted)
    voxels = voxel_mask(case, "per-scan")
    expected = run_op(leaves, mask, grad, case, voxel_mask=voxels)
    laid_voxels = voxels.transpose(2, 4).contiguous().transpose(2, 4)
    found = run_op([x, weight, bias], mask, change(grad), case, voxel_mask=laid_voxels)
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result, wanted)


def test_expanded_inputs_and_gradients(compare: Compare) -> None:
    case = Case(2, 3, 4, (5, 6, 7), padding=ONES)
    leaves, mask, _ = operands(case, "half")
    x = leaves[0].detach()[:1, :1].expand(2, 3, 5, 6, 7)
    check(compare, [x, *leaves[1:]], mask, torch.ones(()).expand(2, 4, 5, 6, 7), case)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stride", [1, 2])
def test_pruned_weights_may_hold_anything(poison: float, stride: int) -> None:
    case = Case(2, 3, 4, (5, 6, 7), padding=ONES, stride=(stride, stride, stride))
    leaves, mask, grad = operands(case, "half")
    expected = run_op(leaves, mask, grad, case)
    dirty = torch.where(mask, leaves[1], poison)
    for result, wanted in zip(run_op([leaves[0], dirty, leaves[2]], mask, grad, case), expected,
        strict=True):  # fmt: skip
        assert torch.equal(result, wanted)


def test_without_a_bias_and_one_scan_without_batch(compare: Compare) -> None:
    leaves, mask, _ = operands(Case(1, 3, 4, (5, 6, 7), padding=ONES), "half")
    y = masked_conv3d(leaves[0][0], leaves[1], mask, backend="cpu", padding=1)
    wanted = masked_conv3d(leaves[0].double(), leaves[1].double(), mask, padding=1)[0]
    compare(OP, "forward", y, wanted.detach().numpy())


@pytest.mark.parametrize("needed", range(1, 8))
def test_only_the_gradients_that_are_needed(needed: int) -> None:
    case = Case(2, 3, 4, (5, 6, 7), padding=ONES, stride=(1, 2, 1))
    leaves, mask, grad = operands(case, "half")
    expected = run_op(leaves, mask, grad, case)[1:]
    own = [t.detach().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate(leaves)]
    masked_conv3d(own[0], own[1], mask, own[2], backend="cpu", **case.options).backward(grad)
    for i, leaf in enumerate(own):
        assert (leaf.grad is not None) == bool(needed >> i & 1)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, expected[i])


def test_sizes_that_end_at_every_lane(compare: Compare) -> None:
    """Row ends, tile ends and plane ends at every place within a vector."""
    for width in range(1, 2 * LANES + 3):
        check_case(Case(1, 2, 2, (2, 3, width), padding=ONES), "half", compare)
        check_case(Case(1, 2, 2, (3, 4, width + 2)), "half", compare)


axis = st.tuples(
    st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 3)
)  # size, kernel, stride, padding, dilation


@settings(drawn, max_examples=150)
@given(
    axes=st.tuples(axis, axis, axis),
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    density=st.sampled_from(DENSITIES),
    voxels=st.sampled_from([None, None, "shared", "per-scan", "one-voxel"]),
)
def test_drawn_shapes(
    compare: Compare,
    axes: tuple[tuple[int, ...], ...],
    batch: int,
    channels: tuple[int, int, int],
    density: str,
    voxels: str | None,
) -> None:
    by_argument = [(values[0], values[1], values[2]) for values in zip(*axes, strict=True)]
    grid, kernel, stride, padding, dilation = by_argument
    c_in, c_out, groups = channels
    case = Case(
        batch, c_in * groups, c_out * groups, grid, kernel, stride, padding, dilation, groups
    )
    assume(min(case.out) >= 1)
    leaves, mask, grad = operands(case, density)
    more = {} if voxels is None else {"voxel_mask": voxel_mask(case, voxels)}
    check(compare, leaves, mask, grad, case, **more)


def test_plans_of_several_geometries_share_a_mask() -> None:
    case = Case(1, 2, 3, (5, 6, 7), padding=ONES)
    leaves, mask, _ = operands(case, "half")
    grids = [(5, 6, 7), (4, 6, 7), (5, 5, 7), (5, 6, 6), (3, 3, 3), (5, 6, 7), (8, 8, 8)]
    for grid in grids:
        other = replace(case, grid=grid, options={})
        x, _, _ = make_inputs(other, torch.float32)
        grad = torch.ones(1, 3, *other.out)
        found = run_op([x, *leaves[1:]], mask, grad, other)
        wanted = run_op([x, *leaves[1:]], mask, grad, other, "reference")
        for result, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(result, exact, rtol=1e-5, atol=1e-4)
        assert len(PlanCache.of(mask).plans) <= PlanCache.MOST


@pytest.mark.parametrize("density", DENSITIES)
def test_lists_hold_each_unpruned_weight_once_and_in_order(density: str) -> None:
    many_taps = pytest.param(Case(2, 3, 4, (9, 9, 9), (5, 5, 4)))
    for param in [*CASES, *MORE_CASES, many_taps]:
        case = param.values[0]
        assert isinstance(case, Case)
        if case.batch == 0:
            continue
        leaves, mask, _ = operands(case, density)
        shape = geometry.shape_of(
            leaves[0], leaves[1], case.stride, case.padding, case.dilation, case.groups
        )
        layout = geometry.geometry(shape, LANES, REGISTERS)
        for forward_block, backward_block in ((1, 1), (2, 3), (100, 100)):
            made = build(mask, layout, forward_block, backward_block)
            o, c, tap = np.nonzero(mask.flatten(2).numpy())
            position = np.flatnonzero(mask.numpy())
            channel = o // (shape.c_out // shape.groups) * mask.shape[1] + c
            row = np.array(layout.tap_classes, np.int64)[tap] * shape.c_in + channel
            rows = layout.source.channels
            check_list(
                made.forward, position, c // forward_block * shape.c_out + o,
                row * layout.source.channel + np.array(layout.source_taps, np.int64)[tap],
            )  # fmt: skip
            check_list(
                made.backward, position, o // backward_block * rows + row,
                o * layout.gradient.channel + np.array(layout.gradient_taps, np.int64)[tap],
            )  # fmt: skip
            assert (made.forward.rows, made.backward.rows) == (shape.c_out, rows)


def check_list(
    entries: WeightList,
    position: np.ndarray,
    row: np.ndarray,
    offset: np.ndarray,
) -> None:
    """Entries are sorted by row, and in a row by their place in the weight."""
    order = np.argsort(row, kind="stable")
    assert np.array_equal(entries.index, position[order])
    assert np.array_equal(entries.offsets, offset[order])
    counts = np.bincount(row, minlength=entries.blocks * entries.rows)
    assert np.array_equal(np.diff(entries.starts), counts)
    assert entries.starts[0] == 0
    for parts in (1, 2, 3):
        edges = entries.edges(parts)
        assert edges[0] == 0
        assert edges[-1] == entries.rows
        assert bool((np.diff(edges) >= 0).all())
