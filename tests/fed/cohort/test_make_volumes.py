"""Asked against rendered: each of the nine structures must follow what was asked of it."""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import correlate1d

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.environment import plan_sites
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.measure import achieved_fractions, ventricle_fluid
from sparsekit.fed.cohort.make.people import draw_person, scan_rng, shape_rng
from sparsekit.fed.cohort.make.scanner import Site, scan
from sparsekit.fed.cohort.make.template import load_template
from sparsekit.fed.cohort.make.volumes import STRUCTURES

PEOPLE = 60
PLAIN = Site(
    gm_signal=0.7,
    csf_signal=0.25,
    fwhm_mm=0.0,
    noise_sd=0.02,
    shading_sd=0.0,
    gamma=1.0,
    gain=1000.0,
    margin_mm=0.0,
)


@dataclass(frozen=True)
class Measured:
    """Of the same people, in natural logarithms: asked and achieved shares of the brain."""

    asked: NDArray[np.float64]
    achieved: NDArray[np.float64]
    head_errors: NDArray[np.float64]
    fluid: NDArray[np.float64]


@pytest.fixture(scope="module")
def measured() -> Measured:
    template = load_template(4)
    plans = plan_sites("uniform-iid", subjects=PEOPLE, sites=1)
    asked, achieved, heads, fluid = [], [], [], []
    for index in range(PEOPLE):
        person = draw_person(plans, index, seed=11, residual_scale=0.5)
        anatomy = build_anatomy(template, person, shape_rng(11, index))
        asked.append(person.log_fractions)
        achieved.append(np.log(achieved_fractions(template, anatomy)))
        heads.append(np.log(anatomy.deformation.brain_mm3) - person.log_icv)
        image = scan(template, anatomy, person, PLAIN, scan_rng(11, index), noise=False)
        fluid.append(np.log(ventricle_fluid(template, anatomy, image)))
    return Measured(np.array(asked), np.array(achieved), np.array(heads), np.array(fluid))


@pytest.mark.parametrize(
    ("structure", "least_r"),
    [pytest.param(name, 0.9 if name == "thalamus" else 0.95, id=name) for name in STRUCTURES],
)
def test_each_structure_follows_what_was_asked(
    measured: Measured, structure: str, least_r: float
) -> None:
    column = STRUCTURES.index(structure)
    asked, achieved = measured.asked[:, column], measured.achieved[:, column]
    r = float(np.corrcoef(asked, achieved)[0, 1])
    slope = float(np.polyfit(asked, achieved, 1)[0])
    assert r > least_r
    assert 0.85 < slope < 1.15


def test_structures_do_not_stand_in_for_each_other(measured: Measured) -> None:
    # What is left of each structure after the others' asked volumes must still follow its own.
    for column, name in enumerate(STRUCTURES):
        others = np.delete(measured.asked, column, axis=1)
        design = np.concatenate([others, np.ones((PEOPLE, 1))], axis=1)

        def rest(
            values: NDArray[np.float64], design: NDArray[np.float64] = design
        ) -> NDArray[np.float64]:
            fit, *_ = np.linalg.lstsq(design, values, rcond=None)
            left: NDArray[np.float64] = values - design @ fit
            return left

        own = rest(measured.asked[:, column])
        rendered = rest(measured.achieved[:, column])
        assert np.corrcoef(own, rendered)[0, 1] > 0.85, name


def test_heads_have_the_asked_size(measured: Measured) -> None:
    assert measured.head_errors.std() < 0.005


def test_the_image_itself_shows_the_ventricles(measured: Measured) -> None:
    asked = measured.asked[:, STRUCTURES.index("lateral_ventricles")]
    assert np.corrcoef(asked, measured.fluid)[0, 1] > 0.9
    assert 0.7 < np.polyfit(asked, measured.fluid, 1)[0] < 1.3


def test_both_resolutions_show_the_same_people() -> None:
    plans = plan_sites("uniform-iid", subjects=8, sites=1)
    templates = (load_template(4), load_template(2))
    for index in range(3):
        person = draw_person(plans, index, seed=2, residual_scale=0.5)
        heads = [build_anatomy(t, person, shape_rng(2, index)) for t in templates]
        shares = [
            np.log(achieved_fractions(t, head)) for t, head in zip(templates, heads, strict=True)
        ]
        assert np.abs(shares[0] - shares[1]).max() < 0.08
        coarse, fine = (
            scan(t, head, person, PLAIN, scan_rng(2, index), noise=False).astype(np.float32)
            for t, head in zip(templates, heads, strict=True)
        )
        for axis in range(3):
            fine = correlate1d(fine, [0.25, 0.5, 0.25], axis=axis)
        assert np.corrcoef(coarse.ravel(), fine[::2, ::2, ::2].ravel())[0, 1] > 0.98


def test_unknown_resolutions_are_refused() -> None:
    with pytest.raises(ArgumentError, match="expected 2 or 4"):
        load_template(3)
