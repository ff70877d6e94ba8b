"""Lists, boxes and padded buffers of the GPU kernels, which need neither a GPU nor Triton."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.kernels.masked_conv3d.boxes import boxes_of, live_boxes
from sparsekit.kernels.masked_conv3d.columns import Filters, Source, build
from sparsekit.kernels.masked_conv3d.padded import Padded, pack
from sparsekit.types import Size3

sizes = st.tuples(*[st.integers(1, 40)] * 3)


@given(sizes, st.sampled_from([16, 32, 64, 128]))
def test_boxes_cover_the_grid_with_as_few_as_possible(grid: Size3, voxels: int) -> None:
    boxes = boxes_of(grid, voxels)
    assert boxes.voxels == voxels
    assert all(c >= n for c, n in zip(boxes.covered, grid, strict=True))
    assert all(c - b < n for c, b, n in zip(boxes.covered, boxes.box, grid, strict=True))
    for d, h in itertools.product([1, 2, 4, 8, 16], repeat=2):
        w = voxels // (d * h)
        if w in (1, 2, 4, 8, 16) and d * h * w == voxels:
            count = 1
            for n, b in zip(grid, (d, h, w), strict=True):
                count *= -(-n // b)
            assert boxes.count <= count


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(-2, 2)] * 3),
    st.tuples(*[st.integers(0, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3),
    st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_live_boxes_are_those_that_reach_a_voxel(
    grid: Size3, low: Size3, more: Size3, step: Size3, density: float, seed: int
) -> None:
    boxes = boxes_of(grid, 16)
    high: Any = tuple(a + b for a, b in zip(low, more, strict=True))
    before: Any = tuple(-a for a in low)
    mask = torch.rand((2, 7, 5, 9), generator=torch.Generator().manual_seed(seed)) < density
    found = live_boxes(mask, boxes, before, high, step).view(2, *boxes.per_axis)
    for at in itertools.product(*map(range, boxes.per_axis)):
        spans = []
        for axis in range(3):
            first = at[axis] * boxes.box[axis] * step[axis] + low[axis]
            last = (at[axis] * boxes.box[axis] + boxes.box[axis] - 1) * step[axis] + high[axis]
            spans.append(slice(max(0, first), max(0, last + 1)))
        expected = mask[:, spans[0], spans[1], spans[2]].flatten(1).any(dim=1)
        assert torch.equal(found[:, at[0], at[1], at[2]], expected)


def listed(kept: Tensor, rows: int, width: int) -> list[set[tuple[int, int]]]:
    """Live columns (channel, tap) of each tile, one look at a time."""
    found = []
    for first in range(0, kept.shape[0], rows):
        tile = kept[first : first + rows].any(dim=0)
        live = set()
        for start in range(0, kept.shape[1], width):
            for tap in range(kept.shape[2]):
                if tile[start : start + width, tap].any():
                    live |= {(c, tap) for c in range(start, start + width)}
        found.append(live)
    return found


@settings(deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.sampled_from([16, 32]),
    st.sampled_from([1, 16]), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_lists_hold_the_live_columns_in_order(
    rows: int, channels: int, taps: int, tile: int, width: int, density: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    kept = torch.rand((2, rows, channels, taps), generator=random) < density
    steps = torch.arange(taps, dtype=torch.int32)
    lists = build(
        Filters(kept, channels * taps, taps, steps, 7),
        Source(100, 10_000, steps * 3),
        tile,
        width,
        16,
    )
    assert lists.offsets.shape == lists.sources.shape
    assert lists.length % 16 == 0
    tiles = lists.tiles_per_group
    for group in range(2):
        for i, live in enumerate(listed(kept[group], tile, width)):
            own = group * tiles + i
            count = int(lists.counts[own])
            assert count == len(live)
            expected = sorted(live, key=lambda c: (c[0] // width, c[1], c[0]))
            at = [c * 100 + t * 3 + group * 10_000 for c, t in expected]
            of = [c * taps + t + group * 7 if c < channels else -1 for c, t in expected]
            assert lists.offsets[own, :count].tolist() == at
            assert lists.sources[own, :count].tolist() == of
            assert (lists.sources[own, count:] == -1).all()
            assert (lists.offsets[own, count:] == 0).all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("extent", [(2, 3, 4), (7, 6, 9)])
def test_padded_copies_say_where_each_number_is(last: bool, extent: Size3) -> None:
    layout = Padded(3, 16, 2, (1, 0, 2), extent, last)
    x = torch.randn((2, 6, 4, 5, 3), generator=torch.Generator().manual_seed(0))
    flat = pack(x, layout).view(-1)
    assert flat.numel() == 2 * layout.sample
    expected = torch.zeros_like(flat)
    for n, c, *voxel in itertools.product(*map(range, x.shape)):
        at = [v + f for v, f in zip(voxel, layout.front, strict=True)]
        if all(a < e for a, e in zip(at, extent, strict=True)):
            place = n * layout.sample + c // 3 * layout.group + c % 3 * layout.channel
            place += sum(a * s for a, s in zip(at, layout.axes, strict=True))
            expected[place] = x[n, c, voxel[0], voxel[1], voxel[2]]
    assert torch.equal(flat, expected)
