"""Boxes of output voxels that the Triton kernels compute at a time, and buffers padded for them."""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsekit.types import Size3

_LONGEST = 16


@dataclass(frozen=True, slots=True)
class Boxes:
    """A grid of voxels, cut into boxes; the last along an axis may reach beyond the grid."""

    box: Size3
    per_axis: Size3
    grid: Size3

    @property
    def count(self) -> int:
        """Boxes of one sample."""
        return math.prod(self.per_axis)

    @property
    def voxels(self) -> int:
        """Voxels of one box."""
        return math.prod(self.box)

    @property
    def covered(self) -> Size3:
        """Voxels along each axis that the boxes cover together."""
        d, h, w = (b * n for b, n in zip(self.box, self.per_axis, strict=True))
        return d, h, w


@lru_cache(maxsize=1024)
def boxes_of(grid: Size3, voxels: int) -> Boxes:
    """Cut a grid into boxes of so many voxels, a power of two.

    As few boxes as possible, and of equally many those with the smallest surface: their voxels
    share most of what a filter reads. Of those, the ones that are longest along rows.
    """
    sides = [1 << i for i in range(voxels.bit_length()) if 1 << i <= _LONGEST]
    if voxels == 1:
        sides = [1]
    found = []
    for d, h in itertools.product(sides, repeat=2):
        w = voxels // (d * h)
        if w < 1 or d * h * w != voxels:
            continue
        per_axis = tuple(-(-n // b) for n, b in zip(grid, (d, h, w), strict=True))
        halo = (d + 2) * (h + 2) * (w + 2)
        found.append((math.prod(per_axis), halo, -w, (d, h, w), per_axis))
    _, _, _, box, per = min(found)
    return Boxes(box, (per[0], per[1], per[2]), grid)


def live_boxes(mask: Tensor, boxes: Boxes, before: Size3, after: Size3, step: Size3) -> Tensor:
    """Boxes that hold or reach a voxel of a mask.

    Parameters
    ----------
    mask : Tensor, (n, d, h, w), bool
        Of a grid that the boxes' own grid reads or is.
    boxes : Boxes
    before, after : Size3
        Voxel i of the boxes' grid reaches voxels ``i * step - before`` to ``i * step + after``.
    step : Size3

    Returns
    -------
    Tensor, (n, boxes of a sample), bool
    """
    starts, windows, pads = [], [], []
    for axis in range(3):
        n = mask.shape[1 + axis]
        window = (boxes.box[axis] - 1) * step[axis] + before[axis] + after[axis] + 1
        start = boxes.box[axis] * step[axis]
        need = start * (boxes.per_axis[axis] - 1) + window
        starts.append(start)
        windows.append(window)
        pads.append((before[axis], max(0, need - before[axis] - n)))
    padded = torch.nn.functional.pad(mask, (*pads[2], *pads[1], *pads[0]))
    live = padded
    for axis in range(3):
        live = live.unfold(1 + axis, windows[axis], starts[axis])
        live = live.narrow(1 + axis, 0, boxes.per_axis[axis]).amax(dim=-1)
    return live.reshape(mask.shape[0], -1)
