"""Sites that fail in every way, each in a process of its own: one is out, the run goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import RunError
from sparsekit.fed import messages
from sparsekit.fed.config import RunConfig
from sparsekit.fed.engines.base import Answered, Failure, Reply
from sparsekit.fed.engines.inprocess import InProcessEngine
from sparsekit.fed.engines.processes import ProcessesEngine
from sparsekit.fed.ledger import Ledger, LedgerRow
from sparsekit.fed.runner import Silent, resume_run, start_run

HOSTILE = Path(__file__).with_name("hostile_site.py")
SMALL: dict[str, Any] = {
    "resolution": 4, "rounds": 3, "epochs": 1, "batch": 2, "width": 0.05, "sparsity": 0.8,
    "threads": 2, "seed": 3, "engine": "processes",
}  # fmt: skip

# What goes wrong at the sites "b" and "c/d" in each round, and its name in the ledger.
FAULTS = {
    2: (("flipped bit", "corrupt"), ("exit", "dead")),
    3: (("other shape", "shape"), ("huge frame", "corrupt")),
    4: (("other round", "wrong-round"), ("exception", "dead")),
    5: (("other base", "stale-base"), ("unknown frame", "corrupt")),
    6: (("NaN", "nan"), ("half a reply", "dead")),
    7: (("infinity", "nan"), ("odd failure", "corrupt")),
    8: (("far away", "norm"), ("cut short", "corrupt")),
    9: (("dribble", "late"), ("too slow", "late")),
    10: (("no message", "corrupt"), ("flipped bit", "corrupt")),
}
HOSTILE_SITES = ("b", "c/d")
# Far more than a good site takes, on a busy machine too.
DEADLINE = 15.0


def make(cohort: Path, **changes: Any) -> RunConfig:
    return RunConfig(cohort=str(cohort), **(SMALL | changes))


def replies(run: Path, site: str) -> list[LedgerRow]:
    rows = Ledger(run / "ledger.jsonl")
    return [row for row in rows if row.client == site and row.direction == "up" and row.round]


class Deaf(InProcessEngine):
    """The reference: sites that are out are asked, and their answers thrown away."""

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        answers = super().exchange(requests, answered)
        for site, request in requests.items():
            number = int(messages.unpack(request).control["round"])
            if number in FAULTS and site in HOSTILE_SITES:
                answers[site] = Failure("dead", "as the test wants it")
        return answers


def test_every_fault_costs_its_site_that_round_only(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = {
        site: {number: pair[place][0] for number, pair in FAULTS.items()}
        for place, site in enumerate(HOSTILE_SITES)
    }

    class Engine(ProcessesEngine):
        def __init__(self, *args: Any, **settings: Any) -> None:
            command = (sys.executable, str(HOSTILE), json.dumps(faults))
            super().__init__(*args, **settings, command=command)

    settings: dict[str, Any] = {
        "rounds": max(FAULTS) + 1, "quorum": 0.3, "deadline": DEADLINE, "max_update_norm": 1000.0,
    }  # fmt: skip
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("sparsekit.fed.runner.ProcessesEngine", Engine)
        start_run(make(tiny_cohort, **settings), run, cache=tiny_cache)

    for place, site in enumerate(HOSTILE_SITES):
        found = {row.round: row.outcome for row in replies(run, site)}
        wanted = {number: pair[place][1] for number, pair in FAULTS.items()}
        assert found == dict.fromkeys(range(1, max(FAULTS) + 3), "ok") | wanted
    assert {row.outcome for row in replies(run, "a")} == {"ok"}
    log = (run / "run.log").read_text(encoding="utf-8")
    for site in HOSTILE_SITES:
        assert log.count(f"WARNING round 9: {site} is out: late (no reply within 15 s)") == 1
    # Whatever the fault was, the model is that of the sites that were not out.
    with monkeypatch.context() as patch:
        patch.setattr("sparsekit.fed.runner.InProcessEngine", Deaf)
        reference = make(tiny_cohort, **settings, engine="inprocess")
        start_run(reference, tmp_path / "reference", cache=tiny_cache)
    model = (tmp_path / "reference" / "model.spu").read_bytes()
    assert (run / "model.spu").read_bytes() == model


def pid_of(run: Path, site: str) -> int:
    """The process that the server has started last for a site, from the run's log."""
    lines = (run / "run.log").read_text(encoding="utf-8").splitlines()
    started = [line for line in lines if f" {site}: process " in line]
    return int(started[-1].split(": process ")[1].split()[0])


class Strike(Silent):
    """Sends a signal to a site soon after the others of its round have answered, or before."""

    def __init__(self, run: Path, number: int, sign: signal.Signals) -> None:
        self.run, self.number, self.sign = run, number, sign
        self.struck = self.noticed = 0.0
        self.round_ended = 0.0
        self._now = 0

    def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
        del rounds, sites
        self._now = number
        if number == self.number:
            threading.Timer(0.1, self._strike).start()
        elif number == self.number + 1:
            self.round_ended = time.monotonic()

    def _strike(self) -> None:
        os.kill(pid_of(self.run, "b"), self.sign)
        self.struck = time.monotonic()

    def site_answered(self, site: str) -> None:
        if (self._now, site) == (self.number, "b"):
            self.noticed = time.monotonic()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_site_that_dies_or_freezes_is_out_for_one_round(
    tiny_cohort: Path,
    tiny_cache: Path,
    tmp_path: Path,
    sign: signal.Signals,
    record_property: Callable[[str, object], None],
) -> None:
    run = tmp_path / "r"
    # So long a round that the signal comes while the site works.
    config = make(tiny_cohort, epochs=10, rounds=3, deadline=DEADLINE, quorum=0.5)
    strike = Strike(run, 2, sign)
    start_run(config, run, cache=tiny_cache, watcher=strike)
    outcomes = [(row.round, row.outcome) for row in replies(run, "b")]
    wanted = "dead" if sign == signal.SIGKILL else "late"
    # Started again, and back in the next round.
    assert outcomes == [(1, "ok"), (2, wanted), (3, "ok"), (4, "ok")]
    assert {row.outcome for site in ("a", "c/d") for row in replies(run, site)} == {"ok"}
    # The ledger has the time from the request until the failure was known.
    (seconds,) = (row.seconds for row in replies(run, "b") if row.outcome != "ok")
    noticed = strike.noticed - strike.struck
    record_property("seconds until the end was noticed", noticed)
    if sign == signal.SIGKILL:
        assert 0 < noticed < DEADLINE / 2
        assert seconds < DEADLINE / 2
    else:
        assert DEADLINE <= seconds < DEADLINE + 20
    assert strike.noticed <= strike.round_ended
    # It holds nothing any more: the model comes whole.
    rows = Ledger(run / "ledger.jsonl")
    third = {r.client: r.payload_bytes for r in rows if (r.round, r.direction) == (3, "down")}
    assert third["b"] > third["a"] == third["c/d"]
    connections = json.loads((run / "connections.json").read_text())
    broken = [one for one in connections if not one["in_order"]]
    assert [one["site"] for one in broken] == ["b"]
    assert all(one["kernel_sent"] is not None for one in broken)
    for one in connections:
        if one["in_order"]:
            assert (one["sent"], one["received"]) == (one["kernel_sent"], one["kernel_received"])


def test_sites_end_with_the_process_that_forked_them(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "r", tmp_path / "whole"
    start_run(make(tiny_cohort, engine="inprocess"), whole, cache=tiny_cache)

    class Orphans(Silent):
        def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
            del rounds, sites
            if number == 2:
                status = Path(f"/proc/{pid_of(run, 'a')}/status").read_text()
                (parent,) = (line for line in status.splitlines() if line.startswith("PPid:"))
                os.kill(int(parent.split()[1]), signal.SIGKILL)

    with pytest.raises(RunError, match=r"round 2: \d of 3 sites .*: dead"):
        start_run(make(tiny_cohort, quorum=1.0), run, cache=tiny_cache, watcher=Orphans())
    resume_run(run, cache=tiny_cache)
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from sparsekit.cli import main; main()", "fed", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_lost_quorum_is_an_error_that_can_be_resumed(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "my run", tmp_path / "whole"
    config = make(tiny_cohort, epochs=10, sparsity=0.95, engine="inprocess")
    start_run(config, whole, cache=tiny_cache)
    line = ("--cohort", tiny_cohort, "--cache", tiny_cache, "--epochs", "10", "--quorum", "1")
    small = ("--rounds", "3", "--width", "0.05", "--batch", "2", "--seed", "3")
    stop = threading.Event()

    def strike() -> None:
        while not stop.wait(0.05):
            log = run / "run.log"
            if log.exists() and "round 2 of 3: asking" in log.read_text(encoding="utf-8"):
                time.sleep(0.1)
                os.kill(pid_of(run, "a"), signal.SIGKILL)
                return

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        broken = command("run", "--out", run, *line, *small)
    finally:
        stop.set()
        striker.join()
    assert broken.returncode == 1
    last = broken.stderr.splitlines()[-1]
    assert "round 2: 2 of 3 sites gave a usable reply, the quorum is 3. a: dead" in last
    assert f"continue with `sparsekit fed resume '{run}'`" in last
    # Nobody has said so: it is the engine that one gets.
    assert 'engine = "processes"' in (run / "config.toml").read_text()
    assert not (run / "result.json").exists()
    again = command("resume", run)
    assert again.returncode == 0, again.stderr
    # It knows where the prepared scans are.
    assert not (tmp_path / "cache").exists()
    assert (run / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
