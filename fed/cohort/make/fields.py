"""Smooth random fields on a lattice of millimetres, and sampling of maps at points.

No BLAS is used: its results may depend on the number of threads, and the same seed must give
the same bytes in every worker.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float32]

# Mean over positions of the sum of squared cubic B-spline weights, per axis.
_WEIGHT_SQUARES = 151.0 / 315.0


@dataclass(frozen=True)
class SplineLattice:
    """Cubic B-splines over a box, ready to turn control values into a field on voxels.

    Attributes
    ----------
    weights : tuple of three csr_array
        Voxels by control points, for x, y and z.
    """

    weights: tuple[csr_array, csr_array, csr_array]

    @staticmethod
    def over(axes_mm: tuple[Floats, Floats, Floats], spacing_mm: float) -> "SplineLattice":
        """Lay control points ``spacing_mm`` apart over voxel centres given per axis in mm.

        The lattice starts at a multiple of the spacing, so that grids of different resolution
        over about the same box share their control points.
        """
        low = [np.floor(float(axis[0]) / spacing_mm) - 1 for axis in axes_mm]
        high = [np.floor(float(axis[-1]) / spacing_mm) + 2 for axis in axes_mm]
        weights = tuple(
            _spline_weights(axis / spacing_mm - start, int(stop - start) + 1)
            for axis, start, stop in zip(axes_mm, low, high, strict=True)
        )
        return SplineLattice((weights[0], weights[1], weights[2]))

    def draw(self, rng: np.random.Generator, components: int) -> Floats:
        """Draw a field with mean 0 and standard deviation 1.

        Parameters
        ----------
        rng : Generator
            One float32 normal per control point and component is taken from it.
        components : int
            Number of independent fields, the last axis of the result.

        Returns
        -------
        ndarray, (x, y, z, components), float32
            The field at the voxel centres.
        """
        along_x, along_y, along_z = self.weights
        counts = (along_z.shape[1], along_y.shape[1], along_x.shape[1], components)
        field = rng.standard_normal(counts, dtype=np.float32)
        for matrix in (along_z, along_y, along_x):
            # Contract the first axis, then bring the next one to the front.
            mixed = matrix @ field.reshape(field.shape[0], -1)
            field = mixed.reshape(mixed.shape[0], *field.shape[1:])
            if matrix is not along_x:
                order = (1, 2, 0, 3) if matrix is along_z else (1, 0, 2, 3)
                field = np.ascontiguousarray(field.transpose(order))
        field *= np.float32(_WEIGHT_SQUARES**-1.5)
        return field


def _spline_weights(positions: Floats, controls: int) -> csr_array:
    """Weights of the four control points around each position (in control spacings)."""
    cell = np.floor(positions).astype(np.int64)
    t = (positions - cell).astype(np.float64)
    four = np.stack(
        [
            (1 - t) ** 3 / 6,
            (3 * t**3 - 6 * t**2 + 4) / 6,
            (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6,
            t**3 / 6,
        ],
        axis=1,
    ).astype(np.float32)
    columns = cell[:, None] + np.arange(-1, 3)
    rows = np.repeat(np.arange(len(positions)), 4)
    return csr_array((four.ravel(), (rows, columns.ravel())), shape=(len(positions), controls))


def sample(maps: Floats, points: Floats) -> Floats:
    """Trilinear interpolation of several maps at once.

    Parameters
    ----------
    maps : ndarray, (x, y, z, channels), float32
        C-contiguous maps.
    points : ndarray, (n, 3), float32
        Voxel coordinates; outside the grid the value at its edge is taken.

    Returns
    -------
    ndarray, (n, channels), float32
        The maps' values at the points.
    """
    sizes = np.array(maps.shape[:3])
    limit = (sizes - 1).astype(np.float32) - np.float32(1e-3)
    inside = np.clip(points, np.float32(0), limit)
    cell = inside.astype(np.int32)
    t = inside - cell
    stride_x, stride_y = int(sizes[1] * sizes[2]), int(sizes[2])
    first = (cell[:, 0] * stride_x + cell[:, 1] * stride_y + cell[:, 2]).astype(np.intp)
    flat = maps.reshape(-1, maps.shape[3])
    x, y, z = (t[:, axis, None] for axis in range(3))
    result: Floats | None = None
    for step_x, weight_x in ((0, 1 - x), (stride_x, x)):
        for step_y, weight_y in ((0, 1 - y), (stride_y, y)):
            weight_xy = weight_x * weight_y
            for step_z, weight_z in ((0, 1 - z), (1, z)):
                corner = flat.take(first + (step_x + step_y + step_z), axis=0)
                corner *= weight_xy * weight_z
                if result is None:
                    result = corner
                else:
                    result += corner
    assert result is not None
    return result


def nearest(volume: NDArray[Any], points: Floats) -> NDArray[Any]:
    """Take the value of the voxel nearest to each point.

    Parameters
    ----------
    volume : ndarray, (x, y, z)
        The map, of any dtype.
    points : ndarray, (..., 3), float32
        Voxel coordinates; outside the grid the value at its edge is taken.

    Returns
    -------
    ndarray, (...)
        The map's values, of its dtype.
    """
    sizes = np.array(volume.shape, dtype=np.float32)
    cell = np.clip(points + np.float32(0.5), np.float32(0), sizes - 1).astype(np.int32)
    flat = (cell[..., 0] * volume.shape[1] + cell[..., 1]) * volume.shape[2] + cell[..., 2]
    return volume.ravel().take(flat)
