"""Tissue from intensities: three signals and a smooth shading, fitted to one scan."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from sparsekit.fed.cohort.make.deform import Deformation
from sparsekit.fed.cohort.make.fields import Floats, floats, sample
from sparsekit.fed.cohort.make.template import MAPS, Template

Doubles = npt.NDArray[np.float64]

_START_PERCENT = (8.0, 45.0, 85.0)
_START_SPREAD = (0.3, 0.1, 0.06)
_SPREADS = (0.02, 0.4)  # of the logarithm within a tissue; noise alone gives 0.02
_BINS = 256
_EVERY = 4  # voxels are plenty: the fit looks at every fourth
_ROUNDS, _STEPS = 4, 4
_TEMPLATE_TRUST = 0.8
_POWERS = [(i, j, k) for i in range(4) for j in range(4) for k in range(4) if i + j + k <= 3]


@dataclass(frozen=True)
class Tissue:
    """What intensities say of the voxels of a head.

    Attributes
    ----------
    voxels : ndarray, (n,), intp
        Flat indices of the voxels above 0.
    levels : tuple of 3 float
        Signal of fluid, grey and white matter.
    csf, gm, wm : ndarray, (n,), float32
        Fractions that add up to 1: a voxel between two levels holds both tissues.
    """

    voxels: npt.NDArray[np.intp]
    levels: tuple[float, float, float]
    csf: Floats
    gm: Floats
    wm: Floats


def segment(box: npt.NDArray[np.int16]) -> Tissue:
    """Fit three normal distributions to the histogram of the intensities' logarithms.

    Parameters
    ----------
    box : ndarray, (d, h, w), int16
        Skull-stripped, 0 outside the head.

    Returns
    -------
    Tissue
    """
    voxels = np.flatnonzero(box)
    logs = np.log(box.reshape(-1)[voxels].astype(np.float32))
    counts, edges = np.histogram(logs, _BINS)
    middles = (edges[1:] + edges[:-1]) / 2
    means = np.percentile(logs, _START_PERCENT)
    spread = np.array(_START_SPREAD)
    share = np.full(3, 1 / 3)
    for _ in range(2 * _ROUNDS * _STEPS):
        chance = counts[:, None] * _chances(middles, means, spread, share)
        means, spread = _moments(middles, chance)
        share = chance.sum(axis=0) / counts.sum()
    return _fractions(voxels, np.exp(logs), np.exp(np.sort(means)))


def segment_with_template(
    box: npt.NDArray[np.int16], template: Template, pose: Deformation
) -> Tissue:
    """Fit tissues and shading together, with the template's tissues as what is likely where.

    Parameters
    ----------
    box : ndarray, (d, h, w), int16
        The template's box of a skull-stripped scan.
    template : Template
    pose : Deformation
        Of the head; only its pose is looked at.

    Returns
    -------
    Tissue
        After division by the shading, a polynomial of the third degree in the logarithm.
    """
    voxels = np.flatnonzero(box)
    logs = np.log(box.reshape(-1)[voxels].astype(np.float64))
    some = slice(None, None, _EVERY)
    few = logs[some]
    likely = _template_tissues(template, pose, voxels[some])
    basis = _polynomials(box.shape)[voxels]
    seen = basis[some].astype(np.float64)
    shading = np.zeros_like(few)
    # To begin with, only places of one tissue count.
    means, spread = _moments(few, likely**4)
    spread = np.array(_START_SPREAD)
    coefficients = np.zeros(seen.shape[1])
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            chance = _chances(few - shading, means, spread, likely)
            means, spread = _moments(few - shading, chance)
        # Fluid tells nothing of shading: noise and mixtures spread it wide.
        trust = chance[:, 1:] / spread[1:] ** 2
        total = trust.sum(axis=1)
        expected = (trust * means[1:]).sum(axis=1) / np.maximum(total, 1e-9)
        weighted = seen * total[:, None]
        damping = 1e-3 * total.sum() * np.eye(seen.shape[1])
        coefficients = np.linalg.solve(weighted.T @ seen + damping, weighted.T @ (few - expected))
        coefficients[0] -= (seen @ coefficients).mean()  # the first monomial is 1
        shading = seen @ coefficients
    return _fractions(voxels, np.exp(logs - basis @ floats(coefficients)), np.exp(np.sort(means)))


def _chances(values: Doubles, means: Doubles, spread: Doubles, likely: Doubles) -> Doubles:
    squared = np.minimum(((values[:, None] - means) / spread) ** 2, 60.0)
    chance: Doubles = likely / spread * np.exp(-0.5 * squared)
    chance /= chance.sum(axis=1, keepdims=True)
    return chance


def _moments(values: Doubles, chance: Doubles) -> tuple[Doubles, Doubles]:
    mass = chance.sum(axis=0) + 1e-9
    means = (chance * values[:, None]).sum(axis=0) / mass
    spread = np.sqrt((chance * (values[:, None] - means) ** 2).sum(axis=0) / mass)
    return means, np.clip(spread, *_SPREADS)


def _fractions(
    voxels: npt.NDArray[np.intp], signal: npt.NDArray[np.floating], levels: Doubles
) -> Tissue:
    csf, gm, wm = (float(level) for level in levels)
    above_csf = np.clip((signal - csf) / max(gm - csf, 1e-6), 0, 1)
    above_gm = np.clip((signal - gm) / max(wm - gm, 1e-6), 0, 1)
    return Tissue(
        voxels, (csf, gm, wm), floats(1 - above_csf), floats(above_csf - above_gm), floats(above_gm)
    )


def _template_tissues(
    template: Template, pose: Deformation, voxels: npt.NDArray[np.intp]
) -> Doubles:
    """Chance of fluid, grey and white matter at voxels of a posed head, (n, 3)."""
    maps = sample(template.maps, template.to_voxels(posed_points(template, pose, voxels)))
    part = {name: maps[:, k] for k, name in enumerate(MAPS)}
    gm = part["cortex_gm"] + part["cerebellar_gm"] + part["other_gm"]
    wm = part["cerebral_wm"] + part["other_wm"]
    known = np.stack([np.clip(1 - gm - wm, 0, 1), gm, wm], axis=1).astype(np.float64)
    known /= known.sum(axis=1, keepdims=True)
    likely: Doubles = _TEMPLATE_TRUST * known + (1 - _TEMPLATE_TRUST) / 3
    return likely


def posed_points(template: Template, pose: Deformation, voxels: npt.NDArray[np.intp]) -> Floats:
    """Millimetres in the template of voxels of a head, by its pose alone; (n, 3)."""
    axes = template.axes_mm()
    places = np.unravel_index(voxels, tuple(len(axis) for axis in axes))
    here = np.stack([axis[place] for axis, place in zip(axes, places, strict=True)], axis=1)
    return floats(here @ floats(pose.matrix.T) + floats(pose.offset_mm))


@lru_cache(maxsize=2)
def _polynomials(shape: tuple[int, ...]) -> Floats:
    """Values of all monomials up to the third degree at every voxel of a box; 1 comes first."""
    places = np.unravel_index(np.arange(int(np.prod(shape))), shape)
    x, y, z = (2 * p / max(n - 1, 1) - 1 for p, n in zip(places, shape, strict=True))
    return floats(np.stack([x**i * y**j * z**k for i, j, k in _POWERS], axis=1))
