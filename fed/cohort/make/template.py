"""The average anatomy that every synthetic person is bent from, with what bending it needs.

All maps come from the ICBM 2009a template (see fed/cohort/data); the structures are outlined by
plain geometry in its millimetres plus its tissue maps, so no atlas is needed. The outlines mean
"about there", which is enough for volumes that are compared with themselves.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, distance_transform_edt, gaussian_filter

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.make.fields import Floats, floats

GRIDS = {4: (46, 55, 46), 2: (91, 109, 91)}
"""Voxels along x, y and z by voxel size in mm."""

ORIGIN_MM = (-90.0, -126.0, -72.0)
"""Centre of the first voxel, at either resolution."""

_STORED_MM = 2

# Voxels of the 4 mm grid in which heads are drawn; the rest is always background.
_BOX_4MM = ((2, 44), (1, 53), (0, 42))

MAPS = (
    "cortex_gm",
    "cerebellar_gm",
    "other_gm",
    "cerebral_wm",
    "other_wm",
    "edge_mm",
    "texture",
    "ventricle_mm",
    "sulci",
    "loss",
)
"""Channels of `Template.maps`: tissue fractions; signed distance to the brain's surface (outside
positive) and to the lateral ventricles; T1 beyond what tissue explains; room in sulci, weighted;
the weight, which says how much of the cortex's change with age falls where."""

DEEP = ("lateral_ventricles", "third_ventricle", "hippocampus", "thalamus", "putamen")
"""Channels of `Template.deep`: outlines of the structures that are resized by displacement."""


@dataclass(frozen=True)
class Blob:
    """A structure on the right side, resized by a Gaussian window; the left one mirrors it."""

    centre_mm: tuple[float, float, float]
    radii_mm: tuple[float, float, float]


BLOBS = {
    "hippocampus": Blob((27.0, -21.0, -13.0), (9.0, 16.0, 9.0)),
    "thalamus": Blob((11.0, -18.0, 8.0), (9.0, 13.0, 9.0)),
    "putamen": Blob((25.0, 3.0, 1.0), (7.0, 15.0, 10.0)),
}


@dataclass(frozen=True)
class Template:
    """Everything about the template at one resolution; float32 and read-only.

    Attributes
    ----------
    resolution : int
        Voxel size in mm.
    shape : tuple of int
        The whole grid.
    box : tuple of slice
        Part of the grid in which heads are drawn.
    maps : ndarray, (x, y, z, 10)
        See `MAPS`.
    map_sums : tuple of float
        Sum of each channel of ``maps``, in voxels.
    deep : ndarray, (x, y, z, 5)
        See `DEEP`.
    away : ndarray, (x, y, z, 3)
        Displacement in mm away from the lateral ventricles, per mm of amplitude.
    edge_mm : ndarray, (x, y, z)
        The channel of ``maps`` of that name, contiguous for look-ups of its own.
    near_deep : ndarray, (x, y, z), bool
        Where a deep structure of some person may come from.
    """

    resolution: int
    shape: tuple[int, int, int]
    box: tuple[slice, slice, slice]
    maps: Floats
    map_sums: tuple[float, ...]
    deep: Floats
    away: Floats
    edge_mm: Floats
    near_deep: NDArray[np.bool_]

    def axes_mm(self) -> tuple[Floats, Floats, Floats]:
        """Voxel centres of the box along x, y and z."""
        x, y, z = (
            floats(np.arange(part.start, part.stop) * self.resolution + first)
            for part, first in zip(self.box, ORIGIN_MM, strict=True)
        )
        return x, y, z

    def to_voxels(self, points_mm: Floats) -> Floats:
        """Millimetres to voxel coordinates of the maps."""
        return floats((points_mm - floats(ORIGIN_MM)) * np.float32(1 / self.resolution))

    def brain_fraction(self, edge_mm: Floats) -> Floats:
        """How much of a voxel is brain, from its signed distance to the brain's surface."""
        return floats(np.clip(0.5 - edge_mm / np.float32(self.resolution), 0, 1))


@lru_cache(maxsize=2)
def load_template(resolution: int) -> Template:
    """Read the shipped maps and derive the rest (about 1 s).

    Parameters
    ----------
    resolution : int
        2 or 4, in mm.

    Returns
    -------
    Template
        Shared between callers; do not write to its arrays.

    Raises
    ------
    ArgumentError
        If the resolution is neither.
    """
    if resolution not in GRIDS:
        raise ArgumentError(f"resolution: expected 2 or 4 (mm), got {resolution!r}")
    t1, gm, wm, brain = _read()
    csf = np.clip(brain - gm - wm, 0, 1)
    grid = _grid_mm(t1.shape)
    deep = _outline_deep(gm, wm, csf, grid)
    edge_mm = _signed_distance(brain > 0.5)
    ventricle_mm = _signed_distance(deep[0] > 0.35)
    below, behind = _below_tentorium(grid), _behind_stem(grid)
    nuclei = np.clip(np.sum(deep[2:], axis=0) + _inner_ellipsoid(grid), 0, 1)
    cortex = gm * (1 - below) * (1 - nuclei)
    cerebellar = gm * behind * below
    outer_csf = csf * (ventricle_mm > 4) * (1 - deep[1])
    loss = _regional_weight(grid, cortex)
    sulci = gaussian_filter(outer_csf, 3.0 / _STORED_MM) * loss
    maps = [
        cortex,
        cerebellar,
        gm - cortex - cerebellar,
        wm * (1 - below),
        wm * below,
        edge_mm,
        _texture(t1, csf, gm, wm),
        ventricle_mm,
        sulci / float((sulci * cortex).sum() / cortex.sum()),
        floats(np.broadcast_to(loss, cortex.shape)),
    ]
    away = _away_from_ventricles(ventricle_mm, edge_mm)
    near = _distance(np.sum(deep, axis=0) < 0.1) < 11.0
    step = 4 // resolution
    x, y, z = (slice(low * step, (high - 1) * step + 1) for low, high in _BOX_4MM)
    stacked = _stack(maps, resolution)
    return Template(
        resolution=resolution,
        shape=GRIDS[resolution],
        box=(x, y, z),
        maps=stacked,
        map_sums=tuple(float(total) for total in stacked.sum(axis=(0, 1, 2), dtype=np.float64)),
        deep=_stack(deep, resolution),
        away=_stack(away, resolution),
        edge_mm=_stack([edge_mm], resolution)[..., 0],
        near_deep=_stack([near.astype(np.float32)], resolution)[..., 0] > 0,
    )


def _stack(channels: list[Floats], resolution: int) -> Floats:
    """Bring 2 mm maps to the resolution and lay them out with the channel last, read-only."""
    if resolution == 4:
        channels = [_coarsen(channel) for channel in channels]
    stacked = np.stack(channels, axis=-1).astype(np.float32)
    stacked.setflags(write=False)
    return stacked


def _read() -> list[Floats]:
    """T1, GM, WM and brain in 0..1 at 2 mm, as stored."""
    resource = files("sparsekit.fed.cohort") / "data" / "template-2mm.npz"
    with resource.open("rb") as stream, np.load(stream) as archive:
        return [archive[kind].astype(np.float32) / 255 for kind in ("t1", "gm", "wm", "brain")]


def _coarsen(volume: Floats) -> Floats:
    """Average a 2 mm map over the 4 mm voxels, each a union of (parts of) 27 of its voxels."""
    for axis in range(3):
        volume = floats(correlate1d(volume, [0.25, 0.5, 0.25], axis=axis))
    return np.ascontiguousarray(volume[::2, ::2, ::2])


def _grid_mm(shape: tuple[int, ...]) -> list[Floats]:
    axes = [
        np.arange(size) * _STORED_MM + first for size, first in zip(shape, ORIGIN_MM, strict=True)
    ]
    return [floats(axis) for axis in np.meshgrid(*axes, indexing="ij", sparse=True)]


def _distance(inside: NDArray[np.bool_]) -> Floats:
    """Distance in mm from each voxel inside a region to the nearest one outside it."""
    distance: Any = distance_transform_edt(inside, sampling=_STORED_MM)
    return floats(distance)


def _signed_distance(inside: NDArray[np.bool_]) -> Floats:
    """Distance in mm to the border of a region, negative inside it."""
    half = np.float32(_STORED_MM / 2)
    # Distances count from voxel centres: half a voxel puts zero on the border between them.
    return floats(np.where(inside, half - _distance(inside), _distance(~inside) - half))


def _soft_ellipsoid(grid: list[Floats], blob: Blob) -> Floats:
    """Fill a structure's ellipsoid and its mirror image, with an edge 4 mm soft."""
    x, y, z = grid
    places = (np.abs(x), y, z)
    parts = zip(places, blob.centre_mm, blob.radii_mm, strict=True)
    radius = np.sqrt(sum(((place - c) / r) ** 2 for place, c, r in parts))
    return floats(np.clip(0.5 + (1 - radius) * (min(blob.radii_mm) / 4), 0, 1))


def _outline_deep(gm: Floats, wm: Floats, csf: Floats, grid: list[Floats]) -> list[Floats]:
    """Fractions of the structures of `DEEP`."""
    x, y, z = np.abs(grid[0]), grid[1], grid[2]
    third = (x < 6) & (y > -28) & (y < 4) & (z > -9) & (z < 12)
    # Horns and body, without the fissure between the hemispheres; then atria, without cisterns.
    front = (x < 25) & (y > -26) & (y < 36) & (z > -4) & (z < 30) & ~third
    front = front & ~((x < 4) & ((y > 22) | (z > 26) | (z < 2)))
    back = (x > 12) & (x < 37) & (y > -58) & (y <= -26) & (z > -6) & (z < 30)
    channels = [csf * (front | back), csf * third]
    for name, blob in BLOBS.items():
        tissue = gm if name == "hippocampus" else gm + wm
        channels.append(tissue * _soft_ellipsoid(grid, blob))
    return channels


def _below_tentorium(grid: list[Floats]) -> Floats:
    """1 in cerebellum and brain stem: under a tent whose ridge follows the template's."""
    x, y, z = grid
    ridge = np.interp(y, (-88, -80, -70, -60, -55, -50, -40), (-22, -16, -8, 0, 3, 2, -8))
    tent = np.maximum(ridge - 0.55 * np.abs(x), -22.0)
    cerebellum = (z < tent) & (y < -40) | (z < np.minimum(tent, -26)) & (y < -32)
    stem = (np.abs(x) < 17) & (y > -45) & (y < -8) & (z < -12)
    below: Floats = (cerebellum | stem).astype(np.float32)
    return below


def _behind_stem(grid: list[Floats]) -> Floats:
    """1 behind and beside the brain stem."""
    x, y, _ = grid
    behind: Floats = ((y < -40) | (np.abs(x) > 14)).astype(np.float32)
    return behind


def _inner_ellipsoid(grid: list[Floats]) -> Floats:
    """Basal ganglia and thalamus on both sides, which are grey matter but not cortex."""
    x, y, z = grid
    radius = np.sqrt((x / 33) ** 2 + ((y + 6) / 32) ** 2 + ((z - 5) / 17) ** 2)
    inner: Floats = (radius < 1).astype(np.float32)
    return inner


def _regional_weight(grid: list[Floats], cortex: Floats) -> Floats:
    """Where cortex is lost most: frontal and temporal before occipital; mean 1 over cortex."""
    _, y, z = grid
    frontal = np.clip((y - 5) / 25, 0, 1)
    temporal = np.clip((0 - z) / 15, 0, 1) * np.clip((20 - np.abs(y + 20)) / 10, 0, 1)
    occipital = np.clip((-65 - y) / 15, 0, 1)
    weight = 1 + 0.45 * frontal + 0.25 * temporal - 0.5 * occipital
    regional: Floats = (weight / float((weight * cortex).sum() / cortex.sum())).astype(np.float32)
    return regional


def _texture(t1: Floats, csf: Floats, gm: Floats, wm: Floats) -> Floats:
    """What least-squares tissue signals miss of the T1 template, relative to white matter."""
    tissues = [tissue[t1 > 0].astype(np.float64) for tissue in (csf, gm, wm)]
    normal = [[float((a * b).sum()) for b in tissues] for a in tissues]
    right = [float((a * t1[t1 > 0]).sum()) for a in tissues]
    signal = np.linalg.solve(np.array(normal), np.array(right))
    missed = t1 - sum(s * tissue for s, tissue in zip(signal, (csf, gm, wm), strict=True))
    return floats(missed / signal[2])


def _away_from_ventricles(ventricle_mm: Floats, edge_mm: Floats) -> list[Floats]:
    """Gradient of the smoothed distance, fading with depth into tissue and at the surface."""
    smooth = gaussian_filter(ventricle_mm, 3.0 / _STORED_MM)
    # The gradient shrinks by itself near the middle of a horn, where directions cancel.
    strength = np.exp(-np.maximum(ventricle_mm, 0) / 14) * np.clip(-edge_mm / 12, 0, 1)
    return [floats(slope * strength) for slope in np.gradient(smooth, _STORED_MM)]
