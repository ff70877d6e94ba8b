"""The order in which the Triton kernels take a grid's voxels, so that tiles are full and compact.

A grid is cut into strips along its rows: `cross` voxels along the first two axes, all of the third.
Voxels are numbered strip by strip, and in a strip cross-section by cross-section; samples follow
each other. A tile is a stretch of consecutive numbers, whatever strips and samples it touches: only
the very last one is not full, and neighbours in a tile share most of what a filter reads.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsekit.types import Size3

_LONGEST = 16
# Share of numbers that may stand for no voxel, where a cross-section does not divide the grid.
_WASTE = 1.02


@dataclass(frozen=True, slots=True)
class Strips:
    """A grid of voxels in that order."""

    grid: Size3
    cross: tuple[int, int]
    """Voxels of a strip along the first two axes."""
    voxels: int
    """Voxels of a tile."""

    @property
    def counts(self) -> tuple[int, int]:
        """Strips along the first two axes."""
        return -(-self.grid[0] // self.cross[0]), -(-self.grid[1] // self.cross[1])

    @property
    def covered(self) -> Size3:
        """Voxels along each axis that have numbers."""
        down, across = self.counts
        return down * self.cross[0], across * self.cross[1], self.grid[2]

    @property
    def per_sample(self) -> int:
        """Numbers of a sample, those beyond the grid included."""
        d, h, w = self.covered
        return d * h * w

    def tiles(self, samples: int) -> int:
        """Tiles of all samples together."""
        return -(-samples * self.per_sample // self.voxels)


@lru_cache(maxsize=1024)
def strips_of(grid: Size3, voxels: int) -> Strips:
    """Choose the cross-section whose tiles have the least surface, among those that waste little.

    Parameters
    ----------
    grid : Size3
    voxels : int
        Of a tile.
    """
    found = []
    for cross in itertools.product(*(range(1, min(n, _LONGEST) + 1) for n in grid[:2])):
        strips = Strips(grid, (cross[0], cross[1]), voxels)
        if strips.per_sample <= _WASTE * grid[0] * grid[1] * grid[2]:
            length = voxels / (cross[0] * cross[1])
            surface = (cross[0] + 2) * (cross[1] + 2) * (length + 2)
            found.append((surface, strips.per_sample, strips.cross, strips))
    return min(found, key=lambda row: row[:3])[3]


def places(strips: Strips, axes: Size3, sample: int, device: torch.device, outside: bool) -> Tensor:
    """Where the voxels stand in a buffer, by number, for as many samples as a tile may touch.

    Parameters
    ----------
    strips : Strips
    axes : Size3
        Elements of the buffer from one voxel to the next, along each axis.
    sample : int
        From one sample to the next.
    device : torch.device
    outside : bool
        Whether numbers beyond the grid have places; otherwise they are -1.

    Returns
    -------
    Tensor, (per_sample + voxels,), int32
    """
    down, across = strips.counts
    sizes = down, across, strips.grid[2], *strips.cross
    d, h, w = (torch.arange(n, device=device) for n in strips.covered)
    d, h = d.view(down, 1, 1, -1, 1), h.view(1, across, 1, 1, -1)
    w = w.view(1, 1, -1, 1, 1)
    place = (d * axes[0] + h * axes[1] + w * axes[2]).expand(sizes)
    if not outside:
        place = torch.where((d < strips.grid[0]) & (h < strips.grid[1]), place, -1)
    flat = place.reshape(-1)
    number = torch.arange(strips.per_sample + strips.voxels, device=device)
    own = flat[number % strips.per_sample]
    later = number // strips.per_sample * sample
    return torch.where(own >= 0, own + later, -1).to(torch.int32)


def live_tiles(mask: Tensor, strips: Strips, low: Size3, high: Size3) -> Tensor:
    """Tiles that hold or reach a voxel of a mask.

    Parameters
    ----------
    mask : Tensor, (n, d, h, w), bool
        Of a grid that the strips' own grid reads or is.
    strips : Strips
    low, high : Size3
        Voxel i of the strips' grid reaches voxels ``i + low`` to ``i + high`` of the mask.

    Returns
    -------
    Tensor, (tiles,), bool
    """
    pads = []
    for axis in range(3):
        end = strips.covered[axis] + high[axis]
        pads.append((max(0, -low[axis]), max(0, end - mask.shape[1 + axis])))
    live = torch.nn.functional.pad(mask, (*pads[2], *pads[1], *pads[0]))
    for axis in range(3):
        length = strips.covered[axis] + high[axis] - low[axis]
        live = live.narrow(1 + axis, max(0, low[axis]), length)
        live = live.unfold(1 + axis, high[axis] - low[axis] + 1, 1).amax(dim=-1)
    down, across = strips.counts
    parts = live.view(-1, down, strips.cross[0], across, strips.cross[1], strips.grid[2])
    numbered = parts.permute(0, 1, 3, 5, 2, 4).reshape(-1)
    beyond = strips.tiles(mask.shape[0]) * strips.voxels - numbered.numel()
    return torch.nn.functional.pad(numbered, (0, beyond)).view(-1, strips.voxels).amax(dim=1)
