"""The comparison with IXI finds what is there; rendered heads keep what was asked of them."""

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsekit.fed.cohort.environment import plan_ixi
from sparsekit.fed.cohort.make.people import draw_person
from sparsekit.fed.cohort.make.volumes import STRUCTURES
from tools import ixi_comparison, measure_validation

Doubles = NDArray[np.float64]


def drawn(people: int) -> dict[str, Doubles]:
    """People as asked, taken for rendered."""
    plans = plan_ixi(people)
    them = [draw_person(plans, i, seed=8, residual_scale=1.0) for i in range(people)]
    asked = np.array([p.log_fractions for p in them])
    sizes = np.array([(p.log_icv, p.log_icv) for p in them])
    return {
        "who": np.array([(p.age, p.male, p.site) for p in them], dtype=np.float64),
        "asked": asked,
        "rendered": asked.copy(),
        "sizes": sizes,
        "seen": np.exp(asked[:, :4] + sizes[:, :1]),
    }


def test_the_table_is_found_again_in_people_drawn_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ixi_comparison, "REPEATS", 200)
    people = drawn(6000)
    found = ixi_comparison.compare(people)
    inside = []
    for name in STRUCTURES:
        one = found["structures"][name]
        assert one["asked_r"] == 1.0
        spread = one["residual_sd"]
        assert spread["rendered"] == pytest.approx(spread["ixi"], rel=0.05)
        for term in one["terms"].values():
            low, high = term["interval"]
            assert low < term["rendered"] < high
            inside.append(low < term["ixi"] < high)
    # 45 intervals of 95 %, correlated within a structure.
    assert np.mean(inside) > 0.8
    worst = found["worst_correlation"]
    assert abs(worst["ixi"] - worst["rendered"]) < 0.06


def test_what_is_not_rendered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ixi_comparison, "REPEATS", 50)
    people = drawn(2000)
    rng = np.random.default_rng(0)
    thalamus = STRUCTURES.index("thalamus")
    spread = people["asked"][:, thalamus].std()
    people["rendered"][:, thalamus] = rng.normal(-5, spread, 2000)
    one = ixi_comparison.compare(people)["structures"]["thalamus"]
    assert abs(one["asked_r"]) < 0.1
    assert abs(one["terms"]["per decade"]["rendered"]) < 0.5 * abs(
        one["terms"]["per decade"]["ixi"]
    )


def test_rendered_heads_keep_the_slopes_spreads_and_correlations_that_were_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ixi_comparison, "REPEATS", 20)
    people = measure_validation.measure(4, 100)
    found = ixi_comparison.compare(people)
    for name in STRUCTURES:
        one = found["structures"][name]
        assert one["asked_r"] > 0.95, name
        slope, spread = one["terms"]["per decade"], one["residual_sd"]
        # In units of what is drawn over the whole range of ages, for slopes close to 0.
        off = 3 * (slope["rendered"] - slope["drawn"]) / spread["drawn"]
        assert abs(off) < 0.3, name
        assert spread["rendered"] == pytest.approx(spread["drawn"], rel=0.2), name
    assert found["worst_correlation_off_drawn"] < 0.15
    assert found["head_size_error_sd"] < 0.005
    seen = found["seen"]
    assert seen["ventricles"]["r_within_site"] > 0.6
    assert seen["grey matter"]["r_within_site"] > 0.4
