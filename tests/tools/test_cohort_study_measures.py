"""Measures of scans that the study's simple regressors get."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.fed.cohort.environment import plan_sites
from sparsekit.fed.cohort.make.anatomy import Anatomy, build_anatomy
from sparsekit.fed.cohort.make.deform import Deformation
from sparsekit.fed.cohort.make.fields import Floats, floats, sample
from sparsekit.fed.cohort.make.measure import achieved_fractions
from sparsekit.fed.cohort.make.people import Person, draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import MAPS, Template, load_template
from sparsekit.fed.cohort.make.volumes import STRUCTURES
from tools.cohort_study.measures import (
    IMAGE_FEATURES,
    image_features,
    nine_volumes,
    search_windows,
    undo_pose,
)
from tools.cohort_study.tissue import posed_points, segment, segment_with_template

SEED = 5
Image = npt.NDArray[np.int16]


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(4)


def person(index: int) -> Person:
    plans = plan_sites("uniform-iid", subjects=40, sites=2)
    return draw_person(plans, index, seed=SEED, residual_scale=0.5)


def rendered(template: Template, who: Person) -> tuple[Image, Anatomy]:
    anatomy = build_anatomy(template, who, shape_rng(SEED, who.index))
    site = draw_site(site_rng(SEED, who.site))
    return scan(template, anatomy, who, site, scan_rng(SEED, who.index)), anatomy


def tilted(template: Template) -> Deformation:
    """Return a plain pose: a tenth larger, turned by 8 degrees and shifted."""
    angle = np.deg2rad(8)
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    _, anatomy = rendered(template, person(0))
    return replace(anatomy.deformation, matrix=turn / 1.1, offset_mm=np.array([3.0, -4.0, 2.0]))


def white_matter(template: Template, points: Floats | None = None) -> Floats:
    channel = MAPS.index("cerebral_wm")
    if points is None:
        return floats(template.maps[template.box][..., channel])
    return floats(sample(template.maps, template.to_voxels(points))[:, channel])


def test_undoing_the_pose_brings_the_template_back(template: Template) -> None:
    pose = tilted(template)
    plain = white_matter(template)
    posed = white_matter(template, posed_points(template, pose, np.arange(plain.size)))
    undone = undo_pose(template, posed.reshape(plain.shape), pose)
    before = np.corrcoef(posed, plain.ravel())[0, 1]
    after = np.corrcoef(undone.ravel(), plain.ravel())[0, 1]
    assert before < 0.8
    assert after > 0.97


def test_undoing_a_pose_that_is_none_changes_nothing(template: Template) -> None:
    none = replace(tilted(template), matrix=np.eye(3), offset_mm=np.zeros(3))
    plain = white_matter(template)
    np.testing.assert_allclose(undo_pose(template, plain, none), plain, atol=1e-3)


def test_the_pose_that_was_drawn_lines_people_up(template: Template) -> None:
    before, after = [], []
    for index in range(6):
        image, anatomy = rendered(template, person(index))
        box = floats(image[template.box]) / float(image[image > 0].mean())
        before.append(box.ravel())
        after.append(undo_pose(template, box, anatomy.deformation).ravel())
    apart = [np.mean(np.var(np.array(images), axis=0)) for images in (before, after)]
    assert apart[1] < 0.8 * apart[0]


def three_tissues(shape: tuple[int, int, int], shading: float) -> tuple[Image, Floats]:
    """Return a ball in three shells of 300, 700 and 1000, and the fraction of the innermost."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    levels = np.select([radius < 0.6, radius < 0.8, radius < 0.9], [1000.0, 700.0, 300.0], 0.0)
    noise = np.random.default_rng(0).normal(1, 0.03, shape)
    image = np.rint(levels * noise * np.exp(shading * x)).astype(np.int16)
    return image, floats((radius < 0.6) & (levels > 0))


def test_tissue_is_found_by_its_signal() -> None:
    image, white = three_tissues((30, 32, 34), shading=0.0)
    tissue = segment(image)
    np.testing.assert_allclose(tissue.levels, (300, 700, 1000), rtol=0.05)
    total = tissue.csf + tissue.gm + tissue.wm
    np.testing.assert_allclose(total, 1, atol=1e-5)
    assert tissue.wm.sum() == pytest.approx(white.sum(), rel=0.1)


def test_shading_is_taken_out_with_the_template(template: Template) -> None:
    image, anatomy = rendered(template, person(1))
    x = np.linspace(-1, 1, image.shape[0])[:, None, None]
    shaded = np.rint(image * np.exp(0.3 * x)).astype(np.int16)
    pose = anatomy.deformation
    plain, corrected = (
        segment_with_template(one[template.box], template, pose) for one in (image, shaded)
    )
    assert corrected.wm.sum() == pytest.approx(plain.wm.sum(), rel=0.02)
    # Without the template the same shading is taken for tissue.
    raw, fooled = (segment(one[template.box]) for one in (image, shaded))
    assert abs(fooled.wm.sum() / raw.wm.sum() - 1) > 0.05


def test_image_features_know_no_gain(template: Template) -> None:
    image, _ = rendered(template, person(2))
    features = image_features(image, segment(image[template.box]), 4)
    doubled = (image * 2).astype(np.int16)
    again = image_features(doubled, segment(doubled[template.box]), 4)
    assert features.shape == (len(IMAGE_FEATURES),)
    np.testing.assert_allclose(again, features, atol=0.02)


def test_image_features_see_larger_ventricles(template: Template) -> None:
    who = person(3)
    larger = who.log_fractions.copy()
    larger[STRUCTURES.index("lateral_ventricles")] += 0.7
    images = [rendered(template, one)[0] for one in (who, replace(who, log_fractions=larger))]
    usual, large = (image_features(i, segment(i[template.box]), 4) for i in images)
    assert np.all(large[:2] > usual[:2] + 0.15)


def test_measured_volumes_follow_the_rendered_ones(template: Template) -> None:
    windows = search_windows(template)
    assert windows.shape[-1] == len(STRUCTURES)
    measured, true = [], []
    for index in range(40):
        image, anatomy = rendered(template, person(index))
        pose = anatomy.deformation
        tissue = segment_with_template(image[template.box], template, pose)
        measured.append(nine_volumes(template, windows, pose, tissue))
        true.append(np.log(achieved_fractions(template, anatomy)))
    x, y = np.array(measured), np.array(true)
    assert np.isfinite(x).all()
    r = {n: np.corrcoef(x[:, k], y[:, k])[0, 1] for k, n in enumerate(STRUCTURES)}
    assert r["lateral_ventricles"] > 0.75
    assert r["third_ventricle"] > 0.2
