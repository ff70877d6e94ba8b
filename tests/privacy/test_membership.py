from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparsekit.fed.membership import AGE_STRATA, Asked, people_to_ask
from sparsekit.fed.site import SitePeople


class Listed:
    """Scans of which only names and ages are asked."""

    def __init__(self, participants: Sequence[str], ages: Sequence[float]) -> None:
        self.participants = tuple(participants)
        self.ages = np.array(ages, np.float32)

    def __len__(self) -> int:
        return len(self.participants)

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        raise AssertionError(index)


def site(train: Listed, test: Listed) -> SitePeople:
    return SitePeople(
        name="s",
        train=train,
        test=test,
        test_sites=("s",) * len(test),
        preprocessing_id="p",
        content="c",
    )


def skewed() -> SitePeople:
    """Members are older than those held out, as by an unlucky split."""
    random = np.random.default_rng(5)
    ages = random.normal(66, 6, 60), random.normal(60, 6, 40)
    return site(
        Listed([f"in{k}" for k in range(60)], list(ages[0])),
        Listed([f"out{k}" for k in range(40)], list(ages[1])),
    )


def names(asked: Asked) -> list[str]:
    return [asked.scans.participants[row] for row in asked.rows]


def test_both_sides_are_as_large_in_every_age_group() -> None:
    asked = people_to_ask(skewed())
    assert all(
        name.startswith("in") == one for name, one in zip(names(asked), asked.member, strict=True)
    )
    for one in range(AGE_STRATA):
        here = asked.stratum == one
        assert (asked.member & here).sum() == (~asked.member & here).sum() > 0
    # Members first.
    assert np.array_equal(asked.member, np.sort(asked.member)[::-1])


def test_ages_are_alike_afterwards() -> None:
    whole = skewed()
    asked = people_to_ask(whole)
    before = whole.train.ages.mean() - whole.test.ages.mean()
    after = asked.ages[asked.member].mean() - asked.ages[~asked.member].mean()
    assert before > 4
    assert abs(after) < 1.5


def test_a_person_counts_once() -> None:
    train = Listed(["a", "a", "b", "c", "b"], [50, 50, 60, 70, 60])
    test = Listed(["d", "e", "e", "f"], [50, 60, 60, 70])
    asked = people_to_ask(site(train, test))
    assert len(set(names(asked))) == len(names(asked))
    assert set(asked.rows) <= {0, 2, 3, 5, 6, 8}


def test_same_people_same_choice() -> None:
    first, second = people_to_ask(skewed()), people_to_ask(skewed())
    assert np.array_equal(first.rows, second.rows)
    assert first.digest == second.digest
    assert people_to_ask(skewed(), seed=1).digest != first.digest


def test_shuffling_keeps_the_counts_of_every_age_group() -> None:
    asked = people_to_ask(skewed())
    dealt = asked.shuffled(3)
    assert not np.array_equal(dealt, asked.member)
    assert np.array_equal(dealt, asked.shuffled(3))
    assert not np.array_equal(dealt, asked.shuffled(4))
    for one in range(AGE_STRATA):
        here = asked.stratum == one
        assert (dealt & here).sum() == (asked.member & here).sum()
