"""``sparsekit fed run`` on what really happens: odd names, spoilt scans, full disks."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., tuple[int, str, str]]


def one_line(error: str) -> str:
    assert error.startswith("sparsekit: error: ")
    assert error.count("\n") == 1
    return error


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_names_with_spaces_slashes_and_umlauts(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy"]["site_n"] == {"Köln/1": 1, "a b": 1}
    assert visible(whole / "sites") == {"K%C3%B6ln%2F1", "a%20b"}
    assert result["data"]["skipped"] == 0


def test_tables_are_whole_in_a_pipe(
    sparsekit: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = ["dense-federated-average-of-all-sites-seed-0", "sparse [bold] $\\frac$ 北京"]
    for name in names:
        shutil.copytree(whole, tmp_path / name)
    code, out, error = sparsekit("fed", "compare", *(tmp_path / name for name in names))
    assert (code, error) == (0, "")
    assert all(name in out for name in names)
    for line in out.splitlines():
        assert line.count("│") in (0, 4)


def test_a_truncated_scan_is_refused_then_skipped(
    sparsekit: Command, own_people: Path, tmp_path: Path, small: list[str]
) -> None:
    scan = own_people.parent / "Person 0.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-2000])
    own_people.write_text(
        own_people.read_text(encoding="utf-8") + "gone.nii.gz,50,a b,p9\n", encoding="utf-8"
    )
    cache = ("--cache", tmp_path / "cache")
    line = ("fed", "run", "--cohort", own_people, *small, *cache)
    code, _, error = sparsekit(*line, "--out", tmp_path / "r1")
    assert code == 1
    assert "gone.nii.gz: no such file" in one_line(error)
    assert "--on-problem skip" in error

    code, _, error = sparsekit(*line, "--out", tmp_path / "r2", "--on-problem", "skip")
    assert code == 0
    result = json.loads((tmp_path / "r2" / "result.json").read_text())
    assert result["data"]["skipped"] == 2
    skipped = [line for line in error.splitlines() if line.startswith("skipped ")]
    assert len(skipped) == 2
    assert any("Person 0.nii.gz" in line for line in skipped)

    own_people.write_text(
        "\n".join(own_people.read_text(encoding="utf-8").splitlines()[:-1]) + "\n",
        encoding="utf-8",
    )
    code, _, error = sparsekit(*line, "--out", tmp_path / "r3")
    assert code == 1
    assert "Person 0.nii.gz" in one_line(error)
    assert "truncated" in error
    assert "sparsekit cohort check" in error


@pytest.mark.parametrize(
    ("replace", "by", "text"),
    [
        pytest.param(",Köln/1,p2", ",lonely,p2", "site 'lonely' has 1 usable people", id="one"),
        pytest.param(",45,", ",,", "--on-problem skip", id="no age"),
        pytest.param(",45,", ",89+,", "--on-problem skip", id="censored"),
        pytest.param("age", "years", "age", id="no age column"),
        pytest.param("a b", "..", "'..' cannot be a site's name", id="dots"),
        pytest.param("a b", "x" * 300, "too long for a folder; shorten it", id="long"),
    ],
)
def test_unusable_cohorts_are_refused(
    sparsekit: Command,
    own_people: Path,
    tmp_path: Path,
    small: list[str],
    replace: str,
    by: str,
    text: str,
) -> None:
    before = own_people.read_text(encoding="utf-8")
    own_people.write_text(before.replace(replace, by), encoding="utf-8")
    assert own_people.read_text(encoding="utf-8") != before
    cache = tmp_path / "cache"
    out = tmp_path / "run"
    code, _, error = sparsekit(
        "fed", "run", "--cohort", own_people, "--out", out, "--cache", cache, *small
    )
    assert code == 1
    assert text in one_line(error)
    assert not (out / "result.json").exists()


def test_without_matplotlib_a_run_succeeds_and_a_report_does_not(
    sparsekit: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "report.html").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, error = sparsekit("fed", "resume", run, "--cache", cache)
    assert code == 0
    assert "test MAE" in out
    assert "No report written: the report's plots need matplotlib: pip install" in error
    code, _, error = sparsekit("fed", "report", run)
    assert code == 1
    assert "pip install 'sparsekit3d[report]'" in one_line(error)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("writes", [3, 4, 6, 7, 9, 12, 15, 21, 23, 25])
def test_a_full_disk_ends_in_one_line_and_a_resumable_run(
    sparsekit: Command,
    people: Path,
    whole: Path,
    cache: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
    writes: int,
) -> None:
    fsync = os.fsync
    left = writes

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    run = tmp_path / "my run"
    monkeypatch.setattr(os, "fsync", full)
    code, _, error = sparsekit(
        "fed", "run", "--cohort", people, "--out", run, "--cache", cache, *small
    )
    monkeypatch.undo()
    assert left <= 0
    assert code == 1
    last = error.splitlines()[-1]
    assert last.startswith(f"sparsekit: error: {run}")
    assert "No space left on device" in last
    assert "Traceback" not in error
    assert not (run / "result.json").exists()
    assert temporaries(run) == []
    if (run / "checkpoints").exists():
        assert last.endswith(f"continue with `sparsekit fed resume '{run}'`")
    code, _, error = sparsekit("fed", "resume", run, "--cache", cache)
    assert code == 0, error
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()


def test_a_full_disk_while_a_checkpoint_is_written(
    sparsekit: Command,
    people: Path,
    whole: Path,
    cache: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if "round-00002" in str(path):
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    run = tmp_path / "run"
    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, error = sparsekit(
        "fed", "run", "--cohort", people, "--out", run, "--cache", cache, *small
    )
    monkeypatch.undo()
    assert code == 1
    assert "checkpoints/round-00002: No space left on device" in error.splitlines()[-1]
    assert visible(run / "checkpoints") == {"round-00000", "round-00001"}
    assert temporaries(run) == []
    assert sparsekit("fed", "resume", run, "--cache", cache)[0] == 0
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()


def test_a_run_can_be_resumed_from_another_folder(
    sparsekit: Command,
    own_people: Path,
    tmp_path: Path,
    small: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(own_people.parent)
    line = ("fed", "run", "--cohort", own_people.name, "--out", tmp_path / "run", *small)
    assert sparsekit(*line)[0] == 0
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.chdir("/")
    assert sparsekit("fed", "resume", tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_one_line(sparsekit: Command, people: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    code, _, error = sparsekit("fed", "run", "--cohort", people, "--out", folder / "run")
    assert code == 1
    assert "Permission denied" in one_line(error)
