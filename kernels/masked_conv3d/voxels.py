"""Which tiles have work under a mask of voxels."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.kernels.masked_conv3d.geometry import Geometry, Tiling
from sparsekit.kernels.vector import LANES


def forward_tiles(voxel_mask: Tensor, layout: Geometry, samples: int) -> Tensor:
    """Tiles of the output with a voxel inside, (samples * tiles,), uint8, in the kernel's order.

    `voxel_mask` is (n or 1, 1, d, h, w), bool.
    """
    out_d, out_h, out_w = layout.shape.out
    tiling = layout.forward
    n = voxel_mask.shape[0]
    span = tiling.per_plane * tiling.columns * LANES
    flat = np.zeros((n, tiling.planes, max(span, out_h * layout.pitch)), np.bool_)
    rows = flat[:, :out_d, : out_h * layout.pitch].reshape(n, out_d, out_h, layout.pitch)
    rows[..., :out_w] = voxel_mask[:, 0].numpy()
    flat[:, :out_d, : out_h * layout.pitch] = rows.reshape(n, out_d, -1)
    tiles = flat[..., :span].reshape(
        n, tiling.planes // tiling.rows, tiling.rows, tiling.per_plane, tiling.columns * LANES
    )
    found: npt.NDArray[np.bool_] = np.logical_or.reduce(tiles, axis=(2, 4))
    return _in_order(found, samples)


def backward_tiles(voxel_mask: Tensor, layout: Geometry, samples: int) -> Tensor:
    """Tiles of the input that a voxel inside reads, (samples * tiles,), uint8."""
    out_d, out_h, out_w = layout.shape.out
    grid, tiling = layout.gradient, layout.backward
    n = voxel_mask.shape[0]
    taps = np.array(layout.gradient_taps)
    length = tiling.columns * LANES
    span = tiling.per_plane * length
    end = max(int(taps.max()) + (tiling.planes + 1) * grid.plane + span, grid.channel)
    flat = np.zeros((n, end), np.int32)
    d, h, w = np.meshgrid(*map(np.arange, (out_d, out_h, out_w)), indexing="ij")
    place = grid.interior + d * grid.plane + h * layout.pitch + w
    flat[:, place.ravel()] = voxel_mask.reshape(n, -1).numpy()
    sums = np.concatenate([np.zeros((n, 1), np.int32), flat.cumsum(axis=1)], axis=1)
    starts = _tile_starts(tiling, grid.plane)
    found = np.zeros((n, *starts.shape[:1], starts.shape[2]), np.bool_)
    for plane in np.unique(taps // grid.plane):
        own = taps[taps // grid.plane == plane]
        low = starts + own.min()
        high = starts + own.max() + length
        found |= (sums[:, high] > sums[:, low]).any(axis=2)
    return _in_order(found, samples)


def _tile_starts(tiling: Tiling, plane: int) -> npt.NDArray[np.int64]:
    """Flat place of each plane of each tile, (steps, rows, per_plane)."""
    steps, rows = np.arange(tiling.planes // tiling.rows), np.arange(tiling.rows)
    tiles = np.arange(tiling.per_plane)
    starts: npt.NDArray[np.int64] = (
        steps[:, None, None] * tiling.rows + rows[None, :, None]
    ) * plane + tiles * tiling.columns * LANES
    return starts


def _in_order(tiles: npt.NDArray[np.bool_], samples: int) -> Tensor:
    """From (n or 1, steps, per_plane) to the order of the kernels, for every sample."""
    ordered = tiles.transpose(0, 2, 1).reshape(tiles.shape[0], -1)
    every = np.broadcast_to(ordered, (samples, ordered.shape[1]))
    return torch.from_numpy(every.astype(np.uint8, order="C"))
