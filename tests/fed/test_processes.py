"""Sites as processes over TCP: the same bits, bytes that the kernel confirms, and real faults."""

import dataclasses
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
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
from sparsekit.fed.runner import start_run
from tools.process_watch import site_processes

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


# With one thread each, sites are forked; with two they start on their own.
@pytest.mark.parametrize(
    ("values", "threads", "granularity"),
    [("lossless", 2, "weight"), ("int4", 3, "vector:2"), ("lossless", 6, "filter")],
)
def test_the_same_bits_as_in_one_process_and_the_kernel_agrees(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, values: str, threads: int, granularity: str
) -> None:
    settings = {"values": values, "threads": threads, "granularity": granularity}
    alone = make(tiny_cohort, engine="inprocess", **settings)
    start_run(alone, tmp_path / "one", cache=tiny_cache)
    start_run(make(tiny_cohort, **settings), tmp_path / "many", cache=tiny_cache)
    assert (tmp_path / "many" / "nursery.log").exists() == (threads < 6)

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
    assert site_processes(tmp_path / "many") == []


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
    assert (frame.kind, bytes(frame.data)) == (REQUEST, data)
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
