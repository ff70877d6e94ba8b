import numpy as np
import pytest

from sparsekit.errors import ArgumentError
from sparsekit.fed.cohort.split import split_participants

PEOPLE = [f"sub-{i:03d}" for i in range(50)]


def people_tested(participants: list[str], seed: int = 0, test_fraction: float = 0.2) -> set[str]:
    _, test = split_participants(participants, seed=seed, test_fraction=test_fraction)
    return {participants[i] for i in test}


def test_train_and_test_together_are_everything_in_ascending_order() -> None:
    train, test = split_participants(PEOPLE, seed=3, test_fraction=0.3)
    assert len(test) == 15
    assert train.dtype == test.dtype == np.int64
    assert sorted([*train, *test]) == list(range(50))
    assert list(train) == sorted(train)
    assert list(test) == sorted(test)


def test_the_people_tested_depend_on_seed_and_names_alone() -> None:
    shuffled = list(np.random.default_rng(1).permutation(PEOPLE))
    assert people_tested(PEOPLE) == people_tested(shuffled)
    assert people_tested(PEOPLE) == people_tested(PEOPLE + PEOPLE[:20])
    assert people_tested(PEOPLE, seed=1) != people_tested(PEOPLE, seed=2)


def test_the_split_is_the_same_in_every_release() -> None:
    _, test = split_participants([f"p{i}" for i in range(8)], seed=7, test_fraction=0.25)
    assert test.tolist() == [0, 3]


def test_all_scans_of_a_person_are_on_one_side() -> None:
    scans = [name for name in PEOPLE for _ in range(3)]
    train, test = split_participants(scans, seed=0, test_fraction=0.2)
    assert len(test) == 30
    assert not {scans[i] for i in train} & {scans[i] for i in test}


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("n_people", [2, 3, 5])
def test_each_side_has_somebody(n_people: int, fraction: float) -> None:
    train, test = split_participants(PEOPLE[:n_people], seed=0, test_fraction=fraction)
    assert len(train) >= 1
    assert len(test) >= 1


@pytest.mark.parametrize("n_people", [0, 1])
def test_a_lone_person_is_trained_on(n_people: int) -> None:
    train, test = split_participants(PEOPLE[:n_people], seed=0, test_fraction=0.5)
    assert train.tolist() == list(range(n_people))
    assert test.tolist() == []


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_a_fraction_outside_the_open_interval_raises(fraction: float) -> None:
    with pytest.raises(ArgumentError, match="test_fraction: expected above 0 and below 1"):
        split_participants(PEOPLE, seed=0, test_fraction=fraction)
