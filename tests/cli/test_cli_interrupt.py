"""Stopped at any moment, by Ctrl-C or without warning, a run goes on as if nothing had been."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    code = "from sparsekit.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=60)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def wait_for_round(process: subprocess.Popen[str], number: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if f"after round {number:3d} " in line:
            return
    pytest.fail("the run ended before it could be stopped")


def assert_nothing_half_written(run: Path, whole: Path) -> None:
    if (run / "model.spu").exists():
        assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    if (run / "result.json").exists():
        assert set(json.loads((run / "result.json").read_text())) >= {"accuracy", "history"}
    for folder in (run / "checkpoints").iterdir():
        if not folder.name.startswith("."):
            names = {path.name for path in folder.iterdir()}
            first = folder.name == "round-00000"
            assert names == {"model.spu", "state.json"} | (set() if first else {"sent.spu"})


def test_ctrl_c_names_the_way_on(
    sparsekit: Command, people: Path, whole: Path, cache: Path, tmp_path: Path, small: list[str]
) -> None:
    run = tmp_path / "run"
    with running(
        "fed", "run", "--cohort", people, "--out", run, "--cache", cache, *small
    ) as process:
        wait_for_round(process, 0)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    last = [line for line in error.splitlines() if "after round" not in line]
    assert last == [f"sparsekit: interrupted; continue with `sparsekit fed resume {run}`"]
    assert_nothing_half_written(run, whole)
    for name in ("result.json", "model.spu", "report.html"):
        assert not (run / name).exists()
    assert not list(run.rglob("*.tmp"))

    assert sparsekit("fed", "resume", run, "--cache", cache)[0] == 0
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()


@pytest.mark.parametrize(
    ("number", "seconds"), [pytest.param(0, 0.05, id="early"), pytest.param(1, 0.12, id="later")]
)
def test_a_killed_run_can_be_resumed(
    sparsekit: Command,
    people: Path,
    whole: Path,
    cache: Path,
    tmp_path: Path,
    small: list[str],
    number: int,
    seconds: float,
) -> None:
    run = tmp_path / "run"
    with running(
        "fed", "run", "--cohort", people, "--out", run, "--cache", cache, *small
    ) as process:
        wait_for_round(process, number)
        # Wherever that falls, even after the end: what follows holds for every moment.
        time.sleep(seconds)
        process.kill()
        process.wait(timeout=60)
    assert_nothing_half_written(run, whole)
    assert sparsekit("fed", "resume", run, "--cache", cache)[0] == 0
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("text", ["", "interrupted; continue somehow"])
def test_ctrl_c_anywhere_is_one_line(
    sparsekit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(text)

    monkeypatch.setattr("sparsekit.fed.runner.resume_run", interrupt)
    code, out, error = sparsekit("fed", "resume", tmp_path)
    assert (code, out) == (130, "")
    assert error == f"sparsekit: {text or 'interrupted'}\n"
