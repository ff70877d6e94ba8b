"""Bring a volume onto the model's grid through its affine: reorient, pad, crop or resample.

The model's grid has axes R, A, S, the given voxel size, and its centre at the world point
(0, -18, 18) mm, which is the centre of the usual MNI grids: 91x109x91 at 2 mm and 46x55x46 at
4 mm both begin at (-90, -126, -72). Rules, in this order:

1. Axes are permuted and flipped to the nearest to R, A, S. This moves no voxel in the world.
2. World coordinates are used ("world") when the NIfTI code says MNI or Talairach space, or when
   the centre of the scan's grid lies within 20 mm of (0, -18, 18) along each axis. Otherwise the
   world origin says nothing about where the brain is, and the two grid centres are put on each
   other ("centre").
3. Voxel sizes that agree within 1 % and axes that are not oblique: pad with 0 and crop by whole
   voxels. The rest of a shift, at most half a voxel, is left, so no value changes.
4. Anything else is resampled with trilinear interpolation, after a Gaussian that matches the
   coarser voxels where the target is coarser. Voxels less than half covered by non-zero source
   voxels become background.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import nibabel
import numpy as np
from scipy import ndimage

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.tables import Fault

CENTRE_MM = (0.0, -18.0, 18.0)
MAX_LOST = 0.10
"""Share of a scan's intensity that may fall outside the grid before the scan is refused."""

_WORLD_TOLERANCE_MM = 20.0
_WORLD_CODES = (3, 4)  # Talairach, MNI 152
_SAME_SIZE = 0.01
_FWHM_PER_SIGMA = 2.3548
_MAX_POINTS = 200_000


@dataclass(frozen=True)
class Grid:
    """A grid of voxels in R, A, S order around the world point `CENTRE_MM`.

    Attributes
    ----------
    shape : tuple of int, (d, h, w)
    voxel_mm : tuple of float
        Voxel size along each axis.
    """

    shape: tuple[int, int, int]
    voxel_mm: tuple[float, float, float]

    @classmethod
    def of(cls, in_shape: Sequence[int], voxel_mm: float | Sequence[float]) -> "Grid":
        """Build a grid from a shape and one voxel size or three.

        Raises
        ------
        ArgumentError
            Not three positive extents, or not one or three positive finite voxel sizes.
        """
        shape = tuple(int(n) for n in in_shape)
        sizes = (voxel_mm,) * 3 if isinstance(voxel_mm, float | int) else tuple(voxel_mm)
        if len(shape) != 3 or min(shape) < 1:
            raise ArgumentError(f"in_shape: expected three positive extents, got {in_shape}")
        if len(sizes) != 3 or not all(np.isfinite(s) and s > 0 for s in sizes):
            raise ArgumentError(f"voxel_mm: expected one or three positive sizes, got {voxel_mm}")
        return cls(
            (shape[0], shape[1], shape[2]), (float(sizes[0]), float(sizes[1]), float(sizes[2]))
        )

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to world millimetres, (4, 4) float64."""
        affine = np.diag([*self.voxel_mm, 1.0])
        affine[:3, 3] = np.asarray(CENTRE_MM) - (np.asarray(self.shape) - 1) / 2 * self.voxel_mm
        return affine

    def __str__(self) -> str:
        sizes = "x".join(f"{s:g}" for s in self.voxel_mm)
        return f"{'x'.join(map(str, self.shape))}@{sizes}mm"


@dataclass(frozen=True)
class Placement:
    """What was done to bring one scan onto the grid.

    Attributes
    ----------
    axes : str
        Axis codes of the file, such as ``"LAS"``.
    source : str
        Shape and voxel size after step 1.
    action : str
        ``"as-is"``, ``"pad-crop"`` or ``"resample"``.
    anchor : str
        ``"world"`` or ``"centre"``.
    residual_mm : float
        Largest shift along an axis that whole voxels could not express.
    lost : float
        Share of the scan's intensity that fell outside the grid.
    """

    axes: str
    source: str
    action: str
    anchor: str
    residual_mm: float
    lost: float

    def as_dict(self) -> dict[str, str | float]:
        """Return the fields for a JSON manifest."""
        return asdict(self)


def place(
    data: np.ndarray, affine: np.ndarray, space_code: int, grid: Grid
) -> tuple[np.ndarray, Placement] | Fault:
    """Bring one volume onto `grid` by the rules of this module.

    Parameters
    ----------
    data : ndarray, (i, j, k), float32
        Finite.
    affine : ndarray, (4, 4), float64
        Invertible.
    space_code : int
        NIfTI code that came with `affine`.
    grid : Grid

    Returns
    -------
    tuple of (ndarray, (d, h, w), float32, C order) and Placement, or Fault
        A fault of kind ``wrong-grid`` when more than `MAX_LOST` of the scan's intensity would
        fall outside the grid.
    """
    plan = _plan(data, affine, space_code, grid)
    if isinstance(plan, Fault):
        return plan
    if plan.placement.action == "resample":
        return _resample(plan.data, plan.affine, grid), plan.placement
    return _pad_crop(plan.data, plan.start, grid.shape), plan.placement


def preview(data: np.ndarray, affine: np.ndarray, space_code: int, grid: Grid) -> Placement | Fault:
    """Say what `place` would do, without doing it; same parameters and faults."""
    plan = _plan(data, affine, space_code, grid)
    return plan if isinstance(plan, Fault) else plan.placement


@dataclass(frozen=True)
class _Plan:
    """A volume in R, A, S order, its anchored affine, and where the grid begins in its voxels."""

    data: np.ndarray
    affine: np.ndarray
    start: np.ndarray
    placement: Placement


def _plan(data: np.ndarray, affine: np.ndarray, space_code: int, grid: Grid) -> _Plan | Fault:
    axes = "".join(nibabel.aff2axcodes(affine))
    data, affine = to_ras(data, affine)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    source = f"{'x'.join(map(str, data.shape))}@{'x'.join(f'{s:.4g}' for s in sizes)}mm"
    anchor = _anchor(data.shape, affine, space_code)
    if anchor == "centre":
        affine = _recentred(data.shape, affine)
    lost = _lost(data, affine, grid)
    if lost > MAX_LOST:
        return Fault(
            "wrong-grid",
            f"{source}: {lost:.0%} of its intensity lies outside the model's {grid}",
            "register the scan to MNI space and remove the skull, or choose a larger grid",
        )
    start = np.linalg.solve(affine, grid.affine[:, 3])[:3]  # our voxel 0 in the scan's indices
    whole = np.rint(start).astype(int)
    same_size = bool(np.all(np.abs(sizes / grid.voxel_mm - 1) <= _SAME_SIZE))
    if not same_size or _is_oblique(data.shape, affine):
        action, residual = "resample", 0.0
    else:
        untouched = data.shape == grid.shape and not whole.any()
        action = "as-is" if untouched else "pad-crop"
        residual = round(float(np.max(np.abs(start - whole) * sizes)), 4)
    return _Plan(data, affine, whole, Placement(axes, source, action, anchor, residual, lost))


def to_ras(data: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes so that they point nearest to right, anterior, superior."""
    orientation = nibabel.io_orientation(affine)
    turned = nibabel.apply_orientation(data, orientation)
    return turned, affine @ nibabel.orientations.inv_ornt_aff(orientation, data.shape)


def _centre(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    return np.asarray(affine[:3, :3] @ ((np.asarray(shape) - 1) / 2) + affine[:3, 3])


def _anchor(shape: Sequence[int], affine: np.ndarray, space_code: int) -> str:
    offset = np.abs(_centre(shape, affine) - CENTRE_MM)
    near = bool(np.all(offset <= _WORLD_TOLERANCE_MM))
    return "world" if near or space_code in _WORLD_CODES else "centre"


def _recentred(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += CENTRE_MM - _centre(shape, affine)
    return moved


def _is_oblique(shape: Sequence[int], affine: np.ndarray) -> bool:
    """Say whether tilted axes would put some voxel more than half a voxel off."""
    linear = affine[:3, :3]
    tilt = np.abs(linear - np.diag(np.diag(linear))) * (np.asarray(shape) - 1) / 2
    return bool(np.any(tilt.sum(axis=1) > 0.5 * np.diag(linear)))


def _lost(data: np.ndarray, affine: np.ndarray, grid: Grid) -> float:
    """Return the share of the intensity above (or below) the background that `grid` misses."""
    step = max(1, round((data.size / _MAX_POINTS) ** (1 / 3)))
    sample = data[::step, ::step, ::step].astype(np.float64)
    faces = [np.take(sample, side, axis).ravel() for axis in range(3) for side in (0, -1)]
    weights = np.abs(sample - np.median(np.concatenate(faces)))
    indices = np.argwhere(weights > 0) * step
    if not len(indices):
        return 0.0
    weights = weights[weights > 0]
    to_grid = np.linalg.solve(grid.affine, affine)
    points = indices @ to_grid[:3, :3].T + to_grid[:3, 3]
    half = 0.5 + 1e-3  # the outermost voxels reach half a voxel beyond their centres
    inside = np.all((points >= -half) & (points <= np.asarray(grid.shape) - 1 + half), axis=1)
    return float(round(1 - weights[inside].sum() / weights.sum(), 4))


def _pad_crop(data: np.ndarray, start: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    out = np.zeros(shape, np.float32)
    into, source = [], []
    for first, n_out, n_in in zip(start, shape, data.shape, strict=True):
        low, high = max(0, -first), min(n_out, n_in - first)
        if low >= high:
            return out
        into.append(slice(low, high))
        source.append(slice(low + first, high + first))
    out[tuple(into)] = data[tuple(source)]
    return out


def _resample(data: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    to_source = np.linalg.solve(affine, grid.affine)
    # Source voxels per target voxel, along each source axis.
    ratio = np.linalg.norm(to_source[:3, :3], axis=1)
    sigma = np.sqrt(np.maximum(ratio**2 - 1, 0)) / _FWHM_PER_SIGMA

    def sample(values: np.ndarray) -> np.ndarray:
        if sigma.any():
            values = ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3)
        return np.asarray(
            ndimage.affine_transform(
                values, to_source, output_shape=grid.shape, order=1, mode="constant"
            )
        )

    covered = sample((data != 0).astype(np.float32))
    placed = sample(np.ascontiguousarray(data, np.float32))
    placed[covered < 0.5] = 0
    return np.ascontiguousarray(placed)
