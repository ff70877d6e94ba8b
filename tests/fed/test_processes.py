"""Sites as processes over TCP: the same bits, bytes that the kernel confirms, and real faults."""

import dataclasses
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit.fed import messages
from sparsekit.fed.config import RunConfig
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.base import Failure
from sparsekit.fed.engines.framed import (
    BYE,
    FRAME_BYTES,
    REPLY,
    REQUEST,
    BrokenFrameError,
    Connection,
)
from sparsekit.fed.engines.processes import ProcessesEngine, SiteProcess
from sparsekit.fed.ledger import Ledger, LedgerRow
from sparsekit.fed.runner import Silent, resume_run, start_run

SMALL: dict[str, Any] = {
    "resolution": 4, "rounds": 3, "epochs": 1, "batch": 2, "width": 0.05, "sparsity": 0.8,
    "threads": 2, "seed": 3, "engine": "processes",
}  # fmt: skip


def make(cohort: Path, **changes: Any) -> RunConfig:
    return RunConfig(cohort=str(cohort), **(SMALL | changes))


def rows(run: Path) -> list[LedgerRow]:
    return list(Ledger(run / "ledger.jsonl"))


def connections(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "connections.json").read_text())
    return found


def alive(run: Path) -> list[int]:
    """Processes of the run's sites."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sparsekit.fed.engines.site_process" in words and str(run).encode() in words:
            found.append(int(path.parent.name))
    return found


def pid_of(run: Path, site: str) -> int:
    for pid in alive(run):
        if site.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(f"no process of {site}")


@pytest.mark.parametrize("values", ["lossless", "int4"])
def test_the_same_bits_as_in_one_process_and_the_kernel_agrees(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, values: str
) -> None:
    alone = make(tiny_cohort, engine="inprocess", values=values)
    start_run(alone, tmp_path / "one", cache=tiny_cache)
    start_run(make(tiny_cohort, values=values), tmp_path / "many", cache=tiny_cache)

    model = (tmp_path / "one/model.spu").read_bytes()
    assert (tmp_path / "many/model.spu").read_bytes() == model
    account = rows(tmp_path / "many")
    plain = rows(tmp_path / "one")
    assert len(account) == len(plain)
    for ours, theirs in zip(account, plain, strict=True):
        assert ours.framing_bytes == FRAME_BYTES + (theirs.framing_bytes or 0)
        changed: dict[str, Any] = {"framing_bytes": 0, "transport_bytes": 0, "seconds": 0.0}
        assert dataclasses.replace(ours, **changed) == dataclasses.replace(theirs, **changed)
    closed = connections(tmp_path / "many")
    assert sorted(one["site"] for one in closed) == ["a", "b", "c/d"]
    for one in closed:
        assert one["in_order"]
        assert one["sent"] == one["kernel_sent"]
        assert one["received"] == one["kernel_received"]
        own = [r for r in account if r.client == one["site"]]
        down, up = (
            sum(r.transport_bytes or 0 for r in own if r.direction == d) for d in ("down", "up")
        )
        # Goodbyes both ways, and the run's secret before the introduction.
        assert one["sent"] == down + FRAME_BYTES
        assert one["received"] == up + FRAME_BYTES + 32
    assert alive(tmp_path / "many") == []


class Fault(Silent):
    """Does something to a run while its sites work on a round."""

    def __init__(self, number: int, act: Callable[[], None], after: float = 0.0) -> None:
        self.number, self.act, self.after = number, act, after
        self.notices: list[str] = []

    def round_started(self, number: int, rounds: int, sites: int) -> None:
        del rounds, sites
        if number == self.number:
            threading.Timer(self.after, self.act).start()

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
def test_a_site_that_dies_or_freezes_is_out_for_one_round(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    run = tmp_path / "r"
    frozen: list[int] = []

    def strike() -> None:
        frozen.append(pid_of(run, "b"))
        os.kill(frozen[0], sign)

    # Long enough rounds that the signal comes while the site works.
    config = make(tiny_cohort, epochs=6, rounds=4, deadline=3.0, quorum=0.5)
    watcher = Fault(2, strike, after=0.1)
    start_run(config, run, cache=tiny_cache, watcher=watcher)
    wanted = "dead" if sign == signal.SIGKILL else "late"
    outcomes = [(r.round, r.outcome) for r in rows(run) if r.client == "b" and r.direction == "up"]
    assert (2, wanted) in outcomes
    assert all(outcome == "ok" for number, outcome in outcomes if number < 2)
    assert any("b is out" in text for text in watcher.notices)
    others = [r.outcome for r in rows(run) if r.client != "b"]
    assert set(others) == {"ok"}
    # Started again, and back in the next round, with a model of which it need hold nothing.
    assert [outcome for number, outcome in outcomes if number > 2] == ["ok"] * 3
    third = {r.client: r.payload_bytes for r in rows(run) if (r.round, r.direction) == (3, "down")}
    assert third["b"] > third["a"] == third["c/d"]
    assert not next(one["in_order"] for one in connections(run) if one["site"] == "b")
    assert alive(run) == []


def test_too_few_sites_end_the_run_which_resumes(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = make(tiny_cohort, epochs=4, quorum=1.0)
    start_run(config, whole, cache=tiny_cache)
    watcher = Fault(2, lambda: os.kill(pid_of(broken, "a"), signal.SIGKILL), after=0.05)
    with pytest.raises(Exception, match="quorum is 3"):
        start_run(config, broken, cache=tiny_cache, watcher=watcher)
    assert alive(broken) == []
    before = connections(broken)
    resume_run(broken, cache=tiny_cache)
    assert (broken / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    account = connections(broken)
    assert account[: len(before)] == before
    assert sum(one["in_order"] for one in account[len(before) :]) == 3


def test_sites_end_with_a_server_that_is_killed_and_the_run_resumes(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = make(tiny_cohort, epochs=3, rounds=4)
    start_run(config, whole, cache=tiny_cache)
    code = (
        "import sys; from pathlib import Path; from tests.fed.test_processes import make\n"
        "from sparsekit.fed.runner import start_run\n"
        "cohort, cache, run = map(Path, sys.argv[1:])\n"
        "start_run(make(cohort, epochs=3, rounds=4), run, cache=cache)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_cohort), str(tiny_cache), str(broken)],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    ledger = broken / "ledger.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not any((broken / "checkpoints").glob("round-00002*")):
        assert server.poll() is None
        time.sleep(0.02)
    server.kill()
    server.wait()
    assert ledger.exists()
    while alive(broken) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(broken) == []
    resume_run(broken, cache=tiny_cache)
    assert (broken / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    resumed: set[tuple[str, int]] = set()
    for ours, theirs in zip(rows(broken), rows(whole), strict=True):
        # In one round the sites, started anew, got the model whole.
        same: dict[str, Any] = {"seconds": 0.0}
        if ours.payload_bytes > theirs.payload_bytes:
            resumed.add((ours.direction, ours.round))
            same |= {"payload_bytes": 0, "transport_bytes": 0}
        assert dataclasses.replace(ours, **same) == dataclasses.replace(theirs, **same)
    assert len(resumed) == 1
    assert {direction for direction, _ in resumed} == {"down"}


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    listener = socket.create_server((framed.HOST, 0))
    other = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    connection = Connection(accepted)
    yield connection, other
    connection.close()
    other.close()
    listener.close()


def test_frames_come_as_they_went(pair: tuple[Connection, socket.socket]) -> None:
    connection, other = pair
    peer = Connection(other)
    data = os.urandom(1_000_003)
    sender = threading.Thread(target=peer.send, args=(REQUEST, data))
    sender.start()
    frame = connection.receive(most=len(data), until=time.monotonic() + 10)
    sender.join()
    assert (frame.kind, frame.data) == (REQUEST, data)
    connection.send(BYE)
    assert peer.receive(most=0).kind == BYE
    counts = connection.counts()
    assert counts.received == FRAME_BYTES + len(data) == counts.kernel_received
    assert counts.sent == FRAME_BYTES == counts.kernel_sent


@pytest.mark.parametrize(
    ("sent", "error", "match"),
    [
        pytest.param(struct.pack("<BQ", 9, 0), BrokenFrameError, "kind 9", id="kind"),
        pytest.param(struct.pack("<BQ", REPLY, 2**62), BrokenFrameError, "at most", id="huge"),
        pytest.param(struct.pack("<BQ", REPLY, 50) + b"x" * 20, EOFError, "closed", id="cut"),
        pytest.param(b"", EOFError, "closed", id="nothing"),
    ],
)
def test_bad_frames_are_refused(
    pair: tuple[Connection, socket.socket], sent: bytes, error: type[Exception], match: str
) -> None:
    connection, other = pair
    other.sendall(sent)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(error, match=match):
        connection.receive(most=100, until=time.monotonic() + 5)


def test_an_endless_dribble_ends_at_the_deadline(pair: tuple[Connection, socket.socket]) -> None:
    connection, other = pair
    stop = threading.Event()

    def dribble() -> None:
        other.sendall(struct.pack("<BQ", REPLY, 10_000))
        while not stop.wait(0.01):
            other.sendall(b"x")

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            connection.receive(most=10_000, until=time.monotonic() + 0.3)
    finally:
        stop.set()
        thread.join()


def test_strangers_are_not_let_in(tmp_path: Path) -> None:
    engine = ProcessesEngine([], run=tmp_path, cache=tmp_path, threads=1, deadline=1.0)
    try:
        address = engine._listener.getsockname()
        assert address[0] == "127.0.0.1"
        peer = Connection(socket.create_connection(address))
        peer.send(1, b"0" * 32 + messages.pack({"site": "a"}))
        with pytest.raises((EOFError, ConnectionError)):
            peer.receive(most=100, until=time.monotonic() + 5)
        peer.close()
    finally:
        engine.close()
    assert engine.closed == []
    assert isinstance(engine._ask("a", b""), Failure)


def test_a_site_that_comes_back_with_other_people_is_refused(tmp_path: Path) -> None:
    site = SiteProcess("a", 1, tmp_path)
    engine = ProcessesEngine([site], run=tmp_path, cache=tmp_path, threads=1, deadline=1.0)
    peers = []
    try:
        for people in (1, 2):
            peer = Connection(socket.create_connection(engine._listener.getsockname()))
            peers.append(peer)
            hello = messages.pack({"site": "a", "n_train": people})
            peer.send(1, engine._secret.encode() + hello)
            end = time.monotonic() + 10
            while "a" not in engine._connections and time.monotonic() < end:
                time.sleep(0.01)
        # Told to go, so that its process does not try again for ever.
        assert peers[1].receive(most=100, until=time.monotonic() + 5).kind == BYE
        peers[1].send(BYE)
        with pytest.raises((EOFError, ConnectionError)):
            peers[1].receive(most=100, until=time.monotonic() + 5)
        assert set(engine._connections) == {"a"}
        assert "other people" in engine._troubles["a"]
        peers[0].close()
        answer = engine._ask("a", b"x")
        assert isinstance(answer, Failure)
        assert answer.outcome == "dead"
    finally:
        for peer in peers:
            peer.close()
        engine.close()
