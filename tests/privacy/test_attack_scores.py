import math

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from sparsekit.fed import attack_scores
from sparsekit.fed.attack_scores import (
    DRAWS,
    accuracy,
    auc,
    auc_interval,
    draw_people,
    drawn_accuracy,
    drawn_auc,
    drawn_mean,
    drawn_true_positives,
    interval,
    placements,
    share_interval,
    true_positives,
    widened,
)

MEMBERS = np.array([3.0, 1.0, 0.0, -1.0])
OTHERS = np.array([2.0, 0.0, -2.0])


def test_auc_by_hand() -> None:
    # 3 beats all three; 1 beats two; 0 beats one and ties with one; -1 beats one: 7.5 of 12.
    assert auc(MEMBERS, OTHERS) == 7.5 / 12
    assert auc(OTHERS, MEMBERS) == 4.5 / 12
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert auc(np.zeros(3), np.zeros(5)) == 0.5


def test_auc_is_that_of_the_rank_test() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 9, 30).astype(float), random.integers(2, 11, 47).astype(float)
    assert auc(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / (30 * 47), abs=1e-12)


def test_placements_by_hand() -> None:
    above, below = placements(MEMBERS, OTHERS)
    assert above.tolist() == [1.0, pytest.approx(2 / 3), 0.5, pytest.approx(1 / 3)]
    # Of the four members 1 is above 2.0, 2.5 above 0.0, and 4 above -2.0.
    assert below.tolist() == [0.25, 0.625, 1.0]


def test_accuracy_by_hand() -> None:
    # Members above 0: two of four. Others at or below 0: two of three.
    assert accuracy(MEMBERS, OTHERS) == pytest.approx((2 / 4 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("rate", "hits", "allowed"),
    [(0.01, 1, 0), (0.34, 2, 1), (0.67, 4, 2)],
)
def test_true_positives_by_hand(rate: float, hits: int, allowed: int) -> None:
    assert true_positives(MEMBERS, OTHERS, rate) == (hits, allowed)


def test_a_rate_of_one_percent_lets_one_of_a_hundred_through() -> None:
    others = np.arange(100.0)
    assert true_positives(np.array([98.5, 99.5]), others, 0.01) == (2, 1)
    assert true_positives(np.array([98.5, 99.5]), np.append(others, 98.7), 0.01) == (1, 1)
    assert true_positives(np.array([98.0]), others, 0.01) == (0, 1)


def test_shares_have_clopper_and_pearsons_intervals() -> None:
    # The closed forms where nobody, or everybody, is hit.
    assert share_interval(0, 10) == pytest.approx((0.0, 1 - 0.025 ** (1 / 10)))
    assert share_interval(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0))
    # A value that textbooks print: 8 of 20.
    assert share_interval(8, 20) == pytest.approx((0.1912, 0.6395), abs=5e-5)


def test_auc_interval_is_the_rank_test_at_one_half() -> None:
    m, n = 40, 60
    sd = math.sqrt((m + n + 1) / (12 * m * n))
    low, _ = auc_interval(0.5 + 1.96 * sd, m, n)
    assert low == pytest.approx(0.5, abs=0.002)
    low, high = auc_interval(0.5, m, n)
    assert low == pytest.approx(1 - high)
    assert low < 0.5 < high


def test_auc_interval_keeps_a_width_at_the_ends() -> None:
    low, high = auc_interval(1.0, 10, 10)
    assert high == 1.0
    assert 0.6 < low < 0.9
    assert auc_interval(0.0, 10, 10) == pytest.approx((0.0, 1 - low))


def test_draws_are_of_as_many_people_and_the_same_for_the_same_people() -> None:
    one, two = draw_people(7, 9, "x"), draw_people(7, 9, "x")
    assert one.members.shape == (DRAWS, 7)
    assert (one.members.sum(axis=1) == 7).all()
    assert (one.others.sum(axis=1) == 9).all()
    assert np.array_equal(one.members, two.members)
    assert not np.array_equal(one.members, draw_people(7, 9, "y").members)


def test_drawn_auc_has_the_spread_of_exact_draws() -> None:
    random = np.random.default_rng(1)
    members, others = random.normal(0.7, 1, 60), random.normal(0, 1, 50)
    draws = draw_people(60, 50, "people")
    quick = drawn_auc(members, others, draws)
    counts = list(zip(draws.members.astype(int), draws.others.astype(int), strict=True))[:400]
    exact = [auc(members.repeat(inside), others.repeat(outside)) for inside, outside in counts]
    assert quick.mean() == pytest.approx(auc(members, others), abs=0.005)
    assert np.abs(quick[:400] - exact).max() < 0.03
    assert quick[:400].std() == pytest.approx(np.std(exact), rel=0.05)


def test_drawn_shares_are_those_of_the_drawn_people() -> None:
    draws = draw_people(4, 3, "few")
    shares = drawn_accuracy(MEMBERS, OTHERS, draws)
    rates = drawn_true_positives(MEMBERS, OTHERS, draws, 0.34)
    for number in range(0, DRAWS, 97):
        inside = MEMBERS.repeat(draws.members[number].astype(int))
        outside = OTHERS.repeat(draws.others[number].astype(int))
        assert shares[number] == pytest.approx(accuracy(inside, outside))
        hits, _ = true_positives(inside, outside, 0.34)
        assert rates[number] == pytest.approx(hits / 4)
    mean = drawn_mean(MEMBERS, draws.members)
    assert mean[5] == pytest.approx((MEMBERS * draws.members[5]).sum() / 4)


def test_intervals_are_cut_to_what_is_possible() -> None:
    assert interval(np.linspace(-1, 2, 1001), least=0.0, most=1.0) == (0.0, 1.0)
    assert interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))


@pytest.mark.parametrize("sites", [2, 5])
def test_intervals_of_means_over_pairs_hold_one_half_where_nothing_leaks(
    sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So they do in more than 90 of 100 plays; not widened, in fewer than 88."""
    monkeypatch.setattr(attack_scores, "DRAWS", 300)
    random = np.random.default_rng(11)
    count, plays = 15, 200
    member = np.arange(2 * count) < count
    held = narrow = 0
    for play in range(plays):
        people = [random.standard_normal((2 * count, 6)) for _ in range(sites)]
        draws = [draw_people(count, count, f"{play}/{site}") for site in range(sites)]
        values, drawn = [], []
        for attacker, own in enumerate(people):
            direction = own[member].mean(axis=0) - own[~member].mean(axis=0)
            for victim, theirs in enumerate(people):
                if victim != attacker:
                    logits = theirs @ direction
                    two = logits[member], logits[~member]
                    values.append(auc(*two))
                    drawn.append(drawn_auc(*two, draws[victim]))
        mean = float(np.mean(values))
        over_pairs = np.mean(drawn, axis=0)
        low, high = interval(widened(mean, over_pairs))
        held += low <= 0.5 <= high
        low, high = interval(over_pairs)
        narrow += low <= 0.5 <= high
    assert held >= 0.90 * plays
    assert narrow <= 0.88 * plays
