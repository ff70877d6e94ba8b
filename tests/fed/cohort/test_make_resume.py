"""A making that is cut short, by whatever, is gone on with and ends in the same bytes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import CohortError, UsageError
from sparsekit.fed.cohort.make import cohort as cohort_module
from sparsekit.fed.cohort.make import make_cohort
from sparsekit.fed.cohort.make.bids import write_scan
from sparsekit.fed.cohort.make.unfinished import kept_scans, partial_folder

SMALL: dict[str, Any] = {"subjects": 10, "sites": 2, "seed": 3}
PATIENCE_S = 120.0


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


def fail_at(
    patched: pytest.MonkeyPatch, failure: BaseException, *, after: int
) -> Callable[..., None]:
    write = write_scan
    written: list[Path] = []

    def failing(path: Path, *rest: Any) -> None:
        written.append(path)
        if len(written) > after:
            raise failure
        write(path, *rest)

    patched.setattr(cohort_module, "write_scan", failing)
    return failing


@pytest.mark.parametrize(
    ("failure", "seen", "text"),
    [
        pytest.param(
            OSError(errno.ENOSPC, "No space left"), CohortError, "disk is full", id="disk full"
        ),
        pytest.param(
            OSError(errno.EACCES, "Permission denied"), OSError, "Permission", id="denied"
        ),
        pytest.param(KeyboardInterrupt("stop"), KeyboardInterrupt, "stop", id="Ctrl-C"),
    ],
)
def test_a_failure_half_way_is_gone_on_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    seen: type[BaseException],
    text: str,
) -> None:
    whole = files_of(make_cohort(tmp_path / "whole", **SMALL))
    out = tmp_path / "cohort"
    with monkeypatch.context() as patched:
        fail_at(patched, failure, after=3)
        with pytest.raises(seen, match=text):
            make_cohort(out, **SMALL)
    assert not out.exists()
    assert kept_scans(out) == 3
    kept = {path: path.stat().st_mtime_ns for path in partial_folder(out).glob("sub-*/anat/*")}
    counts: list[tuple[int, int]] = []
    assert make_cohort(out, **SMALL, progress=lambda *done: counts.append(done)) == out
    assert counts[-1] == (10, 10)
    assert files_of(out) == whole
    for path, written in kept.items():
        assert (out / path.relative_to(partial_folder(out))).stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "whole"]


def test_a_killed_command_leaves_no_worker_and_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "cohort"
    line = [sys.executable, "-c", "from sparsekit.cli import main; main()", "cohort", "make"]
    line += [str(out), "--subjects", "64", "--sites", "1", "--seed", "4", "--workers", "2"]
    making = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: kept_scans(out) >= 3 or making.poll() is not None, "three of 64 scans")
        children = Path(f"/proc/{making.pid}/task/{making.pid}/children").read_text().split()
    finally:
        making.send_signal(signal.SIGKILL)
        making.wait()
    assert len(children) >= 2
    wait_until(lambda: not any(alive(int(pid)) for pid in children), "the workers to end")
    assert not out.exists()
    before = kept_scans(out)
    assert 3 <= before < 64
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert f"going on with the {before} scans that are there" in done.stderr
    assert files_of(out) == files_of(make_cohort(tmp_path / "whole", subjects=64, sites=1, seed=4))


def unfinished(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patched:
        fail_at(patched, KeyboardInterrupt(), after=2)
        with pytest.raises(KeyboardInterrupt):
            make_cohort(out, **SMALL)
    return partial_folder(out)


def test_a_damaged_scan_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(make_cohort(tmp_path / "whole", **SMALL))
    partial = unfinished(tmp_path / "cohort", monkeypatch)
    first, second = sorted(partial.glob("sub-*/anat/*.nii.gz"))
    first.write_bytes(first.read_bytes()[:-20])
    damaged = bytearray(second.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    second.write_bytes(damaged)
    assert files_of(make_cohort(tmp_path / "cohort", **SMALL)) == whole


def test_what_was_begun_with_other_settings_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = unfinished(tmp_path / "cohort", monkeypatch)
    with pytest.raises(UsageError, match=r"unfinished.*seed 3 there, 4 asked.*remove the folder"):
        make_cohort(tmp_path / "cohort", **{**SMALL, "seed": 4})
    assert len(list(partial.glob("sub-*/anat/*"))) == 2


def test_a_beginning_without_settings_is_made_anew(tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "cohort")
    (partial / "sub-00001").mkdir(parents=True)
    (partial / "dataset_description.json").write_text('{"Name": ')
    made = make_cohort(tmp_path / "cohort", **SMALL)
    assert files_of(made) == files_of(make_cohort(tmp_path / "whole", **SMALL))


def test_two_processes_do_not_make_the_same_cohort(tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "cohort")
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is making it"):
            make_cohort(tmp_path / "cohort", **SMALL)
    finally:
        os.close(held)
    assert make_cohort(tmp_path / "cohort", **SMALL).is_dir()
