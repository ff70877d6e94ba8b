"""What a site adds to the volumes and to the scans."""

from dataclasses import replace

import numpy as np
import pytest

from sparsekit.errors import UsageError
from sparsekit.fed.cohort.environment import SitePlan, plan_ixi, plan_sites
from sparsekit.fed.cohort.make import volumes
from sparsekit.fed.cohort.make.anatomy import build_anatomy
from sparsekit.fed.cohort.make.people import draw_person, scan_rng, shape_rng, site_rng
from sparsekit.fed.cohort.make.scanner import draw_site, scan
from sparsekit.fed.cohort.make.template import MAPS, load_template


def test_sites_differ_as_those_of_ixi_do() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([volumes.draw_site_terms(rng) for _ in range(20_000)])
    wanted = np.cov(volumes.IXI_SITE_TERMS.T)
    assert np.abs(drawn.mean(axis=0)).max() < 0.01
    assert np.allclose(np.cov(drawn.T), wanted, atol=0.03 * wanted.max())


def test_people_of_a_site_share_its_terms_at_the_residual_scale() -> None:
    plans = plan_sites("uniform-iid", subjects=40, sites=4)

    def terms(seed: int, scale: float) -> list[np.ndarray]:
        people = [draw_person(plans, i, seed=seed, residual_scale=scale) for i in range(40)]
        found = []
        for site in range(4):
            here = [p for p in people if p.site == site]
            # Residuals are the same normals times the scale: two scales tell both parts apart.
            found.append(
                np.mean(
                    [
                        p.log_fractions - volumes.expected_log_fractions(p.age, male=float(p.male))
                        for p in here
                    ],
                    axis=0,
                )
            )
        return found

    half, full = terms(3, 0.5), terms(3, 1.0)
    for a, b in zip(half, full, strict=True):
        assert np.allclose(2 * a, b, atol=1e-12)
    ixi = [replace(plan, ixi_site=0) for plan in plans]
    for index in (0, 15, 39):
        person = draw_person(plans, index, seed=3, residual_scale=1.0)
        bare = draw_person(ixi, index, seed=3, residual_scale=1.0)
        rng = np.random.default_rng([3, 5, person.site])
        added = person.log_fractions - bare.log_fractions
        assert np.allclose(added, volumes.draw_site_terms(rng), atol=1e-12)


def test_the_sites_of_ixi_have_its_sizes_ages_and_terms() -> None:
    plans = plan_ixi(518)
    assert [(plan.label, plan.people) for plan in plans] == [
        ("guys", 282),
        ("hh", 181),
        ("iop", 55),
    ]
    people = [draw_person(plans, i, seed=1, residual_scale=0.0) for i in range(518)]
    assert [draw_person(plans, i, seed=1, residual_scale=1.0).age for i in range(3)] == [
        p.age for p in people[:3]
    ]
    ages = np.array([p.age for p in people])
    assert ages.min() < 22
    assert ages.max() > 84
    assert abs(ages.mean() - 53) < 2.5
    assert np.abs(np.histogram(ages, 3, (20, 86))[0] - 518 / 3).max() < 45
    bare = [replace(plan, ixi_site=0) for plan in plans]
    for index in (10, 300, 510):
        person = draw_person(plans, index, seed=1, residual_scale=1.0)
        other = draw_person(bare, index, seed=1, residual_scale=1.0)
        added = person.log_fractions - other.log_fractions
        assert np.allclose(added, volumes.IXI_SITE_TERMS[person.site])
    with pytest.raises(UsageError, match="at least 12 people, got 11"):
        plan_ixi(11)


def test_all_scans_of_a_site_share_its_shading() -> None:
    template = load_template(4)
    plans = (SitePlan("one", 40, 62.7, 7.4),)
    site = replace(draw_site(site_rng(0, 0)), shading_sd=0.0, coil_sd=0.05, fwhm_mm=0.0)
    flat = replace(site, coil_sd=0.0)
    shadings = []
    for index in (0, 1):
        person = draw_person(plans, index, seed=0, residual_scale=0.5)
        anatomy = build_anatomy(template, person, shape_rng(0, index))
        with_coil, without = (
            scan(template, anatomy, person, s, scan_rng(0, index), noise=False).astype(float)
            for s in (site, flat)
        )
        shadings.append(np.where(without > 100, with_coil / np.maximum(without, 1), np.nan))
    both = np.isfinite(shadings[0]) & np.isfinite(shadings[1])
    assert both.sum() > 5000
    assert np.nanstd(shadings[0]) > 0.02
    assert np.abs(shadings[0] - shadings[1])[both].max() < 0.02


def test_contrast_is_lost_where_cortex_is() -> None:
    template = load_template(4)
    plans = (SitePlan("one", 40, 62.7, 7.4),)
    person = draw_person(plans, 0, seed=0, residual_scale=0.5)
    anatomy = build_anatomy(template, person, shape_rng(0, 0))
    site = replace(draw_site(site_rng(0, 0)), shading_sd=0.0, coil_sd=0.0, fwhm_mm=0.0)
    young, old = (
        scan(template, anatomy, replace(person, age=age), site, scan_rng(0, 0), noise=False)
        for age in (50.0, 80.0)
    )
    gain = (old.astype(float) - young)[template.box].reshape(-1)[anatomy.deformation.voxels]
    cortex = anatomy.cortex_gm > 0.6
    loss = template.maps[..., MAPS.index("loss")]
    assert loss.max() > 2 * loss.min()
    most, least = np.percentile(anatomy.loss[cortex], (80, 20))
    frontal, occipital = (cortex & (anatomy.loss >= most)), (cortex & (anatomy.loss <= least))
    assert gain[frontal].mean() > 1.3 * gain[occipital].mean() > 0
    # White matter alone stays as it is.
    white = (anatomy.cerebral_wm > 0.99) & (anatomy.lesions < 1e-3)
    assert white.sum() > 200
    assert np.abs(gain[white]).mean() < 0.1 * gain[frontal].mean()
