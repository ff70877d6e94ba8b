"""Time the `processes` engine with sites that only echo, and how soon it notices a killed one.

python tools/soak_engine.py FOLDER      # writes FOLDER/engine.json
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from soak_load import counters_agree, write_account

from sparsekit.fed import messages
from sparsekit.fed.engines.base import Failure, Reply
from sparsekit.fed.engines.framed import FRAME_BYTES
from sparsekit.fed.engines.processes import ProcessesEngine, SiteProcess
from sparsekit.fed.messages import FRAMING_BYTES

ECHO = (sys.executable, str(Path(__file__).with_name("soak_echo.py")))
SITES = 8
ROUNDS = 60
KILLS = 12


def engine_in(folder: Path) -> ProcessesEngine:
    """Start the engine and its echoing sites."""
    sites = [SiteProcess(f"site-{number}", 1, folder / f"{number}") for number in range(SITES)]
    return ProcessesEngine(
        sites, run=folder, cache=folder, threads=SITES, deadline=600.0, command=ECHO
    )


def time_rounds(folder: Path, payload_bytes: int) -> dict[str, Any]:
    """Exchange messages of that payload with all sites; return the seconds of each round."""
    engine = engine_in(folder)
    seconds = []
    try:
        names = sorted(engine.hello())
        request = messages.pack({}, os.urandom(payload_bytes))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            replies = engine.exchange(dict.fromkeys(names, request), lambda _: None)
            seconds.append(time.perf_counter() - start)
            for reply in replies.values():
                assert isinstance(reply, Reply)
                assert reply.data == request
    finally:
        engine.close()
    low, _, high = quantiles(seconds[5:], n=4)
    return {
        "payload_bytes": payload_bytes,
        "rounds": ROUNDS - 5,
        "seconds": {"median": median(seconds[5:]), "quartiles": [low, high]},
        "framing_bytes": FRAME_BYTES + FRAMING_BYTES,
        "framing_share": (FRAME_BYTES + FRAMING_BYTES) / (len(request) + FRAME_BYTES),
        "most_extra_bytes_of_a_connection": max(
            abs(one[side] - ROUNDS * (payload_bytes + FRAME_BYTES + FRAMING_BYTES + 2))
            for one in engine.closed
            for side in ("sent", "received")
        ),
        "connections": counters_agree(engine.closed),
    }


class Killed:
    """Kills the process of a site once all others have answered."""

    def __init__(self, engine: ProcessesEngine, site: str) -> None:
        self._engine, self.site = engine, site
        self._others = SITES - 1
        self.at = 0.0

    def answered(self, site: str) -> None:
        """Count the others."""
        self._others -= site != self.site
        if site != self.site and not self._others:
            threading.Timer(0.05, self._strike).start()

    def _strike(self) -> None:
        self.at = time.monotonic()
        os.kill(self._engine._children[self.site].pid, signal.SIGKILL)


def time_notice(folder: Path) -> dict[str, Any]:
    """Kill a site while it works, again and again; return the seconds until its round ended."""
    engine = engine_in(folder)
    seconds = []
    try:
        names = sorted(engine.hello())
        for number in range(KILLS):
            killed = Killed(engine, names[number % SITES])
            requests = dict.fromkeys(names, b"x" * 1000) | {killed.site: b"wait"}
            replies = engine.exchange(requests, killed.answered)
            ended = time.monotonic()
            lost = replies[killed.site]
            assert isinstance(lost, Failure)
            assert lost.outcome == "dead"
            seconds.append(ended - killed.at)
    finally:
        engine.close()
    return {"kills": KILLS, "seconds": {"median": median(seconds), "most": max(seconds)}}


def main() -> int:
    """Measure and write the account."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    account = {
        "sites": SITES,
        "megabyte": time_rounds(folder / "large", 1_000_000),
        "hundred_kilobytes": time_rounds(folder / "small", 100_000),
        "killed_site": time_notice(folder / "killed"),
    }
    return write_account(folder / "engine.json", account)


if __name__ == "__main__":
    sys.exit(main())
