"""Whole audits: of a run that has learned its people by heart, and of some that have no audit."""

import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from sparsekit.errors import RunError, UsageError
from sparsekit.fed.attack_models import ATTACKS
from sparsekit.fed.config import dump_config, load_config_file, make_config
from sparsekit.fed.privacy import audit_run, choose_windows
from sparsekit.fed.privacy_files import AUDIT_FILE, load_audit, load_draws
from sparsekit.fed.report import write_report
from sparsekit.fed.runner import LOCK_FILE

SITES = ("a", "b/c")


@pytest.fixture(scope="module")
def audited(leaky: Path, noise_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The leaky run with its audit; no test may change it."""
    run = tmp_path_factory.mktemp("audited") / "run"
    shutil.copytree(leaky, run)
    audit_run(run, watcher=Silent(), moments=2, ensemble=3, shuffles=3, cache=noise_cache)
    return run


class Silent:
    def preparing(self, done: int, total: int) -> None:
        pass

    def asking(self, done: int, total: int) -> None:
        pass

    def attacking(self, done: int, total: int) -> None:
        pass

    def notice(self, text: str) -> None:
        raise AssertionError(text)


class Stopped(Silent):
    """Interrupts the audit after some people."""

    def __init__(self, after: int) -> None:
        self._after = after
        self.first: int | None = None

    def asking(self, done: int, total: int) -> None:
        assert done <= total
        if self.first is None:
            self.first = done
        if done == self._after:
            raise KeyboardInterrupt


@pytest.fixture
def copy(leaky: Path, tmp_path: Path) -> Path:
    """The leaky run, for tests that change it."""
    return Path(shutil.copytree(leaky, tmp_path / "run"))


def test_the_planted_leak_is_found(audited: Path) -> None:
    last = load_audit(audited)["moments"][-1]
    assert last["gap"][0] > 2
    for attack in ("error", "all"):
        value, low, _ = last["attacks"][attack]["auc"]
        assert value > 0.7, attack
        assert low > 0.5, attack
        assert value > last["attacks"][attack]["shuffled"]["highest"], attack


def test_all_ordered_pairs_and_measures_are_there(audited: Path) -> None:
    audit = load_audit(audited)
    assert audit["attacks"] == list(ATTACKS)
    assert [moment["round"] for moment in audit["moments"]] == [3, 6]
    assert [moment["rounds"] for moment in audit["moments"]] == [[1, 2, 3], [4, 5, 6]]
    for moment in audit["moments"]:
        assert set(moment["attacks"]) == set(ATTACKS)
        for one in moment["attacks"].values():
            pairs = [(pair["attacker"], pair["victim"]) for pair in one["pairs"]]
            assert pairs == list(permutations(SITES, 2))
            assert one["auc"][0] == pytest.approx(np.mean([pair["auc"] for pair in one["pairs"]]))
            assert one["tpr_01pct"] is None
            for pair in one["pairs"]:
                assert pair["members"] == audit["sites"][pair["victim"]]["members"] >= 5
                low, high = pair["auc_interval"]
                assert low <= pair["auc"] <= high
                assert pair["false_positives_allowed"] == 0
    assert audit["moments"][0]["attacks"]["all"]["shuffled"] is None
    assert audit["moments"][1]["attacks"]["all"]["shuffled"]["plays"] == 3


def test_draws_belong_to_the_audit(audited: Path, copy: Path) -> None:
    audit = load_audit(audited)
    draws = load_draws(audited, audit)
    assert set(draws) == {"gap", *(f"{a}/{m}" for a in ATTACKS for m in ("auc", "accuracy"))}
    value, low, high = audit["moments"][1]["attacks"]["error"]["auc"]
    assert np.quantile(draws["error/auc"][1], [0.025, 0.975]).clip(0, 1) == pytest.approx(
        [low, high]
    )
    assert draws["error/auc"][1].mean() == pytest.approx(value)
    with pytest.raises(RunError, match=r"draws.npz is missing or does not belong"):
        load_draws(copy, audit)


def test_a_second_audit_asks_nothing_again_and_finds_the_same(
    audited: Path, noise_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "again"
    shutil.copytree(audited, run)
    (run / AUDIT_FILE).unlink()
    watcher = Stopped(after=-1)
    audit_run(run, watcher=watcher, moments=2, ensemble=3, shuffles=3, cache=noise_cache)
    assert watcher.first is not None
    assert watcher.first > 0
    assert (run / AUDIT_FILE).read_bytes() == (audited / AUDIT_FILE).read_bytes()


def test_an_interrupted_audit_goes_on(audited: Path, copy: Path, noise_cache: Path) -> None:
    sizes = load_audit(audited)["sites"].values()
    one_round = sum(site["members"] + site["non_members"] for site in sizes)
    with pytest.raises(KeyboardInterrupt):
        audit_run(copy, watcher=Stopped(one_round + 3), moments=2, ensemble=3, cache=noise_cache)
    kept = list((copy / "privacy").glob("*.npz"))
    assert len(kept) == 2
    # One that was cut is made again.
    kept[0].write_bytes(kept[0].read_bytes()[:200])
    watcher = Stopped(after=-1)
    ended = audit_run(
        copy,
        watcher=watcher,
        attacks=["error"],
        moments=2,
        ensemble=3,
        shuffles=3,
        cache=noise_cache,
    )
    assert watcher.first is not None
    assert 0 < watcher.first < one_round
    found, whole = ended["moments"], load_audit(audited)["moments"]
    assert [m["attacks"]["error"] for m in found] == [m["attacks"]["error"] for m in whole]
    assert [m["gap"] for m in found] == [m["gap"] for m in whole]


def test_one_attack_alone_gives_what_it_gives_among_others(
    audited: Path, noise_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "one"
    shutil.copytree(audited, run)
    alone = audit_run(
        run,
        watcher=Silent(),
        attacks=["error"],
        moments=1,
        ensemble=3,
        shuffles=3,
        cache=noise_cache,
    )
    among = load_audit(audited)["moments"][-1]["attacks"]["error"]
    assert alone["moments"][0]["attacks"] == {"error": among}


def test_the_report_shows_the_audit(audited: Path, leaky: Path, tmp_path: Path) -> None:
    write_report([audited], tmp_path / "with.html")
    page = (tmp_path / "with.html").read_text(encoding="utf-8")
    assert "Membership inference" in page
    assert page.count("All pairs") == len(ATTACKS)
    write_report([leaky], tmp_path / "without.html")
    assert "Membership" not in (tmp_path / "without.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("saved", "moments", "ensemble", "windows"),
    [
        ([0, 1, 2, 3, 4, 5], 6, 5, [[1, 2, 3, 4, 5]]),
        ([26, 27, 28, 29, 30], 6, 5, [[26, 27, 28, 29, 30]]),
        ([29, 30], 6, 5, []),
        ([0, 1], 1, 2, []),
        ([3, 4, 6, 7], 6, 2, [[3, 4], [6, 7]]),
        (list(range(31)), 1, 2, [[29, 30]]),
        (list(range(11)), 2, 1, [[1], [10]]),
        (list(range(11)), 3, 2, [[1, 2], [5, 6], [9, 10]]),
    ],
)
def test_moments_lie_evenly_and_end_with_the_last(
    saved: list[int], moments: int, ensemble: int, windows: list[list[int]]
) -> None:
    assert choose_windows(saved, moments, ensemble) == windows


def refuse(run: Path, cache: Path, **options: int) -> str:
    with pytest.raises((RunError, UsageError)) as raised:
        audit_run(run, watcher=Silent(), cache=cache, **options)  # type: ignore[arg-type]
    assert not (run / AUDIT_FILE).exists()
    return str(raised.value)


def test_missing_models_are_named_with_the_remedy(copy: Path, noise_cache: Path) -> None:
    for number in (2, 4):
        shutil.rmtree(copy / "checkpoints" / f"round-{number:05d}")
    text = refuse(copy, noise_cache)
    assert "the models of 5 rounds in a row" in text
    assert "kept those of 4 (1, 3, 5, 6)" in text
    assert "--keep-checkpoints 5" in text


def rewrite(run: Path, **changes: object) -> None:
    settings = load_config_file(run / "config.toml") | changes
    (run / "config.toml").write_text(dump_config(make_config(settings)))


def test_a_cohort_that_moved_is_named(copy: Path, noise_cache: Path, tmp_path: Path) -> None:
    rewrite(copy, cohort=str(tmp_path / "elsewhere"))
    text = refuse(copy, noise_cache, ensemble=3)
    assert f"{tmp_path / 'elsewhere'}, on which {copy} was trained, is not there" in text


def test_people_who_changed_are_named(
    copy: Path, noise_cohort: Path, noise_cache: Path, tmp_path: Path
) -> None:
    lines = noise_cohort.read_text().splitlines()
    changed = [lines[0], *(f"{noise_cohort.parent}/{line}" for line in lines[1:])]
    changed[3] = changed[3].replace(",p2", ",somebody-else")
    people = tmp_path / "people.csv"
    people.write_text("\n".join(changed) + "\n")
    rewrite(copy, cohort=str(people))
    text = refuse(copy, noise_cache, ensemble=3)
    assert "people, ages or scans of a are not those" in text


def test_too_few_people_are_named(
    copy: Path, noise_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekit.fed.privacy.LEAST_PEOPLE", 50)
    text = refuse(copy, noise_cache, ensemble=3)
    assert "0 site(s) with enough people" in text
    assert "at least 50 of each are needed" in text


def test_centralized_runs_are_refused(copy: Path, noise_cache: Path) -> None:
    rewrite(copy, strategy="centralized")
    assert "sites attack each other" in refuse(copy, noise_cache, ensemble=3)


def test_a_run_that_goes_on_is_refused(copy: Path, noise_cache: Path) -> None:
    import fcntl

    with (copy / LOCK_FILE).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another process is working on" in refuse(copy, noise_cache, ensemble=3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"moments": 0}, "moments: expected 1 to 1000, got 0"),
        ({"ensemble": 0}, "ensemble: expected 1 to 1000, got 0"),
        ({"shuffles": -1}, "shuffles: expected 0 to 1000, got -1"),
        ({"threads": 0}, "threads: expected 1 to 1000, got 0"),
    ],
)
def test_options_are_checked(
    leaky: Path, noise_cache: Path, options: dict[str, int], text: str
) -> None:
    assert refuse(leaky, noise_cache, **options) == text


def test_unknown_attacks_and_folders_are_refused(leaky: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"attack: expected some of error, .* got guess"):
        audit_run(leaky, watcher=Silent(), attacks=["guess"])
    with pytest.raises(UsageError, match="is not the folder of a run"):
        audit_run(tmp_path, watcher=Silent())


@pytest.mark.parametrize("text", ["", "[]", '{"layout": 99}', '{"layout": 1}'])
def test_damaged_audits_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunError, match="has not been audited"):
        load_audit(tmp_path)
    (tmp_path / AUDIT_FILE).write_text(text)
    with pytest.raises(RunError, match=r"`sparsekit privacy audit .*` writes it anew"):
        load_audit(tmp_path)
