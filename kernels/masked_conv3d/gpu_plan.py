"""Everything about a masked convolution on a GPU that its mask and sizes settle."""

import itertools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsekit.kernels.masked_conv3d.columns import Filters, Lists, Source, build
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.padded import Padded
from sparsekit.kernels.masked_conv3d.strips import Strips, places, strips_of
from sparsekit.types import Size3


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one kernel's tiles, and how it is compiled."""

    rows: int
    """Output channels of a program (input channels, for the input gradient)."""
    entries: int
    """Columns at a time."""
    voxels: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """Tiles of the three passes, and how wide the runs of their columns are."""

    forward: Tile
    input_gradient: Tile
    weight_gradient: Tile
    """Rows as in `forward`, whose lists it takes."""
    width: int
    """Input channels of a run in the forward pass; 1 for single columns."""
    gradient_width: int
    """Output channels of a run in the input gradient."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One launch of the product: which voxels, from which columns."""

    lists: Lists
    steps: Tensor
    strips: Strips
    first: Size3
    """First voxel of the output that the launch writes."""
    every: Size3
    """From one voxel that it writes to the next."""
    reach: tuple[Size3, Size3]
    """Voxels of the source that an output voxel reads, from its own place on: first and last."""
    places: Tensor
    """Of the voxels in the source."""
    targets: dict[Hashable, Tensor] = field(default_factory=dict)
    """Of the voxels in the output, by its strides."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Buffers' layouts and lists of one convolution."""

    shape: Shape
    settings: Settings
    source: Padded
    forward: Pass
    gradient_steps: Tensor
    """(tiles,): steps of the forward lists as the weight gradient takes them."""
    gradient_strips: Strips
    gradient: Padded
    """Of the output's gradient."""
    backward: tuple[Pass, ...]
    """For every remainder that an input voxel leaves when it is divided by the stride."""
    x_places: Tensor
    """Of the output's voxels in the source, as the weight gradient counts them."""
    g_places: Tensor
    """The same in the output's gradient."""


def make(mask: Tensor, shape: Shape, settings: Settings) -> Plan:
    """Lay out a convolution's buffers and build its lists.

    Parameters
    ----------
    mask : Tensor, (c_out, c_in / groups, kd, kh, kw), bool
    shape : Shape
    settings : Settings
    """
    groups, per_group = shape.groups, shape.c_in // shape.groups
    rows_per_group = shape.c_out // groups
    taps = math.prod(shape.kernel)
    kept = mask.reshape(groups, rows_per_group, per_group, taps)

    strips = strips_of(shape.out, settings.forward.voxels)
    gradient_strips = strips_of(shape.out, settings.weight_gradient.voxels)
    covered = _most(strips.covered, gradient_strips.covered)
    last_tap = _axes(lambda k, e: (k - 1) * e, shape.kernel, shape.dilation)
    source = Padded(
        per_group,
        _up(per_group, settings.width),
        groups,
        shape.padding,
        _axes(lambda n, s, t: (n - 1) * s + t + 1, covered, shape.stride, last_tap),
        settings.width > 1,
    )
    tap_places = list(itertools.product(*(range(k) for k in shape.kernel)))
    offsets = [
        sum(t * e * s for t, e, s in zip(tap, shape.dilation, source.axes, strict=True))
        for tap in tap_places
    ]
    strided = _axes(lambda a, s: a * s, source.axes, shape.stride)
    lists = build(
        Filters(kept, per_group * taps, taps, _int32(range(taps), mask), 0),
        Source(source.channel, source.group, _int32(offsets, mask)),
        settings.forward.rows,
        settings.width,
        max(settings.forward.entries, settings.weight_gradient.entries),
    )
    forward = Pass(
        lists, _steps(lists, settings.forward), strips, (0, 0, 0), (1, 1, 1),
        (_axes(lambda p: -p, shape.padding), _axes(lambda t, p: t - p, last_tap, shape.padding)),
        places(strips, strided, source.sample, mask.device, outside=True),
    )  # fmt: skip

    classes = _classes(shape, settings.input_gradient.voxels)
    gradient = _gradient_layout(shape, settings, classes, gradient_strips)
    backward = []
    for strips_in, first, reached in classes:
        chosen = [i for i, t in enumerate(tap_places) if _reached(t, reached) is not None]
        reads = [_reached(tap_places[i], reached) for i in chosen]
        found = [place for place in reads if place is not None]
        at = [_dot(place, gradient.axes) for place in found]
        # Rows are input channels: their own place in the weight is that of the first filter.
        lists = build(
            Filters(
                kept[:, :, :, chosen].transpose(1, 2),
                taps,
                per_group * taps,
                _int32(chosen, mask),
                (rows_per_group - 1) * per_group * taps,
            ),
            Source(gradient.channel, gradient.group, _int32(at, mask)),
            settings.input_gradient.rows,
            settings.gradient_width,
            settings.input_gradient.entries,
        )
        low, high = _ends(found)
        backward.append(
            Pass(
                lists, _steps(lists, settings.input_gradient), strips_in, first, shape.stride,
                (low, high),
                places(strips_in, gradient.axes, gradient.sample, mask.device, outside=True),
            )
        )  # fmt: skip
    return Plan(
        shape, settings, source, forward, _steps(forward.lists, settings.weight_gradient),
        gradient_strips, gradient, tuple(backward),
        places(gradient_strips, strided, source.sample, mask.device, outside=True),
        places(gradient_strips, gradient.axes, gradient.sample, mask.device, outside=False),
    )  # fmt: skip


# Per axis and tap: the output voxel that a class's first input voxel reads through it, or None.
Reached = tuple[list[int | None], list[int | None], list[int | None]]


def _classes(shape: Shape, voxels: int) -> list[tuple[Strips, Size3, Reached]]:
    """Input voxels by the remainder that they leave: their strips, the first one, what it reads."""
    per_axis: list[list[tuple[int, int, list[int | None]]]] = []
    axes = zip(shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    for size, kernel, stride, padding, dilation in axes:
        found = []
        for first in range(min(stride, size)):
            reads = [first + padding - tap * dilation for tap in range(kernel)]
            reached = [r // stride if r % stride == 0 else None for r in reads]
            found.append((first, -(-(size - first) // stride), reached))
        per_axis.append(found)
    classes = []
    for d, h, w in itertools.product(*per_axis):
        strips = strips_of((d[1], h[1], w[1]), voxels)
        classes.append((strips, (d[0], h[0], w[0]), (d[2], h[2], w[2])))
    return classes


def _gradient_layout(
    shape: Shape, settings: Settings, classes: list[tuple[Strips, Size3, Reached]],
    gradient_strips: Strips,
) -> Padded:  # fmt: skip
    """Room for all that the input gradient's tiles and the weight gradient's read."""
    front, extent = [0, 0, 0], list(gradient_strips.covered)
    for strips, _, reached in classes:
        for axis in range(3):
            for place in (p for p in reached[axis] if p is not None):
                front[axis] = max(front[axis], -place)
                extent[axis] = max(extent[axis], place + strips.covered[axis])
    per_group = shape.c_out // shape.groups
    return Padded(
        per_group,
        _up(per_group, max(settings.forward.rows, settings.gradient_width)),
        shape.groups,
        (front[0], front[1], front[2]),
        (front[0] + extent[0], front[1] + extent[1], front[2] + extent[2]),
        settings.gradient_width > 1,
    )


def _reached(tap: tuple[int, ...], reached: Reached) -> Size3 | None:
    d, h, w = (places[t] for places, t in zip(reached, tap, strict=True))
    return None if d is None or h is None or w is None else (d, h, w)


def _ends(places: list[Size3]) -> tuple[Size3, Size3]:
    if not places:
        return (0, 0, 0), (0, 0, 0)
    low = [min(place[axis] for place in places) for axis in range(3)]
    high = [max(place[axis] for place in places) for axis in range(3)]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _steps(lists: Lists, tile: Tile) -> Tensor:
    return -(-lists.counts // tile.entries)


def _int32(values: "range | list[int]", like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32).to(like.device, non_blocking=True)


def _axes(function: Callable[..., int], *sizes: Size3) -> Size3:
    d, h, w = (function(*axis) for axis in zip(*sizes, strict=True))
    return d, h, w


def _dot(place: Size3, steps: Size3) -> int:
    return sum(p * s for p, s in zip(place, steps, strict=True))


def _most(a: Size3, b: Size3) -> Size3:
    return _axes(max, a, b)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
