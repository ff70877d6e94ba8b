"""What a masked convolution costs on a GPU, as a model: none of its numbers was timed.

A launch takes as long as its products at the rate that its tile reaches, or as its bytes at the
memory's rate, whichever is longer. Peak rates are the makers' figures for dense products; what
share of them a tile reaches is what its loads from shared memory leave (README.md).
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.kernels.masked_conv3d.columns import live_runs
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_plan import Settings, Tile
from sparsekit.kernels.masked_conv3d.strips import strips_of
from sparsekit.kernels.masked_conv3d.tiles import ROWS, WIDTHS, Kind, settings

_LAUNCH_SECONDS = 5e-6
# Share of the matrix units' rate that tiles of so many rows can reach: what a voxel's number gives
# until shared memory has to deliver the next. About 0.7 of that ceiling is planned on.
_CEILING = {16: 0.15, 32: 0.29, 64: 0.50, 128: 0.80}
_OF_CEILING = 0.7
# Single columns have no wide accesses: 2-byte ones cost as much as 4-byte ones.
_COLUMNS = {2: 0.35, 4: 0.7}
_DENSE_TENSOR, _DENSE_PLAIN = 0.55, 0.7
# The kernels have to be this much faster by the model; more on a GPU that is not listed.
_MARGIN, _MARGIN_OTHER = 1.25, 2.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Peak rates of one kind of GPU: 10^12 operations or bytes a second."""

    half: float
    """float16 and bfloat16 products, added up in float32."""
    tf32: float
    plain: float
    """float32 without matrix units, or with those that keep all bits."""
    memory: float


RATES = {
    "sm_80": Rates(312, 156, 19.5, 2.0),
    "sm_90": Rates(989, 495, 67, 3.35),
    "sm_100": Rates(2250, 1125, 75, 8.0),
    "gfx942": Rates(1307, 653, 163, 5.3),
    "other": Rates(312, 156, 19.5, 2.0),
}
"""From the data sheets of A100, H100 SXM, B200 and MI300X; what is not listed counts as an A100."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Columns that lists of a mask would hold: live runs times their width, over all tiles."""

    forward: dict[tuple[int, int], int]
    """By rows of an output tile and width of a run."""
    backward: dict[tuple[int, int], int]
    kept: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice and the predictions behind it."""

    dense: bool
    settings: Settings
    kernel_seconds: float
    dense_seconds: float
    reason: str


def count_columns(mask: Tensor, groups: int) -> Listed:
    """Count for every size of tile; the host waits for the device once.

    Parameters
    ----------
    mask : Tensor, (c_out, c_in / groups, kd, kh, kw), bool
    groups : int
    """
    kept = mask.reshape(groups, mask.shape[0] // groups, mask.shape[1], -1)
    sizes = list(itertools.product(ROWS, WIDTHS))
    counts = [kept.sum()]
    for of in (kept, kept.transpose(1, 2)):
        counts += [live_runs(of, rows, width).sum() * width for rows, width in sizes]
    total, *found = (int(count) for count in torch.stack(counts).tolist())
    half = len(sizes)
    return Listed(
        dict(zip(sizes, found[:half], strict=True)),
        dict(zip(sizes, found[half:], strict=True)),
        total,
    )


Ranked = list[tuple[float, int, int]]
"""Seconds, rows of an output tile and width of a run, the fastest first."""


def ranked(
    shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool
) -> tuple[Ranked, Ranked]:
    """All tiles of the forward pass, with the weight gradient, and of the input gradient.

    Parameters
    ----------
    shape, samples
        The convolution.
    kind : Kind
    listed : Listed
    train : bool
        Whether the gradients count.
    """
    element = kind.dtype.itemsize
    forward, backward = [], []
    for rows, width in itertools.product(ROWS, WIDTHS):
        tiles = settings(kind, rows, width, rows, width)
        own = _product(
            tiles.forward, width, kind, shape.out, shape.c_out,
            shape.c_in * math.prod(shape.size), listed.forward[rows, width], samples, element,
        )  # fmt: skip
        sums = _product(
            tiles.weight_gradient, width, kind, shape.out, 0,
            shape.c_in * math.prod(shape.size) + shape.c_out * math.prod(shape.out),
            listed.forward[rows, width], samples, element,
        )  # fmt: skip
        forward.append((own + (sums if train else 0.0), rows, width))
        own = _product(
            tiles.input_gradient, width, kind, shape.size, shape.c_in,
            shape.c_out * math.prod(shape.out),
            listed.backward[rows, width] / math.prod(shape.stride), samples, element,
        )  # fmt: skip
        backward.append((own, rows, width))
    return sorted(forward), sorted(backward)


def decide(shape: Shape, samples: int, kind: Kind, listed: Listed, *, train: bool) -> Decision:
    """Choose tiles, and whether torch's dense convolution would be faster than the best of them.

    Arguments as in `ranked`.
    """
    weights = shape.c_out * (shape.c_in // shape.groups) * math.prod(shape.kernel)
    forward, backward = ranked(shape, samples, kind, listed, train=train)
    (seconds, rows, width), (back_seconds, back_rows, back_width) = forward[0], backward[0]
    kernels = seconds + (back_seconds if train else 0.0)
    dense = _dense(shape, samples, kind, weights) * (3 if train else 1)
    margin = _MARGIN_OTHER if kind.architecture == "other" else _MARGIN
    reason = (
        f"modelled for {kind.architecture}: {listed.kept} of {weights} weights fill "
        f"{listed.forward[rows, width] * rows} places in tiles of {rows} x {width}; "
        f"kernels {kernels * 1e6:.0f} us, dense {dense * 1e6:.0f} us"
    )
    return Decision(
        kernels * margin > dense,
        settings(kind, rows, width, back_rows, back_width),
        kernels,
        dense,
        reason,
    )


def _peak(kind: Kind) -> float:
    rates = RATES[kind.architecture]
    if kind.dtype != torch.float32:
        return rates.half * 1e12
    of = {
        "ieee": rates.plain, "tf32": rates.tf32, "tf32x3": rates.tf32 / 3, "bf16x3": rates.half / 3,
    }  # fmt: skip
    return of[kind.precision] * 1e12


def _product(
    tile: Tile, width: int, kind: Kind, grid: tuple[int, int, int], written: int, read: int,
    columns: float, samples: int, element: int,
) -> float:  # fmt: skip
    """Seconds of one launch over a grid of voxels."""
    tensor = kind.precision != "ieee" or kind.dtype != torch.float32
    reached = _CEILING[tile.rows] * _OF_CEILING if tensor else 0.5
    if width == 1:
        reached *= _COLUMNS[element]
    voxels = strips_of(grid, tile.voxels).tiles(samples) * tile.voxels
    work = 2.0 * voxels * columns * tile.rows
    moved = samples * element * (read * 2 + written * math.prod(grid))
    memory = RATES[kind.architecture].memory * 1e12
    return max(work / (_peak(kind) * reached), moved / memory) + 2 * _LAUNCH_SECONDS


def _dense(shape: Shape, samples: int, kind: Kind, weights: int) -> float:
    tensor = kind.precision != "ieee" or kind.dtype != torch.float32
    work = 2.0 * samples * math.prod(shape.out) * weights
    moved = shape.c_in * math.prod(shape.size) + shape.c_out * math.prod(shape.out)
    moved *= samples * kind.dtype.itemsize
    rate = _peak(kind) * (_DENSE_TENSOR if tensor else _DENSE_PLAIN)
    return max(work / rate, moved / (RATES[kind.architecture].memory * 1e12)) + _LAUNCH_SECONDS
