"""Measures of a scan for the regressors that a network is compared with.

Some get what no network is told: the head's true pose, and the template that all heads are bent
from.
"""

import numpy as np
import numpy.typing as npt

from sparsekit.fed.cohort.make.deform import Deformation
from sparsekit.fed.cohort.make.fields import Floats, floats, sample
from sparsekit.fed.cohort.make.template import BLOBS, MAPS, ORIGIN_MM, Template
from sparsekit.fed.cohort.yardsticks import ventricle_volume
from tools.cohort_study.tissue import Tissue, posed_points

Doubles = npt.NDArray[np.float64]

IMAGE_FEATURES = (
    "ventricle_count",
    "ventricle_fluid",
    "brain",
    "gm",
    "wm",
    "csf",
    "gm_over_wm",
    "csf_over_wm",
)
"""Columns of `image_features`: logarithms of ml and of voxels, and two ratios of signals."""

_CENTRE_BOX_MM = ((-26.0, 26.0), (-42.0, 30.0), (-2.0, 28.0))
_DARK = 0.25  # of the way from tissue to fluid; below it noise would add up
_LESION_LEAST = 0.7
_LEAST = 0.5  # voxels: logarithms stay finite where nothing is found


def image_features(image: npt.NDArray[np.int16], tissue: Tissue, resolution: int) -> Doubles:
    """Two ventricle measures, four volumes, two ratios of signals; see `IMAGE_FEATURES`.

    Parameters
    ----------
    image : ndarray, (x, y, z), int16
        The whole grid.
    tissue : Tissue
        From `tissue.segment`.
    resolution : int
        Voxel size in mm.

    Returns
    -------
    ndarray, (8,), float64
    """
    csf, gm, wm = (float(part.sum(dtype=np.float64)) for part in (tissue.csf, tissue.gm, tissue.wm))
    low, middle, high = tissue.levels
    fluid = [ventricle_volume(image, resolution), _central_fluid(image, resolution)]
    volumes = np.maximum([csf + gm + wm, gm, wm, csf], _LEAST)
    return np.array([*np.log1p(fluid), *np.log(volumes), middle / high, low / high])


def _central_fluid(image: npt.NDArray[np.int16], resolution: int) -> float:
    """Millilitres of fluid in a box around the ventricles, mixed voxels by their darkness."""
    cuts = [
        slice(round((low - first) / resolution), round((high - first) / resolution) + 1)
        for (low, high), first in zip(_CENTRE_BOX_MM, ORIGIN_MM, strict=True)
    ]
    box = image[tuple(cuts)].astype(np.float64)
    dark, bright = np.percentile(box, (1, 50))
    darkness = np.clip((bright - box) / max(bright - dark, 1e-6), 0, 1)
    return float(np.maximum(darkness - _DARK, 0).sum() / (1 - _DARK) * resolution**3 / 1000)


def search_windows(template: Template) -> Floats:
    """Where the nine structures are looked for: around the template's, with room for others'.

    Parameters
    ----------
    template : Template

    Returns
    -------
    ndarray, (x, y, z, 9), float32
        In the template's grid, one window with soft edges for each of
        `sparsekit.fed.cohort.make.volumes.STRUCTURES`.
    """
    part = {name: template.maps[..., k] for k, name in enumerate(MAPS)}
    steps = (
        np.arange(size) * template.resolution + first
        for size, first in zip(template.shape, ORIGIN_MM, strict=True)
    )
    x, y, z = np.meshgrid(*steps, indexing="ij", sparse=True)
    third = ((np.abs(x) < 9) & (y > -31) & (y < 7) & (z > -11) & (z < 15)).astype(np.float32)
    deep_inside = np.clip(-part["edge_mm"] / 8 - 0.5, 0, 1)
    ventricles = np.clip(1.5 - part["ventricle_mm"] / 6, 0, 1) * (1 - third) * deep_inside

    def around(name: str) -> Floats:
        blob = BLOBS[name]
        places = zip((np.abs(x), y, z), blob.centre_mm, blob.radii_mm, strict=True)
        radius = np.sqrt(sum(((place - centre) / r) ** 2 for place, centre, r in places))
        return floats(np.clip(0.5 + (1.25 - radius) * (min(blob.radii_mm) / 4), 0, 1))

    deep = {name: around(name) for name in BLOBS}
    below = np.clip(3 * (part["other_wm"] + part["cerebellar_gm"]), 0, 1)
    white = np.clip((part["cerebral_wm"] - 0.6) / 0.4, 0, 1)
    maps = {
        "lateral_ventricles": ventricles,
        "third_ventricle": third,
        "cortex_gm": (1 - below) * np.clip(1 - sum(deep.values()), 0, 1),
        "cerebral_wm": 1 - below,
        **deep,
        "cerebellar_gm": below,
        "wm_hypointensities": white * np.clip(part["ventricle_mm"] / 3, 0, 1),
    }
    return floats(np.stack(list(maps.values()), axis=-1))


def nine_volumes(template: Template, windows: Floats, pose: Deformation, tissue: Tissue) -> Doubles:
    """Measure the nine structures in a scan, in windows that the true pose lays over it.

    Parameters
    ----------
    template : Template
    windows : ndarray, (x, y, z, 9), float32
        From `search_windows`.
    pose : Deformation
        Of the head; only its pose is looked at.
    tissue : Tissue
        Of the head.

    Returns
    -------
    ndarray, (9,), float64
        Logarithms of the volumes, as shares of the true size of the head.
    """
    points = template.to_voxels(posed_points(template, pose, tissue.voxels))
    inside = sample(windows, points)
    csf, gm, wm = tissue.csf, tissue.gm, tissue.wm
    # Of the white matter's window, what is plainly not white: less is noise and neighbours.
    lesions = wm < 1 - _LESION_LEAST
    parts = np.stack([csf, csf, gm, wm, gm, gm + wm, gm, gm, lesions], axis=1)
    found = (inside * parts).sum(axis=0, dtype=np.float64) * np.linalg.det(pose.matrix)
    volumes: Doubles = np.log(np.maximum(found, _LEAST))
    return volumes


def undo_pose(template: Template, box: Floats, pose: Deformation) -> Floats:
    """Bring a scan back to the template's position, size and aspect, by the pose that was drawn.

    Parameters
    ----------
    template : Template
    box : ndarray, (x, y, z), float32
        The scan on the template's box.
    pose : Deformation
        Of the head.

    Returns
    -------
    ndarray, (x, y, z), float32
        On the template's box, 0 where the scan does not reach. The random warps are left in.
    """
    axes = template.axes_mm()
    there = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    here = (there - pose.offset_mm) @ np.linalg.inv(pose.matrix).T
    voxels = (here - np.array([axis[0] for axis in axes])) / template.resolution
    beyond = ((voxels < -0.5) | (voxels > np.array(box.shape) - 0.5)).any(axis=1)
    undone = sample(np.ascontiguousarray(box[..., None]), floats(voxels))[:, 0]
    undone[beyond] = 0
    return undone.reshape(box.shape)
