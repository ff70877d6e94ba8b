"""Who the synthetic participants are: age, sex, head size and the nine asked volumes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from sparsekit.fed.cohort.environment import SitePlan
from sparsekit.fed.cohort.make import volumes

# Second entry of each seed sequence, so that no two purposes share a stream.
_PERSON_STREAM, _SHAPE_STREAM, _SCAN_STREAM, _SITE_STREAM, _SITE_VOLUME_STREAM = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Person:
    """One participant before a scan is made.

    Attributes
    ----------
    index : int
        Position in the cohort, from 0.
    site : int
        Index of the site.
    age : float
        Years, rounded to two decimals.
    male : bool
        Sex as in the fitted table.
    log_icv : float
        Natural logarithm of the intracranial volume in mm3.
    log_fractions : ndarray, (9,), float64
        Natural logarithms of the asked volumes as fractions of the intracranial volume, in the
        order of `sparsekit.fed.cohort.make.volumes.STRUCTURES`.
    """

    index: int
    site: int
    age: float
    male: bool
    log_icv: float
    log_fractions: NDArray[np.float64]

    @property
    def label(self) -> str:
        """BIDS participant label, such as ``sub-00001``."""
        return f"sub-{self.index + 1:05d}"

    def volumes_mm3(self) -> NDArray[np.float64]:
        """Asked volumes in mm3, order as in ``log_fractions``; shape (9,), float64."""
        asked: NDArray[np.float64] = np.exp(self.log_fractions + self.log_icv)
        return asked


def draw_person(
    plans: Sequence[SitePlan], index: int, *, seed: int, residual_scale: float
) -> Person:
    """Draw one participant; the result depends on nothing but the arguments.

    Parameters
    ----------
    plans : sequence of SitePlan
        The environment; participants fill its sites in order.
    index : int
        Position in the cohort, from 0.
    seed : int
        Seed of the cohort.
    residual_scale : float
        See `sparsekit.fed.cohort.make.volumes.draw_log_fractions`.

    Returns
    -------
    Person
        The participant.
    """
    site = 0
    first = 0
    while index >= first + plans[site].people:
        first += plans[site].people
        site += 1
    rng = np.random.default_rng([seed, _PERSON_STREAM, index])
    plan = plans[site]
    low, high = (ndtr((limit - plan.age_mean) / plan.age_sd) for limit in plan.age_range)
    age = plan.age_mean + plan.age_sd * float(ndtri(low + (high - low) * rng.random()))
    age = round(min(max(age, plan.age_range[0]), plan.age_range[1]), 2)
    male = bool(rng.random() < 0.5)
    log_icv = volumes.draw_log_icv(rng, male=male)
    fractions = volumes.draw_log_fractions(rng, age, male=male, residual_scale=residual_scale)
    fractions += residual_scale * _site_terms(plan, seed, site)
    return Person(index, site, age, male, log_icv, fractions)


def _site_terms(plan: SitePlan, seed: int, site: int) -> NDArray[np.float64]:
    """What the site adds to the log fractions at a residual scale of 1."""
    if plan.ixi_site is not None:
        terms: NDArray[np.float64] = volumes.IXI_SITE_TERMS[plan.ixi_site]
        return terms
    return volumes.draw_site_terms(np.random.default_rng([seed, _SITE_VOLUME_STREAM, site]))


def shape_rng(seed: int, index: int) -> np.random.Generator:
    """Stream of one person's anatomy; the same at every resolution."""
    return np.random.default_rng([seed, _SHAPE_STREAM, index])


def scan_rng(seed: int, index: int) -> np.random.Generator:
    """Stream of one person's scan: contrast, bias field and noise."""
    return np.random.default_rng([seed, _SCAN_STREAM, index])


def site_rng(seed: int, site: int) -> np.random.Generator:
    """Stream of one site's scanner."""
    return np.random.default_rng([seed, _SITE_STREAM, site])
