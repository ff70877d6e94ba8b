"""Lists, strips and padded buffers of the GPU kernels, which need neither a GPU nor Triton."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.kernels.masked_conv3d.columns import Filters, Source, build
from sparsekit.kernels.masked_conv3d.padded import Padded, pack
from sparsekit.kernels.masked_conv3d.strips import Strips, live_tiles, strips_of
from sparsekit.types import Size3

sizes = st.tuples(*[st.integers(1, 40)] * 3)


def numbered(strips: Strips) -> list[Size3]:
    """Voxels of one sample in the order of their numbers."""
    down, across = strips.counts
    order = []
    for i, j, w in itertools.product(range(down), range(across), range(strips.grid[2])):
        for a, b in itertools.product(*map(range, strips.cross)):
            order.append((i * strips.cross[0] + a, j * strips.cross[1] + b, w))
    return order


@given(sizes, st.sampled_from([16, 32, 64, 128]))
def test_strips_number_every_voxel_once_and_waste_little(grid: Size3, voxels: int) -> None:
    strips = strips_of(grid, voxels)
    order = numbered(strips)
    assert len(order) == len(set(order)) == strips.per_sample
    inside = [place for place in order if all(a < n for a, n in zip(place, grid, strict=True))]
    assert len(inside) == grid[0] * grid[1] * grid[2]
    assert len(order) <= 1.02 * len(inside)
    assert (strips.tiles(3) - 1) * voxels < 3 * strips.per_sample <= strips.tiles(3) * voxels


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(-2, 2)] * 3),
    st.tuples(*[st.integers(0, 3)] * 3), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_live_tiles_are_those_that_reach_a_voxel(
    grid: Size3, low: Size3, more: Size3, density: float, seed: int
) -> None:
    strips = strips_of(grid, 16)
    high: Any = tuple(a + b for a, b in zip(low, more, strict=True))
    mask = torch.rand((2, 7, 5, 9), generator=torch.Generator().manual_seed(seed)) < density
    expected = torch.zeros(strips.tiles(2), dtype=torch.bool)
    order = numbered(strips)
    for n, (i, place) in itertools.product(range(2), enumerate(order)):
        spans = [
            slice(max(0, a + lo), max(0, a + hi + 1))
            for a, lo, hi in zip(place, low, high, strict=True)
        ]
        if mask[n, spans[0], spans[1], spans[2]].any():
            expected[(n * len(order) + i) // 16] = True
    assert torch.equal(live_tiles(mask, strips, low, high), expected)


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
