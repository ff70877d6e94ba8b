from collections.abc import Sequence
from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.fed import attack_pairs
from sparsekit.fed.attack_features import PREDICTION, Features
from sparsekit.fed.attack_pairs import pair_row, play_attacks, summarize_attack
from sparsekit.fed.attack_scores import Draws, draw_people
from sparsekit.fed.membership import Asked

SITES = ("a", "b", "c")
COUNT = 30


class Unread:
    """Scans that nobody looks at."""

    participants: tuple[str, ...] = tuple(map(str, range(2 * COUNT)))
    ages: npt.NDArray[np.float32] = np.linspace(50, 80, 2 * COUNT, dtype=np.float32)

    def __len__(self) -> int:
        return 2 * COUNT

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        raise AssertionError(index)


def people() -> dict[str, Asked]:
    member = np.arange(2 * COUNT) < COUNT
    rows, stratum = np.arange(2 * COUNT), np.arange(2 * COUNT) % 2
    return {site: Asked(site, Unread(), rows, member, stratum) for site in SITES}


def draws_of(asked: dict[str, Asked]) -> dict[str, Draws]:
    return {site: draw_people(COUNT, COUNT, one.digest + site) for site, one in asked.items()}


class Leaking:
    """Features of sites whose members' errors are smaller; keeps count of who was loaded."""

    def __init__(self, leak: float) -> None:
        self.leak = leak
        self.loaded: list[str] = []

    def __call__(self, site: str, groups: Sequence[str]) -> Features:
        assert list(groups) == [PREDICTION]
        self.loaded.append(site)
        random = np.random.default_rng(SITES.index(site))
        size = np.where(np.arange(2 * COUNT) < COUNT, 1 / (1 + self.leak), 1.0)
        error = 5 * random.standard_normal((2 * COUNT, 2)) * size[:, None]
        age = np.repeat(random.uniform(50, 80, (2 * COUNT, 1)), 2, axis=1)
        return {PREDICTION: np.stack([age + error, age], axis=2).astype(np.float32)}


def test_every_site_attacks_every_other_one() -> None:
    steps = []
    found = play_attacks(people(), Leaking(4.0), ["error"], step=lambda: steps.append(1))
    assert list(found.logits["error"]) == list(permutations(SITES, 2))
    assert found.shuffled == {"error": []}
    assert len(steps) == len(SITES)
    assert all(logits.shape == (2 * COUNT,) for logits in found.logits["error"].values())


@pytest.mark.parametrize("leak", [4.0, 0.0])
def test_a_planted_leak_is_told_from_none(leak: float) -> None:
    asked = people()
    played = play_attacks(asked, Leaking(leak), ["error"], shuffles=9)
    summary, draws = summarize_attack(
        played.logits["error"], played.shuffled["error"], asked, draws_of(asked)
    )
    value, low, high = summary["auc"]
    assert low <= value <= high
    blind = summary["shuffled"]
    assert blind["plays"] == 9
    assert blind["lowest"] < 0.5 < blind["highest"]
    assert draws["auc"].mean() == pytest.approx(value)
    if leak:
        assert low > 0.6
        assert summary["above_half"] == 6
        assert value > blind["highest"]
        assert blind["p"] == 0.1
    else:
        assert low < 0.5 < high
        assert summary["shuffled"]["p"] > 0.1


def test_a_thousandth_is_asked_only_of_enough_people(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = people()
    played = play_attacks(asked, Leaking(4.0), ["error"])

    def thousandth() -> list[float] | None:
        summary, _ = summarize_attack(played.logits["error"], [], asked, draws_of(asked))
        found: list[float] | None = summary["tpr_01pct"]
        return found

    assert thousandth() is None
    # Two victims of each attacker, 30 non-members each.
    monkeypatch.setattr(attack_pairs, "LEAST_FOR_ONE_IN_1000", 60)
    assert thousandth() is not None
    monkeypatch.setattr(attack_pairs, "LEAST_FOR_ONE_IN_1000", 61)
    assert thousandth() is None


def test_a_row_by_hand() -> None:
    row = pair_row(np.array([2.0, 1.0, -1.0, 3.0]), np.array([0.5, -2.0, -3.0, -0.5]))
    # 2, 1 and 3 beat all four, -1 beats two; 3 of 4 and 3 of 4 are on the right side.
    assert row["auc"] == 14 / 16
    assert row["accuracy"] == 6 / 8
    assert row["accuracy_interval"] == pytest.approx([0.3491, 0.9681], abs=1e-4)
    assert row["tpr_1pct"] == 3 / 4
    assert (row["members"], row["non_members"], row["false_positives_allowed"]) == (4, 4, 0)
