"""Which sites a round asks: by the seed alone, the same on every engine and after a resumption."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekit.errors import UsageError
from sparsekit.fed.config import RunConfig, make_config
from sparsekit.fed.ledger import Ledger
from sparsekit.fed.participation import drawn_sites
from sparsekit.fed.runner import InterruptedRunError, Silent, resume_run, start_run

SMALL: dict[str, Any] = {
    "resolution": 4, "rounds": 5, "epochs": 1, "batch": 2, "width": 0.05, "sparsity": 0.8,
    "threads": 2, "seed": 3, "engine": "inprocess", "sites_per_round": 2,
}  # fmt: skip


def make(cohort: Path, **changes: Any) -> RunConfig:
    return RunConfig(cohort=str(cohort), **(SMALL | changes))


NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=30, unique=True)


@given(sites=NAMES, seed=st.integers(0, 2**63 - 1), number=st.integers(1, 20), data=st.data())
def test_so_many_of_the_sites_in_any_order(
    sites: list[str], seed: int, number: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, len(sites)))
    config = RunConfig(cohort="x", seed=seed, sites_per_round=count)
    found = drawn_sites(config, number, sites)
    assert found == sorted(set(found) & set(sites))
    assert len(found) == count
    assert drawn_sites(config, number, data.draw(st.permutations(sites))) == found
    assert drawn_sites(config, config.rounds + 1, sites) == sorted(sites)


@pytest.mark.parametrize(
    ("fraction", "total", "count"),
    [(1.0, 7, 7), (0.1, 10, 1), (0.1, 11, 2), (0.3, 10, 3), (0.5, 3, 2), (1e-9, 64, 1)],
)
def test_a_fraction_is_rounded_up(fraction: float, total: int, count: int) -> None:
    config = RunConfig(cohort="x", participation=fraction)
    assert len(drawn_sites(config, 1, [str(number) for number in range(total)])) == count


def test_every_site_has_the_same_chance() -> None:
    config = RunConfig(cohort="x", rounds=4000, sites_per_round=3)
    sites = [f"site-{number}" for number in range(12)]
    counts = Counter(s for number in range(1, 4001) for s in drawn_sites(config, number, sites))
    # 1000 each; the standard deviation of a count is 27.
    assert set(counts) == set(sites)
    assert all(abs(count - 1000) < 6 * 27 for count in counts.values())
    pairs = Counter(tuple(drawn_sites(config, number, sites)) for number in range(1, 4001))
    assert len(pairs) == 220


def test_draws_stay_those_of_a_seed() -> None:
    config = RunConfig(cohort="x", seed=7, participation=0.5)
    found = [drawn_sites(config, number, ["a", "b", "c", "d", "Köln"]) for number in (1, 2, 3)]
    assert found == [["a", "b", "c"], ["b", "c", "d"], ["b", "c", "d"]]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"participation": 0.0}, r"participation: expected a number in \(0.0, 1.0\]"),
        ({"participation": 1.5}, r"participation: expected a number in \(0.0, 1.0\]"),
        ({"sites_per_round": -1}, r"sites_per_round: expected a number in \[0"),
        ({"sites_per_round": 2, "participation": 0.5}, "participation, not both, got 2 and 0.5"),
        ({"max_update_norm": 0.0}, r"max_update_norm: expected a number in \(0.0, infinity\)"),
        ({"max_update_norm": float("nan")}, "max_update_norm: expected a number in"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make_config({"cohort": "x"}, settings)


def test_more_sites_than_there_are_is_refused_before_anything_is_trained(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"sites_per_round: expected at most 3, .* got 4"):
        start_run(make(tiny_cohort, sites_per_round=4), tmp_path / "r", cache=tiny_cache)
    assert not (tmp_path / "r").exists()


def test_a_centralized_run_asks_its_one_place(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = make(tiny_cohort, strategy="centralized", rounds=2)
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    assert [entry["sites_asked"] for entry in result["history"][1:]] == [1, 1]


class StopAt(Silent):
    def __init__(self, number: int) -> None:
        self.number = number

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        del rounds, sites
        if number == self.number:
            raise KeyboardInterrupt


def asked(run: Path) -> list[tuple[int, str]]:
    return [(r.round, r.client) for r in Ledger(run / "ledger.jsonl") if r.direction == "down"]


def test_the_same_sites_and_bits_on_both_engines_and_after_a_resumption(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    whole, many, broken = (tmp_path / name for name in ("whole", "many", "broken"))
    config = make(tiny_cohort)
    result = start_run(config, whole, cache=tiny_cache)
    wanted = [(n, s) for n in range(1, 7) for s in drawn_sites(config, n, ["a", "b", "c/d"])]
    assert asked(whole) == wanted
    assert len({s for n, s in wanted if n < 6}) == 3
    # A round's model is measured by the sites of the next one, the last one's by all.
    counts = {"a": 2, "b": 1, "c/d": 1}
    measured = [sum(counts[s] for n, s in wanted if n == number) for number in range(1, 7)]
    assert [entry["test_n"] for entry in result["history"]] == measured
    assert result["accuracy"]["test_n"] == 4

    start_run(make(tiny_cohort, engine="processes"), many, cache=tiny_cache)
    with pytest.raises(InterruptedRunError):
        start_run(config, broken, cache=tiny_cache, watcher=StopAt(4))
    resume_run(broken, cache=tiny_cache)
    for run in (many, broken):
        assert asked(run) == wanted
        assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()


def test_a_site_that_sat_out_gets_the_whole_model(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = make(tiny_cohort)
    start_run(config, tmp_path / "r", cache=tiny_cache)
    sizes = {
        (r.round, r.client): r.payload_bytes
        for r in Ledger(tmp_path / "r" / "ledger.jsonl")
        if r.direction == "down"
    }
    compared = 0
    for (number, site), size in sizes.items():
        if number > 1 and (number - 1, site) not in sizes:
            others = [s for (n, o), s in sizes.items() if n == number and (n - 1, o) in sizes]
            assert all(size > other for other in others)
            compared += len(others)
    assert compared


def test_a_bound_on_updates_leaves_out_what_goes_too_far(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    loose, tight = tmp_path / "loose", tmp_path / "tight"
    settings: dict[str, Any] = {"sites_per_round": 0, "rounds": 2}
    start_run(make(tiny_cohort, **settings), tmp_path / "none", cache=tiny_cache)
    start_run(make(tiny_cohort, max_update_norm=1e6, **settings), loose, cache=tiny_cache)
    model = (tmp_path / "none" / "model.spu").read_bytes()
    assert (loose / "model.spu").read_bytes() == model
    with pytest.raises(Exception, match=r"0 of 3 sites .*a: norm \(update: its distance"):
        start_run(make(tiny_cohort, max_update_norm=1e-9, **settings), tight, cache=tiny_cache)
    rows = [json.loads(line) for line in (tight / "ledger.jsonl").read_text().splitlines()]
    assert {r["outcome"] for r in rows if r["direction"] == "up" and r["round"]} == {"norm"}
