import pickle

import pytest

from sparsekit.errors import ArgumentError, ArgumentTypeError, ScheduleWarning
from sparsekit.schedule import PolynomialSchedule


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
