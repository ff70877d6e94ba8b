"""``sparsekit privacy``: what it prints, where it writes, and what a mistake costs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


def test_a_run_without_models_is_refused_in_one_line(
    sparsekit: Command, whole: Path, cache: Path
) -> None:
    code, out, error = sparsekit("privacy", "audit", whole, "--cache", cache)
    assert (code, out) == (1, "")
    assert error.startswith("sparsekit: error: run: an attack looks at the models of 5 rounds")
    assert error.count("\n") == 1


def test_wrong_words_are_usage_errors(sparsekit: Command, whole: Path, tmp_path: Path) -> None:
    for line, text in (
        (("audit", whole, "--attack", "guess"), "attack: expected some of error"),
        (("audit", whole, "--moments", "0"), "moments: expected 1 to 1000, got 0"),
        (("audit", tmp_path), "is not the folder of a run"),
        (("audit", whole, "--out", tmp_path), "out: expected the name of a file"),
        (("compare", whole), "compare: expected at least two runs"),
        (("compare", whole, whole), "compare: expected at least two runs"),
    ):
        code, out, error = sparsekit("privacy", *line)
        assert (code, out) == (2, ""), line
        assert text in error, line


def test_audit_compare_and_report(
    sparsekit: Command, people: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Six people in all: what matters here is what the commands do.
    monkeypatch.setattr("sparsekit.fed.privacy.LEAST_PEOPLE", 1)
    monkeypatch.setattr("sparsekit.fed.membership.AGE_STRATA", 1)
    options = ["--rounds", "3", "--epochs", "1", "--batch", "3", "--threads", "1"]
    options += ["--width", "0.05", "--engine", "inprocess", "--keep-checkpoints", "0"]
    runs = []
    for name, sparsity in (("dense", "0"), ("sparse", "0.6")):
        run = tmp_path / name
        line = ["fed", "run", "--cohort", people, "--out", run, "--cache", cache]
        assert sparsekit(*line, *options, "--sparsity", sparsity)[0] == 0
        asked = ["--ensemble", "1", "--moments", "2", "--shuffles", "1", "--cache", cache]
        copy = tmp_path / f"{name}.json"
        code, out, error = sparsekit("privacy", "audit", run, *asked, "--out", copy)
        assert (code, error) == (0, "")
        for word in ("error", "last-layers", "TPR at 1 % FPR", "too few people", "All pairs:"):
            assert word in out
        assert copy.read_bytes() == (run / "privacy.json").read_bytes()
        runs.append(run)

    code, out, _ = sparsekit("fed", "report", runs[0])
    assert code == 0
    assert "pairs above half" in out
    assert "Membership inference" in (runs[0] / "report.html").read_text(encoding="utf-8")

    compared = tmp_path / "compared.json"
    code, out, error = sparsekit(
        "privacy", "compare", *runs, "--attack", "error", "--out", compared
    )
    assert (code, error) == (0, "")
    assert "error: at the same round" in out
    assert "Sparsity 0.6 at round 3:" in out
    assert list(json.loads(compared.read_text())["attacks"]) == ["error"]

    shutil.rmtree(runs[1] / "privacy")
    code, out, error = sparsekit("privacy", "compare", *runs)
    assert (code, out) == (1, "")
    assert "draws.npz is missing" in error
