"""Where the numbers of a convolution stand in memory, so that every tap is one constant offset.

A grid (d, h, w) is stored as padded planes, and a plane as padded rows one after another. The zeros
that end a row are those that begin the next, and likewise for planes and channels. The output
voxel at row ``y`` and column ``x`` has the flat number ``y * pitch + x`` in its plane, and a tap
finds its input at a constant offset from there, whatever the voxel. So a tile of consecutive flat
numbers is computed with whole vectors, and what lies between the rows comes out as garbage that
nobody reads.

With a stride, the input is first sorted by the remainders of its coordinates: each of the
``stride`` classes per axis becomes a grid of its own, over which the convolution has stride 1.

All sizes and offsets count float32 numbers.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from sparsekit.types import Size3

CHANNELS_AT_ONCE = 4
"""Output channels that share a loaded vector where most weights are kept."""
BLOCK_GRADIENT_BYTES = 8 << 20
"""Padded gradient that a fused block has in memory at a time: a last cache should hold it."""
# Registers beside a tile: a broadcast weight, a loaded vector, and one to spare.
_OTHER_REGISTERS = 3
# Vectors that one step through a tile's list costs beside its products.
_STEP_COST = 1.5
# A block of channels should stay in the first cache if each of its lists is long enough to pay for
# reading and writing the tile's sums once more, else in the second.
_FIRST_CACHE_BYTES = 32 << 10
_SECOND_CACHE_BYTES = 384 << 10
_LEAST_ENTRIES = 6.0
_MOST_COLUMNS = 27
_FEWEST_PLANES = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one convolution, batch aside."""

    c_in: int
    c_out: int
    size: Size3
    kernel: Size3
    stride: Size3
    padding: Size3
    dilation: Size3
    groups: int

    @property
    def out(self) -> Size3:
        """Grid of the output."""
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        d, h, w = ((n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, s, p, e in axes)
        return d, h, w


def shape_of(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Shape:  # fmt: skip
    """Sizes of a convolution of `x` (n, c_in, d, h, w) with `weight`."""
    d, h, w = x.shape[2:]
    kd, kh, kw = weight.shape[2:]
    steps, pad, spread = ((v[0], v[1], v[2]) for v in (stride, padding, dilation))
    return Shape(x.shape[1], weight.shape[0], (d, h, w), (kd, kh, kw), steps, pad, spread, groups)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a pass cuts its planes into register tiles."""

    rows: int
    """Planes of a tile."""
    columns: int
    """Vectors of a tile in each plane."""
    per_plane: int
    """Tiles side by side."""
    planes: int
    """Planes that all tiles together cover, in steps of `rows`."""

    @property
    def tiles(self) -> int:
        """Tiles of one channel."""
        return self.per_plane * (self.planes // self.rows)


@dataclass(frozen=True, slots=True)
class Grid:
    """A padded buffer: channels of planes."""

    channels: int
    """Channels per sample, or classes of a strided input times its channels."""
    plane: int
    """From one plane to the next."""
    channel: int
    """From one channel to the next."""
    interior: int
    """From the start of a channel to its first voxel."""
    sample: int
    """From one sample to the next; what lies behind the last channel is zero."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Layout of the three buffers of a convolution, and its tilings."""

    shape: Shape
    lanes: int
    """Numbers of a vector."""
    pitch: int
    """From one row to the next, in all buffers."""
    source: Grid
    """The padded input."""
    gradient: Grid
    """The padded gradient of the output."""
    target: Grid
    """The output as the tiles write it."""
    source_gradient: Grid
    """The gradient of the input as the tiles write it, in the coordinates of `source`."""
    forward: Tiling
    backward: Tiling
    grouped: Tiling
    """Of the forward pass where several output channels share what is loaded."""
    source_taps: tuple[int, ...]
    """Offset in `source` of each tap, from the tap's class on."""
    gradient_taps: tuple[int, ...]
    """Offset in `gradient` of each tap, for the voxel with the same number in its class."""
    tap_classes: tuple[int, ...]
    """Class of each tap; 0 without stride."""
    classes: Size3
    """Number of classes along each axis."""
    reach: int
    """Planes of `gradient` that a plane of the input reads besides the one with its number."""
    resident: int
    """Planes of `gradient` that are in memory at a time; 0 if all of them are."""

    @property
    def fits_offsets(self) -> bool:
        """Whether a scan's padded planes can be reached with the 32-bit offsets of the lists."""
        return max(self.source.sample, self.gradient.sample) < 1 << 31


def _choose_tiling(planes: int, span: int, lanes: int, most: int) -> Tiling:
    """Find the tile that covers `planes` times `span` numbers with the fewest vector steps."""
    best: tuple[float, Tiling] | None = None
    vectors = -(-span // lanes)
    for rows in (1, 2, 3, 4, 5, 6, 8):
        if rows > planes or rows > most:
            break
        # Splitting a plane into a number of equal tiles leaves the least behind its end.
        for count in range(1, vectors + 1):
            columns = -(-vectors // count)
            if columns * rows > min(most, _MOST_COLUMNS) and columns > 1:
                continue
            tiling = Tiling(rows, columns, -(-vectors // columns), -(-planes // rows) * rows)
            cost = tiling.tiles * (rows * columns + _STEP_COST)
            if best is None or cost < best[0]:
                best = cost, tiling
            if columns * rows < 4:
                break
    assert best is not None
    return best[1]


@lru_cache(maxsize=256)
def geometry(
    shape: Shape, lanes: int, registers: int, gradient_bytes: int | None = None
) -> Geometry:
    """Lay a convolution out for vectors of `lanes` numbers and a number of registers.

    Parameters
    ----------
    shape : Shape
        With at least one output voxel along each axis.
    lanes, registers : int
        `sparsekit.kernels.vector.LANES` and `REGISTERS`, or others for a test.
    gradient_bytes : int, optional
        Let a sample's padded gradient take about this much memory at a time, if the backward pass
        can go through it in order.
    """
    out = shape.out
    strided = shape.stride != (1, 1, 1)
    axes = range(3)
    reach = [shape.dilation[a] * (shape.kernel[a] - 1) // shape.stride[a] for a in axes]
    # Coordinates of a class: of the voxels themselves without a stride, else padding included.
    size = [out[a] + reach[a] if strided else shape.size[a] for a in axes]
    before = [0 if strided else shape.padding[a] for a in axes]
    lead = [max(0, reach[a] - before[a]) for a in axes]

    pitch = max(size[2] + before[2], out[2] + lead[2])
    forward = _choose_tiling(
        out[0], (out[1] - 1) * pitch + out[2], lanes, registers - _OTHER_REGISTERS
    )
    backward = _choose_tiling(
        size[0],
        (size[1] - 1) * pitch + size[2],
        lanes,
        (registers - _OTHER_REGISTERS) // 2,
    )
    grouped = _choose_tiling(
        out[0],
        (out[1] - 1) * pitch + out[2],
        lanes,
        (registers - CHANNELS_AT_ONCE - _OTHER_REGISTERS + 1) // CHANNELS_AT_ONCE,
    )
    forward_span = max(t.per_plane * t.columns * lanes for t in (forward, grouped))
    forward_planes = max(forward.planes, grouped.planes)
    backward_span = backward.per_plane * backward.columns * lanes

    def whole_vectors(n: int) -> int:
        return -(-n // lanes) * lanes

    # A tile of the backward pass that runs past its plane must meet zeros only.
    plane = whole_vectors(max((size[1] + before[1]) * pitch, backward_span))
    planes = max(size[0] + before[0], backward.planes)
    classes = shape.stride if strided else (1, 1, 1)
    source_channels = shape.c_in * classes[0] * classes[1] * classes[2]
    interior = before[0] * plane + before[1] * pitch + before[2]
    gradient_plane = whole_vectors((out[1] + lead[1]) * pitch)
    gradient_planes, resident = out[0] + lead[0], 0
    in_order = not strided and backward.rows == 1 and lead[0] == reach[0] - before[0]
    if gradient_bytes is not None and in_order:
        wanted = gradient_bytes // (4 * shape.c_out * gradient_plane) - reach[0]
        # An even number of new planes at a time, so that no pooling window is torn, and more than
        # are kept from one time to the next, so that those can be copied to the front.
        fewest = max(_FEWEST_PLANES, reach[0] + 1 + (reach[0] + 1) % 2)
        wanted = max(fewest, wanted - wanted % 2) + reach[0]
        if wanted < gradient_planes:
            gradient_planes = resident = wanted
    gradient_interior = lead[0] * gradient_plane + lead[1] * pitch + lead[2]

    taps, classes_of, gradient_taps = [], [], []
    for tap in itertools.product(*map(range, shape.kernel)):
        at = [shape.dilation[a] * tap[a] for a in axes]
        shift = [at[a] // shape.stride[a] for a in axes]
        rest = [at[a] % shape.stride[a] for a in axes]
        classes_of.append((rest[0] * classes[1] + rest[1]) * classes[2] + rest[2])
        taps.append(shift[0] * plane + shift[1] * pitch + shift[2])
        # Class coordinate q of the input meets output voxel q + before - shift at this tap.
        back = [before[a] - shift[a] for a in axes]
        gradient_taps.append(
            gradient_interior + back[0] * gradient_plane + back[1] * pitch + back[2]
        )

    source_end = (forward_planes - 1) * plane + forward_span + max(taps)
    source_end = max(source_end, interior + (backward.planes - 1) * plane + backward_span)
    gradient_end = (backward.planes - 1) * gradient_plane + backward_span + max(gradient_taps)
    if resident:
        gradient_end = (resident + 1) * gradient_plane + backward_span
    target_plane = forward_span
    dx_plane = backward_span

    def padded(channels: int, plane: int, planes: int, interior: int, end: int) -> Grid:
        channel = plane * planes
        last = max(end, channel)
        sample = whole_vectors((channels - 1) * channel + last)
        return Grid(channels, plane, channel, interior, sample)

    return Geometry(
        shape=shape,
        lanes=lanes,
        pitch=pitch,
        source=padded(source_channels, plane, planes, interior, source_end),
        gradient=padded(
            shape.c_out, gradient_plane, gradient_planes, gradient_interior, gradient_end
        ),
        # Readers of the target's rows take whole vectors, also at its end.
        target=padded(
            shape.c_out, target_plane, forward_planes, 0, target_plane * forward_planes + 2 * lanes
        ),
        source_gradient=padded(source_channels, dx_plane, backward.planes, 0, 0),
        forward=forward,
        backward=backward,
        grouped=grouped,
        source_taps=tuple(taps),
        gradient_taps=tuple(gradient_taps),
        tap_classes=tuple(classes_of),
        classes=classes,
        reach=reach[0],
        resident=resident,
    )


def block_channels(layout: Geometry, density: float, grid: Grid, tiling: Tiling) -> int:
    """Channels of `grid` that a pass reads before it goes on to the next ones.

    Never fewer at a lower density.
    """
    shape = layout.shape
    reach = [e * (k - 1) for e, k in zip(shape.dilation, shape.kernel, strict=True)]
    plane_numbers = tiling.columns * layout.lanes + reach[1] * layout.pitch
    channel_bytes = 4 * plane_numbers * (tiling.rows + reach[0])
    first = max(1, _FIRST_CACHE_BYTES // channel_bytes)
    if first * math.prod(shape.kernel) * density >= _LEAST_ENTRIES:
        return min(first, grid.channels)
    return min(max(1, _SECOND_CACHE_BYTES // channel_bytes), grid.channels)
