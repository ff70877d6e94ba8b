"""Buffers never overlap, are joined when they come back, and a repeated step takes none anew."""

import gc
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsekit.kernels import buffers

SMALLEST = buffers.SMALLEST_BYTES // 4


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    gc.collect()
    buffers.release()
    yield
    gc.collect()
    buffers.release()


def span(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + 4 * x.numel()


def test_small_ones_are_torchs() -> None:
    before = buffers.held_bytes()
    x = buffers.empty((SMALLEST - 1,))
    assert buffers.held_bytes() == before
    assert x.shape == (SMALLEST - 1,)
    assert buffers.empty(()).shape == ()


def test_they_shrink_in_place_and_grow_as_a_copy() -> None:
    """torch cannot resize memory that is not its own; kernels/masked_conv3d/README.md says so."""
    x = buffers.empty((2, SMALLEST)).fill_(3.0)
    assert x.resize_(1, SMALLEST).shape == (1, SMALLEST)
    with pytest.raises(RuntimeError, match="not resizable"):
        x.resize_(3, SMALLEST)
    assert x.clone().resize_(3, SMALLEST)[0, -1] == 3.0


def test_ranges_are_joined_and_used_again() -> None:
    lent, held = buffers.held_bytes()
    whole = buffers.empty((8, SMALLEST))
    begin, end = span(whole)
    assert begin % 64 == 0
    assert buffers.held_bytes() == (lent + end - begin, held + end - begin)
    del whole
    parts = [buffers.empty((2, SMALLEST)) for _ in range(4)]
    spans = sorted(map(span, parts))
    assert spans[0][0] == begin
    assert spans[-1][1] == end
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    # Back in an order in which each joins those before it, after it, and both.
    for i in (1, 3, 2, 0):
        parts[i] = parts[i][:0].clone()
    assert buffers.held_bytes()[0] == lent
    assert span(buffers.empty((8, SMALLEST))) == (begin, end)


def test_a_repeated_step_takes_no_new_memory() -> None:
    sizes = [30, 14, 28, 7, 15, 4, 4, 2, 8]

    def step() -> None:
        kept = []
        for i, size in enumerate(sizes):
            kept.append(buffers.empty((size, SMALLEST)))
            if i % 3 == 2:
                del kept[-2]
        while kept:
            kept.pop(0)
            grown = [buffers.empty((size, SMALLEST)) for size in (3, 13)]
            del grown

    for _ in range(2):
        step()
    held = buffers.held_bytes()
    slabs = [slab.numbers.ctypes.data for slab in buffers._slabs]
    for _ in range(5):
        step()
    assert buffers.held_bytes() == held
    assert [slab.numbers.ctypes.data for slab in buffers._slabs] == slabs


def test_old_sizes_make_room() -> None:
    """What is held does not grow with the number of sizes that were in use one after another."""
    most = 0
    for size in range(20, 60):
        x = buffers.empty((size, SMALLEST))
        most = max(most, buffers.held_bytes()[1])
        del x
    assert most <= 2.5 * 60 * 4 * SMALLEST


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 40)), max_size=60))
def test_buffers_in_use_never_overlap(steps: list[tuple[int, int]]) -> None:
    used: dict[int, Tensor] = {}
    for name, size in steps:
        if name in used:
            assert bool((used[name] == name).all())
            del used[name]
        else:
            used[name] = buffers.empty((SMALLEST + 17 * size,)).fill_(name)
        spans = sorted(map(span, used.values()))
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(bool((x == name).all()) for name, x in used.items())
    free = [slab.free for slab in buffers._slabs]
    assert all(a[1] < b[0] for ranges in free for a, b in pairwise(ranges))
    lent = sum(-(-x.numel() // 16) * 64 for x in used.values())
    assert buffers.held_bytes()[0] == lent
    assert (
        lent + sum(4 * (end - begin) for ranges in free for begin, end in ranges)
        == (buffers.held_bytes()[1])
    )
    used.clear()
    assert buffers.held_bytes()[0] == 0
    assert all(slab.unused for slab in buffers._slabs)
