"""`fed report` on runs that go on, and on runs that broke in the middle."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import RunError
from sparsekit.fed.config import RunConfig
from sparsekit.fed.ledger import Ledger
from sparsekit.fed.report import write_progress_report
from sparsekit.fed.runner import Silent, is_running, start_run
from sparsekit.fed.unfinished import read_progress, site_items, state_items
from sparsekit.fed.watching import open_log

SMALL: dict[str, Any] = {
    "resolution": 4, "rounds": 4, "epochs": 1, "batch": 2, "width": 0.05, "sparsity": 0.8,
    "threads": 2, "seed": 3, "engine": "inprocess",
}  # fmt: skip


class Reporter(Silent):
    """Writes a report when a round begins, as somebody else would who looks at the folder."""

    def __init__(self, run: Path, number: int) -> None:
        self.run, self.number = run, number
        self.items: dict[str, str] = {}
        self.page = ""

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        del rounds, sites
        if number == self.number:
            with Ledger(self.run / "ledger.jsonl").path.open("a") as stream:
                # A row that is being written.
                stream.write('{"round": 3, "cli')
                stream.flush()
                self.items = state_items(read_progress(self.run))
                write_progress_report(self.run, self.run / "report.html")
                stream.truncate(stream.tell() - len('{"round": 3, "cli'))
            self.page = (self.run / "report.html").read_text(encoding="utf-8")


def test_a_running_run_has_a_report(tiny_cohort: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    reporter = Reporter(run, 3)
    start_run(RunConfig(cohort=str(tiny_cohort), **SMALL), run, cache=tiny_cache, watcher=reporter)
    assert reporter.items["state"] == "running"
    assert reporter.items["rounds finished"] == "2 of 4"
    assert reporter.items["newest test MAE"].endswith("years, model of round 1")
    assert "last word" not in reporter.items
    assert reporter.page.count("<img") == 2
    assert "c/d" in reporter.page
    assert re.search(r"round 3 of 4: asking 3 sites: a, b, c/d", reporter.page)
    assert not re.search(r"https?://|<script|<link|@import|url\(", reporter.page)
    assert not is_running(run)
    assert (run / "result.json").exists()


class StopsAt(Silent):
    def __init__(self, number: int) -> None:
        self.number = number

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        del rounds, sites
        if number == self.number:
            raise RunError("the <roof> fell in")


@pytest.mark.parametrize(("stop", "done"), [(1, "0 of 4"), (3, "2 of 4")])
def test_a_broken_run_says_why(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, stop: int, done: str
) -> None:
    run = tmp_path / "my run"
    with pytest.raises(RunError, match="roof"):
        start_run(
            RunConfig(cohort=str(tiny_cohort), **SMALL), run, cache=tiny_cache,
            watcher=StopsAt(stop),
        )  # fmt: skip
    items = state_items(read_progress(run))
    assert items["state"] == "stopped"
    assert items["rounds finished"] == done
    assert items["last word"] == "stopped: the <roof> fell in"
    write_progress_report(run, run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "the &lt;roof&gt; fell in" in page
    assert f"continue it with `sparsekit fed resume &#x27;{run}&#x27;`" in page
    if stop == 3:
        assert [row[:3] for row in site_items(read_progress(run))] == [
            ("a", "2 of 2", "-"), ("b", "2 of 2", "-"), ("c/d", "2 of 2", "-")
        ]  # fmt: skip


def test_a_killed_run_is_reported_by_the_command(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    command = (sys.executable, "-c", "from sparsekit.cli import main; main()", "fed")
    line = ("--cohort", tiny_cohort, "--cache", tiny_cache, "--width", "0.05", "--rounds", "50")
    with (tmp_path / "err").open("w") as stream:
        server = subprocess.Popen(
            [*command, "run", "--out", run, "--engine", "inprocess", *line], stderr=stream
        )
    try:
        end = time.monotonic() + 120
        while not (run / "checkpoints" / "round-00001").exists() and time.monotonic() < end:
            time.sleep(0.01)
        running = subprocess.run(
            [*command, "report", run], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    assert "running" in running
    with (run / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"torn')
    broken = subprocess.run([*command, "report", run], capture_output=True, text=True, check=True)
    assert "none: its process ended without a word" in broken.stdout
    assert f"It has stopped: continue it with `sparsekit fed resume {run}`." in broken.stdout
    assert f"Report: {run / 'report.html'}" in broken.stdout
    assert "process ended without a word" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('cohort = "x"\n')
    items = state_items(read_progress(tmp_path))
    assert (items["state"], items["rounds finished"]) == ("stopped", "0 of 20")
    write_progress_report(tmp_path, tmp_path / "report.html")
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_costs_lines_of_the_log_only(capfd: pytest.CaptureFixture[str]) -> None:
    with open_log(Path("/dev/full")) as log:
        for _ in range(100):
            log.info("x" * 1000)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('cohort = "x"\n')
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"ledger\.jsonl line 1"):
        read_progress(tmp_path)


@pytest.mark.parametrize("state", ["{", "[]", '{"history": []}', json.dumps({"history": 3})])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, state: str) -> None:
    (tmp_path / "config.toml").write_text('cohort = "x"\n')
    folder = tmp_path / "checkpoints" / "round-00003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state)
    with pytest.raises(RunError, match=r"round-00003 is damaged.*Remove that folder"):
        read_progress(tmp_path)


def test_the_log_has_whole_lines_with_times(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"

    start_run(RunConfig(cohort=str(tiny_cohort), **SMALL), run, cache=tiny_cache)
    with open_log(run / "run.log") as log:
        log.warning("b is out\n2026-01-01T00:00:00Z INFO finished\x1b[2J")
    lines = (run / "run.log").read_text(encoding="utf-8").splitlines()
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) \S.*"
    assert all(re.fullmatch(pattern, line) for line in lines)
    text = "\n".join(line.split(" ", 2)[2] for line in lines)
    for wanted in (
        r"^sparsekit .*, process \d+, strategy fedsparsify-global, engine inprocess$",
        r"^round 2 of 4: asking 3 sites: a, b, c/d$",
        r"^c/d: done after \d+\.\d{3} s$",
        r"^model of round 4: test MAE \d+\.\d{3} years on 4 people, sparsity 0\.\d{4}$",
        r"^finished: test MAE",
        r"^b is out\\x0a2026-01-01T00:00:00Z INFO finished\\x1b\[2J$",
    ):
        assert re.search(wanted, text, re.MULTILINE), wanted
