import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest

from sparsekit.errors import ArgumentError, ArgumentTypeError, ScheduleWarning
from sparsekit.schedule import (
    ExponentialSchedule,
    OneShotSchedule,
    PolynomialSchedule,
    Schedule,
    mean_density,
)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (2, 0.071219170923),
        (10, 0.517592171142),
        (20, 0.821879161820),
        (39, 0.949983984895),
        (40, 0.95),
    ],
)
def test_values_of_the_paper(t: int, expected: float) -> None:
    assert PolynomialSchedule(0.95, rounds=40)(t) == pytest.approx(expected, abs=1e-12)


def test_equals_the_formula_with_every_argument_set() -> None:
    schedule = PolynomialSchedule(0.9, rounds=30, start=4, every=3, exponent=2.5, initial=0.2)
    for t in range(31):
        step = 3 * (t // 3)
        expected = 0.0 if step < 4 else 0.9 + (0.2 - 0.9) * (1 - (step - 4) / 26) ** 2.5
        assert schedule(t) == pytest.approx(expected, abs=1e-15)


def test_nothing_is_pruned_until_the_start() -> None:
    schedule = PolynomialSchedule(0.9, rounds=10, start=3, initial=0.1)
    assert [schedule(t) for t in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.1, abs=1e-15)]
    assert PolynomialSchedule(0.95, rounds=40)(1) == 0.0


def test_rounds_past_the_last_keep_its_value() -> None:
    schedule = PolynomialSchedule(0.7, rounds=5)
    assert schedule(6) == schedule(5) == 0.7
    assert schedule(10**9) == 0.7


def test_never_falls() -> None:
    values = [PolynomialSchedule(0.95, rounds=40, every=5)(t) for t in range(45)]
    assert values == sorted(values)
    assert len(set(values)) == 9


def test_interval_that_does_not_divide_the_rounds_warns() -> None:
    with pytest.warns(ScheduleWarning, match=r"every = 3 does not divide rounds = 10.*0\.8988"):
        schedule = PolynomialSchedule(0.9, rounds=10, every=3)
    assert schedule(10) == schedule(9) < 0.9


def test_survives_pickling() -> None:
    schedule = PolynomialSchedule(0.9, rounds=12, every=4)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"final": 1.5, "rounds": 4}, "final: expected a sparsity from 0 to 1, got 1.5"),
        ({"final": float("nan"), "rounds": 4}, "final: expected"),
        ({"final": 0.5, "rounds": 4, "initial": 0.6}, "initial: expected .* final = 0.5"),
        ({"final": 0.5, "rounds": 1}, "rounds: expected more than start = 1, got 1"),
        ({"final": 0.5, "rounds": 4, "start": -1}, "start: expected a round >= 0"),
        ({"final": 0.5, "rounds": 4, "every": 0}, "every: expected at least 1"),
        ({"final": 0.5, "rounds": 4, "exponent": 0}, "exponent: expected a positive"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        PolynomialSchedule(**arguments)  # type: ignore[arg-type]


def test_bad_types_are_refused() -> None:
    with pytest.raises(ArgumentTypeError, match=r"rounds: expected an int, got 4\.0"):
        PolynomialSchedule(0.5, rounds=4.0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="t: expected a round >= 0, got -1"):
        PolynomialSchedule(0.5, rounds=4)(-1)


def test_exponential_values_to_1e_12() -> None:
    # 1 - 0.05 ** ((t - 1) / 39), worked out in 50 digits.
    schedule = ExponentialSchedule(0.95, rounds=40)
    expected = {
        1: 0.000000000000000,
        2: 0.073937588926687,
        10: 0.499086993331523,
        20: 0.767638124126742,
        39: 0.946007958640660,
    }
    assert {t: schedule(t) for t in expected} == pytest.approx(expected, abs=1e-12)
    assert schedule(40) == schedule(41) == 0.95


def test_exponential_equals_the_formula_with_every_argument_set() -> None:
    schedule = ExponentialSchedule(0.9, rounds=30, start=4, every=3, initial=0.2)
    for t in range(31):
        step = 3 * (t // 3)
        expected = 0.0 if step < 4 else 1 - 0.8 * (0.1 / 0.8) ** ((step - 4) / 26)
        assert schedule(t) == pytest.approx(expected, abs=1e-15)
    # Each pruning takes the same share of what is left.
    left = [1 - ExponentialSchedule(0.9, 6, initial=0.5)(t) for t in range(1, 7)]
    shares = [after / before for before, after in pairwise(left)]
    assert shares == pytest.approx([shares[0]] * 5, abs=1e-12)


def test_one_shot_prunes_once() -> None:
    assert [OneShotSchedule(0.9, at=2)(t) for t in range(5)] == [0.0, 0.0, 0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Sum over t = 1..39 of 1 - s(t) with cubes: 0.05 * 39 + 0.95 / 39**3 * sum of k**3.
        (
            PolynomialSchedule(0.95, rounds=40),
            (1 + 0.05 * 39 + 0.95 * (38 * 39 / 2 + 39) ** 2 / 39**3) / 40,
        ),
        (OneShotSchedule(0.95, at=1), (1 + 39 * 0.05) / 40),
        (OneShotSchedule(0.95, at=5), (5 + 35 * 0.05) / 40),
        (lambda _: 0.95, 0.05),
    ],
)
def test_mean_density_is_that_of_what_rounds_train(schedule: Schedule, expected: float) -> None:
    assert mean_density(schedule, 40) == pytest.approx(expected, abs=1e-12)


def test_a_ramp_that_ends_early_is_far_below_the_cubic() -> None:
    cubic = mean_density(PolynomialSchedule(0.95, rounds=40), 40)
    assert mean_density(PolynomialSchedule(0.95, rounds=8), 40) < 0.41 * cubic
    assert mean_density(ExponentialSchedule(0.95, rounds=8), 40) < 0.42 * cubic


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: ExponentialSchedule(1.0, rounds=4), ArgumentError, "final: .* below 1, got 1.0"),
        (lambda: ExponentialSchedule(0.5, rounds=1), ArgumentError, "rounds: expected more than"),
        (lambda: ExponentialSchedule(0.5, 4, initial=0.6), ArgumentError, "initial: expected"),
        (lambda: ExponentialSchedule(0.5, 4)(-1), ArgumentError, "t: expected a round >= 0"),
        (lambda: OneShotSchedule(1.1), ArgumentError, "final: expected"),
        (lambda: OneShotSchedule(0.5, at=0), ArgumentError, "at: expected a round >= 1, got 0"),
        (lambda: OneShotSchedule(0.5, at=1.0), ArgumentTypeError, "at: expected an int"),  # type: ignore[arg-type]
        (lambda: OneShotSchedule(0.5)(-1), ArgumentError, "t: expected a round >= 0"),
        (lambda: mean_density(OneShotSchedule(0.5), 0), ArgumentError, "rounds: expected at least"),
    ],
)
def test_bad_values_of_the_others_are_refused(
    make: Callable[[], object], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


def test_an_exponential_that_falls_short_warns() -> None:
    with pytest.warns(ScheduleWarning, match="every = 3 does not divide rounds = 10"):
        ExponentialSchedule(0.9, rounds=10, every=3)
