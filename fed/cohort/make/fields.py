"""Smooth random fields on a lattice of millimetres, and sampling of maps at points.

No BLAS is used: its results may depend on the number of threads, and the same seed must give
the same bytes in every worker.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float32]


def floats(values: ArrayLike) -> Floats:
    """Make a float32 array, without a copy if it is one already."""
    return np.asarray(values, dtype=np.float32)


# Mean over positions of the sum of squared cubic B-spline weights, per axis.
_WEIGHT_SQUARES = 151.0 / 315.0


@dataclass(frozen=True)
class SplineLattice:
    """Cubic B-splines over a box, ready to turn control values into a field on voxels.

    Attributes
    ----------
    weights : tuple of three csr_array
        Voxels by control points, for x, y and z.
    controls : tuple of int
        Control points along x, y and z.
    """

    weights: tuple[csr_array, csr_array, csr_array]
    controls: tuple[int, int, int]

    @staticmethod
    def over(axes_mm: tuple[Floats, Floats, Floats], spacing_mm: float) -> "SplineLattice":
        """Lay control points ``spacing_mm`` apart over voxel centres given per axis in mm.

        The lattice starts at a multiple of the spacing, so that grids of different resolution
        over about the same box share their control points.
        """
        x, y, z = (_spline_weights(floats(axis / spacing_mm)) for axis in axes_mm)
        return SplineLattice((x[0], y[0], z[0]), (x[1], y[1], z[1]))

    def draw(self, rng: np.random.Generator, components: int, *, sd: float = 1.0) -> Floats:
        """Draw a field with mean 0.

        Parameters
        ----------
        rng : Generator
            One float32 normal per control point and component is taken from it.
        components : int
            Number of independent fields, the last axis of the result.
        sd : float, default 1
            Standard deviation of the field.

        Returns
        -------
        ndarray, (x, y, z, components), float32
            The field at the voxel centres.
        """
        along_x, along_y, along_z = self.weights
        nx, ny, nz = self.controls
        values = rng.standard_normal((nz, ny * nx * components), dtype=np.float32)
        values *= np.float32(sd * _WEIGHT_SQUARES**-1.5)
        # Contract the first axis, then bring the next one to the front.
        values = (along_z @ values).reshape(-1, ny, nx * components).swapaxes(0, 1)
        values = along_y @ values.reshape(ny, -1)
        values = values.reshape(len(values), -1, nx, components).transpose(2, 0, 1, 3)
        field = floats(along_x @ values.reshape(nx, -1))
        return field.reshape(-1, *values.shape[1:])


def _spline_weights(positions: Floats) -> tuple[csr_array, int]:
    """Weights of the four control points around each position (in spacings), and their number."""
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
    )
    columns = cell[:, None] + np.arange(4) - cell[0]
    rows = np.repeat(np.arange(len(positions)), 4)
    controls = int(columns[-1, -1]) + 1
    weights = csr_array(
        (floats(four).ravel(), (rows, columns.ravel())), shape=(len(positions), controls)
    )
    return weights, controls


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
    cells = []
    weights = []
    for axis, size in enumerate(maps.shape[:3]):
        # One contiguous array per axis: strided ones would take most of the time.
        position = np.clip(points[:, axis], np.float32(0), np.float32(size - 1.001))
        cell = position.astype(np.int32)
        fraction = position - cell
        cells.append(cell)
        weights.append((1 - fraction, fraction))
    stride_x, stride_y = maps.shape[1] * maps.shape[2], maps.shape[2]
    first = (cells[0] * stride_x + cells[1] * stride_y + cells[2]).astype(np.intp)
    flat = maps.reshape(-1, maps.shape[3])
    result = np.zeros((len(points), maps.shape[3]), dtype=np.float32)
    corner = np.empty_like(result)
    for x, y, z in product((0, 1), repeat=3):
        weight = weights[0][x] * weights[1][y] * weights[2][z]
        # Every index is inside; mode="clip" only spares a copy that guards against errors.
        flat.take(first + (x * stride_x + y * stride_y + z), axis=0, out=corner, mode="clip")
        corner *= weight[:, None]
        result += corner
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
    flat = np.zeros(points.shape[:-1], dtype=np.int32)
    for axis, size in enumerate(volume.shape):
        position = np.clip(points[..., axis] + np.float32(0.5), 0, np.float32(size - 0.5))
        flat *= size
        flat += position.astype(np.int32)
    return volume.ravel().take(flat)
