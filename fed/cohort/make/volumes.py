"""Volumes of nine brain structures by age and sex, fitted to 518 real people (IXI).

Fit: ``log(V / ICV) = b0 + d1 a + d2 a^2 + m male + site + e`` with ``a = (age - 60) / 10`` over
the 518 people of the IXI data set (age 20-86, CC BY-SA 3.0) whose FreeSurfer volumes and
demographics the public repository dfsp-spirit/brainnet carries. Only the fitted numbers below
are used here; NOTICE has the attribution. The fit's site terms say how far apart three sites
measure the same kind of people; a synthetic site draws its own from their spread.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STRUCTURES = (
    "lateral_ventricles",
    "third_ventricle",
    "cortex_gm",
    "cerebral_wm",
    "hippocampus",
    "thalamus",
    "putamen",
    "cerebellar_gm",
    "wm_hypointensities",
)
"""Order of every array of nine in this package; paired structures are left plus right."""

REFERENCE_AGE = 62.7
"""Age in years, halfway between the sexes, that the template's anatomy is taken to have."""

# Fraction of the intracranial volume at 60, per decade, per decade squared, male, residual SD.
_FIT: NDArray[np.float64] = np.array(
    [
        (0.01215, +0.259, +0.0328, +0.086, 0.395),
        (0.00076, +0.177, +0.0215, +0.087, 0.248),
        (0.27688, -0.036, -0.0032, -0.017, 0.063),
        (0.31363, -0.010, -0.0056, +0.001, 0.074),
        (0.00527, -0.033, -0.0098, -0.056, 0.085),
        (0.00927, -0.042, -0.0058, -0.028, 0.073),
        (0.00561, -0.034, -0.0026, -0.035, 0.099),
        (0.06960, -0.022, -0.0038, -0.012, 0.089),
        (0.00092, +0.348, +0.0570, +0.097, 0.447),
    ]
)
# How far HH and IOP lie from Guy's, in the same order; two of the three sites of IXI.
_HH = (-0.100, -0.038, -0.030, -0.014, 0.028, 0.019, -0.011, -0.023, 0.140)
_IOP = (0.009, 0.123, -0.019, 0.016, 0.118, 0.049, 0.003, 0.056, 0.627)
IXI_SITE_TERMS: NDArray[np.float64] = np.array(((0.0,) * len(STRUCTURES), _HH, _IOP))
"""Log fractions of the sites Guy's, HH and IOP over Guy's; shape (3, 9), float64."""
_RESIDUAL_CORRELATIONS = (
    (0.52, -0.23, -0.23, -0.31, -0.31, -0.21, -0.17, 0.21),
    (-0.03, -0.22, -0.11, -0.19, -0.09, 0.02, 0.09),
    (-0.09, 0.44, 0.38, 0.28, 0.28, -0.34),
    (0.16, 0.39, 0.24, 0.03, 0.38),
    (0.52, 0.35, 0.36, -0.20),
    (0.37, 0.32, -0.05),
    (0.27, -0.01),
    (-0.22,),
)
_LOG_ICV_MALE, _LOG_ICV_FEMALE, _LOG_ICV_SD = 14.321, 14.181, 0.096
REFERENCE_LOG_ICV = (_LOG_ICV_MALE + _LOG_ICV_FEMALE) / 2
"""Log of the mean intracranial volume in mm3; a head of this size is as large as the template."""


def _correlations() -> NDArray[np.float64]:
    correlation: NDArray[np.float64] = np.eye(len(STRUCTURES))
    for row, values in enumerate(_RESIDUAL_CORRELATIONS):
        correlation[row, row + 1 :] = values
        correlation[row + 1 :, row] = values
    return correlation


# The loadings on nine independent normals that give the residuals' spread and correlations.
_RESIDUAL_FACTOR: NDArray[np.float64] = np.linalg.cholesky(_correlations()) * _FIT[:, 4:5]


def expected_log_fractions(age: float, *, male: float) -> NDArray[np.float64]:
    """Mean log fraction of the intracranial volume of each structure.

    Parameters
    ----------
    age : float
        Years.
    male : float
        1 for men, 0 for women, 0.5 for the mean of both.

    Returns
    -------
    ndarray, (9,), float64
        Natural logarithms, in the order of `STRUCTURES`.
    """
    decades = (age - 60.0) / 10.0
    base, first, second, sex = (_FIT[:, column] for column in range(4))
    logs: NDArray[np.float64] = np.log(base) + first * decades + second * decades**2 + sex * male
    return logs


def draw_log_fractions(
    rng: np.random.Generator, age: float, *, male: bool, residual_scale: float
) -> NDArray[np.float64]:
    """Draw one person's log fractions of the intracranial volume.

    Parameters
    ----------
    rng : Generator
        Nine standard normals are taken from it.
    age : float
        Years.
    male : bool
        Sex as in the fit.
    residual_scale : float
        Factor on the correlated residuals; 1 is the spread between the people of IXI.

    Returns
    -------
    ndarray, (9,), float64
        Natural logarithms, in the order of `STRUCTURES`.
    """
    residual = (_RESIDUAL_FACTOR * rng.standard_normal(len(STRUCTURES))).sum(axis=1)
    logs: NDArray[np.float64] = (
        expected_log_fractions(age, male=float(male)) + residual_scale * residual
    )
    return logs


@dataclass(frozen=True)
class FittedTerms:
    """The table as fitted, to compare other people with.

    Attributes
    ----------
    coefficients : ndarray, (9, 6), float64
        Log fraction at 60, per decade, per decade squared, male, HH over Guy's, IOP over Guy's.
    residual_sd : ndarray, (9,), float64
    correlations : ndarray, (9, 9), float64
        Of the residuals.
    """

    coefficients: NDArray[np.float64]
    residual_sd: NDArray[np.float64]
    correlations: NDArray[np.float64]


def fitted_terms() -> FittedTerms:
    """Copy out the fit to IXI, structures in the order of `STRUCTURES`."""
    terms = [np.log(_FIT[:, 0]), *_FIT[:, 1:4].T, *IXI_SITE_TERMS[1:]]
    return FittedTerms(np.stack(terms, axis=1), _FIT[:, 4].copy(), _correlations())


def draw_site_terms(rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw one site's log fractions over those of the average site.

    Their covariance between sites is that of the three sites of IXI.

    Parameters
    ----------
    rng : Generator
        Three standard normals are taken from it.

    Returns
    -------
    ndarray, (9,), float64
        Natural logarithms, in the order of `STRUCTURES`, at a residual scale of 1.
    """
    apart = IXI_SITE_TERMS - IXI_SITE_TERMS.mean(axis=0)
    weights = rng.standard_normal(len(apart)) / np.sqrt(len(apart) - 1)
    terms: NDArray[np.float64] = (weights[:, None] * apart).sum(axis=0)
    return terms


def draw_log_icv(rng: np.random.Generator, *, male: bool) -> float:
    """Draw the natural logarithm of an intracranial volume in mm3."""
    mean = _LOG_ICV_MALE if male else _LOG_ICV_FEMALE
    return mean + _LOG_ICV_SD * float(rng.standard_normal())
