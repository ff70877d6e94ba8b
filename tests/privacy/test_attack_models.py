import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.fed.attack_features import GROUPS, NECK, PREDICTION, Features
from sparsekit.fed.attack_models import ATTACKS, fit_logistic, mean_error, train_attack
from sparsekit.fed.attack_scores import auc

PEOPLE = 60
MEMBER = np.arange(PEOPLE) < PEOPLE // 2
WIDTHS = {"prediction": 2, "gradient-magnitudes": 6, "output-gradient": 5, "neck-gradient": 30}


def features(leak: float, seed: int) -> Features:
    """Features of three rounds: members' errors and gradients are smaller by a factor."""
    random = np.random.default_rng(seed)
    age = random.uniform(45, 80, PEOPLE)
    size = np.where(MEMBER, 1.0 / (1.0 + leak), 1.0)[:, None]
    error = 6 * random.standard_normal((PEOPLE, 3)) * size
    found = {
        group: (random.standard_normal((PEOPLE, 3, width)) * size[..., None]).astype(np.float32)
        for group, width in WIDTHS.items()
    }
    ages = np.repeat(age[:, None], 3, axis=1)
    found[PREDICTION] = np.stack([ages + error, ages], axis=2).astype(np.float32)
    found["gradient-magnitudes"] = np.log(np.abs(found["gradient-magnitudes"]) + 1e-3)
    return found


def test_widths_are_of_every_kind() -> None:
    assert tuple(WIDTHS) == GROUPS
    assert {group for groups in ATTACKS.values() for group in groups} == set(GROUPS)


def play(attack: str, leak: float, member: npt.NDArray[np.bool_] = MEMBER) -> float:
    score = train_attack(attack, features(leak, 1), member, seed=4)
    logits = score(features(leak, 2))
    assert logits.shape == (PEOPLE,)
    assert np.isfinite(logits).all()
    return auc(logits[MEMBER], logits[~MEMBER])


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_planted_leak_is_found(attack: str) -> None:
    assert play(attack, 6.0) > 0.75


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_found_where_nothing_is(attack: str) -> None:
    assert 0.3 < play(attack, 0.0) < 0.7


@pytest.mark.parametrize("attack", ATTACKS)
def test_same_seed_same_scores(attack: str) -> None:
    first, second = (
        train_attack(attack, features(1.0, 1), MEMBER, seed=4)(features(1.0, 2)) for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_another_seed_is_another_network() -> None:
    first, second = (
        train_attack("all", features(1.0, 1), MEMBER, seed=seed)(features(1.0, 2))
        for seed in (4, 5)
    )
    assert not np.array_equal(first, second)


def test_error_by_hand() -> None:
    pairs = np.array([[[50.0, 52.0], [55.0, 52.0]]], np.float32)
    assert mean_error({PREDICTION: pairs}).tolist() == [2.5]


def test_logistic_regression_finds_the_odds() -> None:
    # Of 100 people at 1, 90 are members, and of 100 at -1, 20: logits log(9) and -log(4).
    x = np.repeat([1.0, -1.0], 100)
    member = np.concatenate([np.arange(100) < 90, np.arange(100) < 20])
    slope, offset = fit_logistic(x, member)
    assert slope == pytest.approx((np.log(9) + np.log(4)) / 2, abs=0.05)
    assert offset == pytest.approx((np.log(9) - np.log(4)) / 2, abs=0.05)


def test_logistic_regression_stays_finite_where_sides_part() -> None:
    slope, offset = fit_logistic(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([1, 1, 0, 0], bool))
    assert slope < 0
    assert np.isfinite([slope, offset]).all()


def test_features_that_never_vary_do_no_harm() -> None:
    dead = features(6.0, 1)
    dead[NECK][:] = 0.0
    score = train_attack("last-layers", dead, MEMBER, seed=0)
    assert np.isfinite(score(features(6.0, 2))).all()
