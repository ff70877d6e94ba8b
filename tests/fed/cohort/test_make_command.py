import json
from pathlib import Path
from typing import Any

import pytest

from sparsekit.cli import cohort_make as command
from sparsekit.cli import main
from sparsekit.fed.cohort.make import cohort as cohort_module
from sparsekit.fed.cohort.make.bids import write_scan


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exited:
        main(["cohort", "make", *arguments])
    return int(exited.value.code or 0)


def test_make_writes_a_cohort_and_then_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cohort"
    options = (str(out), "--subjects", "8", "--sites", "2", "--environment", "uniform-noniid")
    assert run(*options, "--seed", "5", "--residual-scale", "1.0") == 0
    description = json.loads((out / "dataset_description.json").read_text())
    assert description["SparsekitCohort"] == {
        "subjects": 8,
        "sites": 2,
        "resolution": 4,
        "environment": "uniform-noniid",
        "seed": 5,
        "residual_scale": 1.0,
        "recipe": 2,
    }
    first = capsys.readouterr()
    assert first.out == ""
    assert "8 synthetic scans at 4 mm, 2 sites" in first.err
    assert run(*options, "--seed", "5", "--residual-scale", "1.0") == 0
    assert "already holds exactly this cohort" in capsys.readouterr().err
    assert run(*options, "--seed", "6", "--residual-scale", "1.0") == 2
    assert "seed 5 there, 6 asked" in capsys.readouterr().err


def test_ctrl_c_says_what_is_kept_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (str(tmp_path / "cohort"), "--subjects", "4", "--sites", "1", "--workers", "1")

    def interrupt(path: Path, *rest: Any) -> None:
        if path.name.startswith("sub-00003"):
            raise KeyboardInterrupt
        write_scan(path, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(cohort_module, "write_scan", interrupt)
        assert run(*options) == 130
    assert "interrupted: 2 scans are kept; the same command" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".cohort.partial"]
    assert run(*options) == 0
    assert "going on with the 2 scans that are there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_a_pipe_gets_a_line_for_each_tenth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort_module, "write_scan", lambda *_: None)
    assert run(str(tmp_path / "c"), "--subjects", "20", "--sites", "1", "--workers", "1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " of 20 scans" in line]
    assert lines == [f"{done} of 20 scans" for done in range(2, 20, 2)]


def test_all_cores_work_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(command, "make_cohort", lambda *_, workers, **__: asked.append(workers))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    assert run(str(tmp_path / "c"), "--subjects", "8", "--sites", "1") == 0
    assert run(str(tmp_path / "c"), "--subjects", "8", "--sites", "1", "--workers", "2") == 0
    assert asked == [3, 2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(("--subjects", "7", "--sites", "2"), "at least 8 people", id="subjects"),
        pytest.param(("--subjects", "8", "--resolution", "1"), "expected 2 or 4", id="resolution"),
        pytest.param(("--subjects", "80", "--environment", "x"), "choose uniform-iid", id="name"),
        pytest.param(("--subjects", "80", "--workers", "0"), "workers", id="workers"),
        pytest.param(("--subjects", "many"), "--subjects", id="no number"),
    ],
)
def test_bad_options_are_named_and_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], text: str
) -> None:
    assert run(str(tmp_path / "cohort"), *options) == 2
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
