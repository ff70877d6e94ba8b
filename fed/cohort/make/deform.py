"""Where each voxel of a person's head comes from in the template.

Everything is a pull-back: for a voxel of the person, the point of the template that is seen
there. Pose and random warps come first; then the deep structures are resized by displacements
whose amplitudes are solved for, so that each ends at its asked share of the brain whatever the
warps, the head size and its neighbours did to it.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sparsekit.fed.cohort.make.fields import Floats, SplineLattice, floats, nearest, sample
from sparsekit.fed.cohort.make.template import BLOBS, DEEP, ORIGIN_MM, Blob, Template, load_template

# Lattice spacing and standard deviation, in mm, of the three random warps.
_WARPS_MM = ((48.0, 2.5), (20.0, 1.8), (12.0, 0.8))
_ASPECT_SD = 0.02
_ROTATION_SD_DEG = 2.5
_SHIFT_SD_MM = 2.5
_PIVOT_MM = (0.0, -18.0, 8.0)
_VENTRICLE_UNEVEN_SD = 0.2
_VENTRICLE_UNEVEN_MM = 60.0
_SIDE_SD = 0.15
# Heads end at most this far outside the brain's surface (skull-strip margin plus blur).
_RIM_MM = 6.0
_ROUNDS = 3

# Amplitudes at which the size of each deep structure is tabulated: mm for the lateral ventricles,
# for the rest the relative change of length at the middle (positive widens the third ventricle
# and shrinks the others).
_AMPLITUDES = {
    "lateral_ventricles": (-9.0, -6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 9.0, 12.0, 16.0),
    "third_ventricle": (-1.6, -1.0, -0.5, 0.0, 0.3, 0.6, 0.8, 1.0, 1.2),
}
_BLOB_AMPLITUDES = (1.1, 0.7, 0.35, 0.0, -0.3, -0.6, -0.85)


@dataclass(frozen=True)
class Deformation:
    """The voxels that show this head and where they come from.

    Attributes
    ----------
    voxels : ndarray, (n,), intp
        Flat indices into the template's box.
    source : ndarray, (n, 3), float32
        Voxel coordinates in the template's maps.
    brain_mm3 : float
        Volume of the head's brain.
    growth : float
        ``brain_mm3`` over the template's.
    matrix : ndarray, (3, 3), float64
        Of the pose: rotation, head size and aspect.
    offset_mm : ndarray, (3,), float64
        Of the pose. Without warps and resized structures the template's point
        ``matrix @ p + offset_mm`` would be seen at the head's point p.
    """

    voxels: NDArray[np.intp]
    source: Floats
    brain_mm3: float
    growth: float
    matrix: NDArray[np.float64]
    offset_mm: NDArray[np.float64]


@dataclass(frozen=True)
class _Calibration:
    """Log size of each deep structure over the template's, at the tabulated amplitudes."""

    sizes: Floats
    amplitudes: tuple[tuple[float, ...], ...]
    log_ratios: tuple[tuple[float, ...], ...]

    def amplitudes_for(self, log_ratios: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array(
            [
                np.interp(wanted, logs, amplitudes)
                for wanted, logs, amplitudes in zip(
                    log_ratios, self.log_ratios, self.amplitudes, strict=True
                )
            ]
        )


@lru_cache(maxsize=32)
def lattice(resolution: int, spacing_mm: float) -> SplineLattice:
    """Splines over the template's box, kept because they are the same for everybody."""
    return SplineLattice.over(load_template(resolution).axes_mm(), spacing_mm)


def deform(
    template: Template,
    rng: np.random.Generator,
    *,
    log_head_size: float,
    log_ratios: NDArray[np.float64],
) -> Deformation:
    """Draw a head and resize its deep structures.

    Parameters
    ----------
    template : Template
        From `load_template`.
    rng : Generator
        The person's stream.
    log_head_size : float
        Natural logarithm of the brain's volume over the template's.
    log_ratios : ndarray, (5,), float64
        For each structure of `DEEP`, the logarithm of its share of the brain over its share of
        the template's brain.

    Returns
    -------
    Deformation
        Of the voxels within a few mm of the brain.
    """
    posed_mm, edge_mm, matrix, offset_mm = _posed(template, rng, log_head_size)
    voxels = np.flatnonzero(edge_mm.ravel() < _RIM_MM)
    points_mm = posed_mm.reshape(-1, 3)[voxels]
    brain_mm3 = float(
        template.brain_fraction(edge_mm.ravel()[voxels]).sum(dtype=np.float64)
        * template.resolution**3
    )
    growth = brain_mm3 / _brain_mm3(template.resolution)
    uneven = lattice(template.resolution, _VENTRICLE_UNEVEN_MM).draw(
        rng, 1, sd=_VENTRICLE_UNEVEN_SD
    )
    sides = _SIDE_SD * rng.standard_normal(len(BLOBS))

    points = template.to_voxels(points_mm)
    away = sample(template.away, points)
    away *= 1 + uneven.reshape(-1, 1)[voxels]
    deep = np.flatnonzero(nearest(template.near_deep, points))
    bases = _bases(points_mm[deep], away[deep], sides)
    targets = log_ratios + np.log(growth)
    calibration = _calibration(template.resolution)
    asked = targets.copy()
    for _ in range(_ROUNDS):
        amplitudes = calibration.amplitudes_for(asked)
        moved = points_mm[deep] + _combine(bases, amplitudes)
        asked += targets - _log_sizes(template, moved, calibration.sizes)
    amplitudes = calibration.amplitudes_for(asked)
    source_mm = floats(points_mm - np.float32(amplitudes[0]) * away)
    source_mm[deep] = points_mm[deep] + _combine(bases, amplitudes)
    return Deformation(voxels, template.to_voxels(source_mm), brain_mm3, growth, matrix, offset_mm)


def _posed(
    template: Template, rng: np.random.Generator, log_head_size: float
) -> tuple[Floats, Floats, NDArray[np.float64], NDArray[np.float64]]:
    """Template position in mm of every voxel of the box, its distance to the surface, the pose."""
    aspect = _ASPECT_SD * rng.standard_normal(3)
    aspect -= aspect.mean()
    angles = np.deg2rad(_ROTATION_SD_DEG) * rng.standard_normal(3)
    shift_mm = _SHIFT_SD_MM * rng.standard_normal(3)
    # A larger head looks at a smaller part of the template from each voxel.
    scale = np.exp(-(aspect + log_head_size / 3))
    matrix = _rotation(angles) * scale[:, None]
    pivot = np.array(_PIVOT_MM)
    x, y, z = (
        (axis[:, None] * matrix[:, k]).astype(np.float32)
        for k, axis in enumerate(template.axes_mm())
    )
    offset_mm = pivot - (matrix * (pivot + shift_mm)).sum(axis=1)
    posed = x[:, None, None] + (y[:, None] + (z + offset_mm.astype(np.float32)))
    for spacing_mm, sd_mm in _WARPS_MM:
        posed += lattice(template.resolution, spacing_mm).draw(rng, 3, sd=sd_mm)
    # Warps and aspect change the brain's volume too: scale once more to the asked size. Every
    # second voxel along each axis tells it well enough.
    some = template.to_voxels(posed[::2, ::2, ::2])
    fraction = template.brain_fraction(nearest(template.edge_mm, some))
    got = float(fraction.sum(dtype=np.float64)) * (2 * template.resolution) ** 3
    wanted = _brain_mm3(template.resolution) * np.exp(log_head_size)
    factor = (got / wanted) ** (1 / 3)
    posed *= np.float32(factor)
    posed += ((1 - factor) * pivot).astype(np.float32)
    distance = nearest(template.edge_mm, template.to_voxels(posed))
    return posed, distance, factor * matrix, factor * offset_mm + (1 - factor) * pivot


@lru_cache(maxsize=2)
def _brain_mm3(resolution: int) -> float:
    template = load_template(resolution)
    fraction = template.brain_fraction(template.edge_mm)
    return float(fraction.sum(dtype=np.float64)) * resolution**3


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation by small angles about x, y and z, one after the other."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        one = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        rotation = rotation @ one
    return rotation


def _bases(points_mm: Floats, away: Floats, sides: NDArray[np.float64]) -> list[Floats]:
    """Displacement of each point per unit of amplitude, for each structure of `DEEP`."""
    blobs = [
        _resize(points_mm, blob, float(side))
        for blob, side in zip(BLOBS.values(), sides, strict=True)
    ]
    return [-away, _open_third(points_mm), *blobs]


def _open_third(points_mm: Floats) -> Floats:
    """Draw points towards the midline between the thalami, which widens the third ventricle."""
    x, y, z = points_mm[:, 0], points_mm[:, 1], points_mm[:, 2]
    window = np.clip((16 - np.abs(y + 13)) / 4 + 0.5, 0, 1)
    window *= np.clip((10 - np.abs(z - 2)) / 4 + 0.5, 0, 1)
    basis = np.zeros_like(points_mm)
    basis[:, 0] = -x * np.exp(-((x / 13) ** 2)) * window
    return basis


def _resize(points_mm: Floats, blob: Blob, side: float) -> Floats:
    """Move points away from the centre of each side's structure, which shrinks it."""
    right = points_mm[:, 0] > 0
    from_centre = points_mm - floats(blob.centre_mm)
    from_centre[:, 0] = points_mm[:, 0] + np.where(right, -1, 1) * np.float32(blob.centre_mm[0])
    squared = ((from_centre / floats(blob.radii_mm)) ** 2).sum(axis=1)
    window = np.clip(1 - squared / 5, 0, None) ** 2
    # The side away from the midline must not pull on the other hemisphere.
    window *= np.clip(np.abs(points_mm[:, 0]) / 4, 0, 1)
    gain = np.where(right, 1 + side, 1 - side).astype(np.float32)
    basis: Floats = from_centre * (window * gain)[:, None]
    return basis


def _combine(bases: list[Floats], amplitudes: NDArray[np.float64]) -> Floats:
    total = np.zeros_like(bases[0])
    for basis, amplitude in zip(bases, amplitudes, strict=True):
        total += np.float32(amplitude) * basis
    return total


def _log_sizes(template: Template, source_mm: Floats, sizes: Floats) -> NDArray[np.float64]:
    fractions = sample(template.deep, template.to_voxels(source_mm))
    # An emptied structure must not be an infinite error.
    found = np.maximum(fractions.sum(axis=0, dtype=np.float64), 0.02 * sizes)
    logs: NDArray[np.float64] = np.log(found / sizes)
    return logs


@lru_cache(maxsize=2)
def _calibration(resolution: int) -> _Calibration:
    """Tabulate amplitude against size on the template itself, one structure at a time."""
    template = load_template(resolution)
    sizes = template.deep.sum(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    voxels = np.argwhere(template.near_deep).astype(np.float32)
    points_mm = floats(voxels * np.float32(resolution) + floats(ORIGIN_MM))
    bases = _bases(points_mm, sample(template.away, voxels), np.zeros(len(BLOBS)))
    tables = []
    logs = []
    for channel, name in enumerate(DEEP):
        amplitudes = _AMPLITUDES.get(name, _BLOB_AMPLITUDES)
        ratios = [
            _log_sizes(template, floats(points_mm + np.float32(amplitude) * bases[channel]), sizes)[
                channel
            ]
            for amplitude in amplitudes
        ]
        assert all(a < b for a, b in pairwise(ratios)), (name, ratios)
        tables.append(tuple(amplitudes))
        logs.append(tuple(float(ratio) for ratio in ratios))
    return _Calibration(sizes, tuple(tables), tuple(logs))
