from itertools import pairwise

import pytest

from sparsekit.errors import UsageError
from sparsekit.fed.cohort.environment import ENVIRONMENTS, MIN_PEOPLE_PER_SITE, plan_sites


def test_eight_skewed_sites_of_the_papers_size_are_the_papers() -> None:
    plans = plan_sites("skewed-noniid", subjects=8356, sites=8)
    assert [plan.people for plan in plans] == [2401, 1765, 1303, 964, 714, 528, 391, 290]
    assert (plans[0].age_mean, plans[0].age_sd) == (66.5, 4.9)
    assert (plans[7].age_mean, plans[7].age_sd) == (51.6, 3.4)


def test_uniform_sites_share_equally_and_the_first_take_the_rest() -> None:
    plans = plan_sites("uniform-noniid", subjects=82, sites=8)
    assert [plan.people for plan in plans] == [11, 11, 10, 10, 10, 10, 10, 10]
    assert [plan.age_mean for plan in plans] == [55.4, 60.5, 65.8, 68.8, 55.4, 60.5, 66.0, 68.8]


def test_iid_sites_have_the_ages_of_the_whole() -> None:
    plans = plan_sites("uniform-iid", subjects=12, sites=3)
    assert {(plan.age_mean, plan.age_sd) for plan in plans} == {(62.7, 7.4)}
    assert [plan.label for plan in plans] == ["site-1", "site-2", "site-3"]


def test_another_number_of_skewed_sites_falls_by_the_ratio_and_repeats_the_profiles() -> None:
    plans = plan_sites("skewed-noniid", subjects=100_000, sites=10)
    sizes = [plan.people for plan in plans]
    ratios = [a / b for a, b in pairwise(sizes)]
    assert all(abs(ratio - 1.355) < 0.001 for ratio in ratios)
    assert plans[8].age_mean == plans[0].age_mean
    assert plans[9].age_mean == plans[1].age_mean


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize(
    ("subjects", "sites"),
    [
        pytest.param(4, 1, id="one site"),
        pytest.param(32, 8, id="all at the minimum"),
        pytest.param(33, 8, id="one above the minimum"),
        pytest.param(64, 8, id="some lifted to the minimum"),
        pytest.param(200, 30, id="many sites"),
        pytest.param(10_007, 13, id="prime"),
    ],
)
def test_sizes_add_up_and_nobody_is_below_the_minimum(
    environment: str, subjects: int, sites: int
) -> None:
    sizes = [plan.people for plan in plan_sites(environment, subjects=subjects, sites=sites)]
    assert len(sizes) == sites
    assert sum(sizes) == subjects
    assert min(sizes) >= MIN_PEOPLE_PER_SITE
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("environment", "subjects", "sites", "text"),
    [
        pytest.param("skewed", 100, 8, "unknown name 'skewed'; choose uniform-iid", id="name"),
        pytest.param("uniform-iid", 100, 0, "sites: expected at least 1, got 0", id="no site"),
        pytest.param("uniform-iid", 31, 8, "at least 32 people.*got 31.*fewer sites", id="few"),
        pytest.param("skewed-noniid", -1, 2, "at least 8 people", id="negative"),
    ],
)
def test_impossible_requests_say_what_to_change(
    environment: str, subjects: int, sites: int, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        plan_sites(environment, subjects=subjects, sites=sites)
