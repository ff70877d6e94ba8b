"""What one launch of the Triton kernels loads, stores and multiplies, counted from its lists.

The interpreter's own counts of the same launch are equal: tests/triton/test_work.py.
"""

from dataclasses import dataclass

import torch

from sparsekit.kernels.masked_conv3d.gpu_plan import Pass, Plan, Tile
from sparsekit.kernels.masked_conv3d.launches import splits_of


@dataclass(frozen=True, slots=True)
class Work:
    """Counts of a launch."""

    loaded: int
    """Bytes that loads ask for, before any cache."""
    stored: int
    products: int
    """Multiply-adds of the dots, times 2."""
    filling: int
    """Those of `products` that stand in for columns which fill up a list's last step."""


def product(
    launch: Pass, tile: Tile, samples: int, rows: int, dtype: torch.dtype, *, bias: bool
) -> Work:
    """Work of `gather_product`, without a voxel mask.

    Parameters
    ----------
    launch, tile
        Of the plan.
    samples : int
    rows : int
        Output channels of a group.
    dtype : torch.dtype
    bias : bool
    """
    element, strips = dtype.itemsize, launch.strips
    programs, voxels = strips.tiles(samples), strips.voxels
    steps = int(launch.steps.sum())
    entries = steps * tile.entries
    channels = len(launch.steps) // launch.lists.tiles_per_group * rows
    numbers = samples * strips.per_sample
    # Places in the source and the output, for every output tile.
    loaded = numbers * len(launch.steps) * 8 + programs * (
        len(launch.steps) * 4
        + entries * (4 + (voxels + tile.rows) * element)
        + (channels * element if bias else 0)
    )
    grid = strips.grid[0] * strips.grid[1] * strips.grid[2]
    each = 2 * programs * voxels * tile.rows
    filling = entries - int(launch.lists.counts.sum())
    return Work(loaded, samples * grid * channels * element, each * entries, each * filling)


def weight_gradient(plan: Plan, samples: int, dtype: torch.dtype) -> Work:
    """Work of `weight_gradient`, without a voxel mask and without the sum over its splits."""
    tile, lists, strips = plan.settings.weight_gradient, plan.forward.lists, plan.gradient_strips
    steps = int(plan.gradient_steps.sum())
    tiles, length = lists.offsets.shape
    most_steps = length // tile.entries
    splits = splits_of(tiles * most_steps, strips.tiles(samples))
    inside = samples * strips.grid[0] * strips.grid[1] * strips.grid[2]
    loaded = (
        splits * tiles * most_steps * 4
        + splits * steps * (tile.entries * 4 + 4)
        + steps * samples * strips.per_sample * 8
        + steps * inside * (tile.entries + tile.rows) * dtype.itemsize
    )
    stored = splits * steps * tile.entries * tile.rows * 4
    each = 2 * strips.tiles(samples) * strips.voxels * tile.rows
    entries = steps * tile.entries
    return Work(loaded, stored, each * entries, each * (entries - int(lists.counts.sum())))
