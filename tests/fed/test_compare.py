import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sparsekit.errors import RunError, UsageError
from sparsekit.fed.compare import bootstrap_mean, load_result, paired_difference, run_names
from sparsekit.fed.tables import format_bytes, format_flops

Row = tuple[str, str, float, float]

# participant, site, age, predicted
FIRST: list[Row] = [("p1", "a", 50, 53), ("p2", "a", 60, 58), ("p3", "b", 70, 70)]
SECOND: list[Row] = [("p1", "a", 50, 49), ("p2", "a", 60, 66), ("p3", "b", 70, 75)]


def write_run(folder: Path, rows: Sequence[Row]) -> Path:
    for site in {row[1] for row in rows}:
        (folder / "sites" / site).mkdir(parents=True)
        lines = ["participant,site,age,predicted,round"]
        lines += [f"{p},{s},{age},{guess},2" for p, s, age, guess in rows if s == site]
        (folder / "sites" / site / "predictions.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_difference_by_hand(tmp_path: Path) -> None:
    # |errors| of the second are 1, 6, 5 and of the first 3, 2, 0: differences -2, 4, 5.
    first, second = write_run(tmp_path / "1", FIRST), write_run(tmp_path / "2", SECOND)
    found = paired_difference(second, first)
    assert found.mean == pytest.approx(7 / 3, abs=1e-12)
    assert found.people == 3
    assert found.low <= found.mean <= found.high
    # Of 27 equally likely samples, one has three times -2 and one three times 5: each is
    # likelier than 2.5 %, so that the percentiles are the extremes.
    assert (found.low, found.high) == pytest.approx((-2, 5), abs=1e-12)
    back = paired_difference(first, second)
    assert back.mean == -found.mean
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-12)


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "1", FIRST)
    found = paired_difference(run, run)
    assert (found.mean, found.low, found.high) == (0, 0, 0)


def test_people_are_paired_whatever_their_order(tmp_path: Path) -> None:
    first = write_run(tmp_path / "1", FIRST)
    second = write_run(tmp_path / "2", SECOND)
    mixed = write_run(tmp_path / "3", SECOND[::-1])
    assert paired_difference(mixed, first) == paired_difference(second, first)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param(FIRST[:2], id="fewer"),
        pytest.param([("p9", "a", 50, 53), *FIRST[1:]], id="person"),
        pytest.param([*FIRST[:2], ("p3", "c", 70, 70)], id="site"),
        pytest.param([("p1", "a", 51, 53), *FIRST[1:]], id="age"),
    ],
)
def test_different_people_are_refused(tmp_path: Path, others: list[Row]) -> None:
    first, other = write_run(tmp_path / "1", FIRST), write_run(tmp_path / "2", others)
    with pytest.raises(RunError, match=r"different people.*same --seed"):
        paired_difference(other, first)


def test_interval_has_the_width_that_statistics_gives() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 400)
    found = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    assert bootstrap_mean(values) == found


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "dense", tmp_path / "a" / "sparse"]
    assert run_names(runs) == ["dense", "sparse"]
    runs.append(tmp_path / "b" / "dense")
    assert run_names(runs) == ["a/dense", "a/sparse", "b/dense"]


def test_results_are_read_only_from_finished_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not the folder of a run"):
        load_result(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(RunError, match="is not finished; continue it with `sparsekit fed resume"):
        load_result(tmp_path)
    parts = "accuracy bytes config data flops history machine model seconds sparsity yardsticks"
    whole = {"layout": 1} | dict.fromkeys(parts.split(), 0)
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert load_result(tmp_path) == whole
    for part in parts.split():
        (tmp_path / "result.json").write_text(
            json.dumps({name: value for name, value in whole.items() if name != part})
        )
        with pytest.raises(RunError, match=f"it lacks {part}"):
            load_result(tmp_path)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_345_678, "2.35 MB"), (7e12, "7000.00 GB")],
)
def test_bytes_in_words(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0.00 FLOP"), (1.5e9, "1.50 GFLOP"), (2e19, "20.00 EFLOP")]
)
def test_flops_in_words(count: float, text: str) -> None:
    assert format_flops(count) == text
