import json
from pathlib import Path

import pytest

from sparsekit.cli import main
from sparsekit.fed.cohort.make import cohort as cohort_module


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


def test_ctrl_c_says_that_nothing_was_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cohort_module, "write_scan", interrupt)
    assert run(str(tmp_path / "cohort"), "--subjects", "4", "--sites", "1") == 130
    assert "interrupted: nothing was kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
