"""One site's processes killed in the middle of a round, on the real frameworks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engines.test_engines import DEADLINE_SECONDS, SETTINGS, ours, skip_without
from tools.process_watch import descendants_of

pytestmark = pytest.mark.engines
SITE = "b"  # the framework calls it site-2
# A round lasts long enough to strike in its middle, and a reply is there long before the deadline.
LONG = SETTINGS.replace("rounds = 2", "rounds = 6").replace("epochs = 1", "epochs = 100")
FLARE = LONG + 'quorum = 0.5\ndeadline = 25.0\n[flare]\nmode = "poc"\n'
FLOWER = LONG + "quorum = 0.5\ndeadline = 90.0\n[flower]\ntls = true\n"


@dataclass
class Killed:
    """A process that is no more, and what it takes to start it again."""

    command: list[str]
    environment: dict[str, str]
    folder: Path


def describe(pid: int) -> Killed:
    folder = Path(f"/proc/{pid}")
    command = (folder / "cmdline").read_bytes().decode().split("\0")[:-1]
    words = (folder / "environ").read_bytes().decode().split("\0")
    pairs = (word.partition("=") for word in words if word)
    environment = {name: value for name, _, value in pairs}
    return Killed(command, environment, (folder / "cwd").readlink())


def roots_of(mark: str) -> list[int]:
    """Return the run's processes whose command line has the framework's name of the site."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (path / "cmdline").read_bytes()
            if mark.encode() in (path / "environ").read_bytes() and b"site-2" in command:
                found.append(int(path.name))
    return found


@dataclass
class Game:
    """A run as a process of its own, and what its log says."""

    run: Path
    server: subprocess.Popen[bytes]
    mark: str
    outcomes: dict[int, tuple[str, float]] = field(default_factory=dict)

    def log(self) -> str:
        path = self.run / "run.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + DEADLINE_SECONDS
        while text not in self.log():
            engine = self.run / "engine.log"
            why = engine.read_text(errors="replace")[-3000:] if engine.exists() else ""
            assert self.server.poll() is None, self.log()[-3000:] + why
            assert time.monotonic() < end, self.log()[-3000:] + why
            time.sleep(0.05)

    def processes(self) -> dict[int, Killed]:
        """Return the site's processes: those started with its file or folder, and their children.

        Children come last.
        """
        found: dict[int, Killed] = {}
        for pid in roots_of(self.mark):
            for one in [pid, *descendants_of(pid)]:
                with contextlib.suppress(OSError):
                    found[one] = describe(one)
        return found

    def read_outcomes(self) -> dict[int, tuple[str, float]]:
        rows = [json.loads(line) for line in (self.run / "ledger.jsonl").read_text().splitlines()]
        return {
            row["round"]: (row["outcome"], row["seconds"])
            for row in rows
            if (row["client"], row["direction"]) == (SITE, "up") and row["round"]
        }


def play(
    engine: str, settings: str, cohort: Path, folder: Path, act: Callable[[Game], None]
) -> Game:
    skip_without(engine)
    (folder / "c.toml").write_text(settings)
    mark = f"SPARSEKIT_TEST={folder}"
    command = str(Path(sys.executable).parent / "sparsekit")
    words = ("fed", "run", "--engine", engine, "--cohort", str(cohort))
    server = subprocess.Popen(
        [command, *words, "--config", str(folder / "c.toml"), "--out", str(folder / "r")],
        env=os.environ | dict([mark.split("=", 1)]),
        start_new_session=True,
    )
    game = Game(folder / "r", server, mark)
    try:
        act(game)
        assert server.wait(DEADLINE_SECONDS) == 0, game.log()[-3000:]
    finally:
        server.kill()
        server.wait()
    end = time.monotonic() + 60
    while ours(mark):
        assert time.monotonic() < end, ours(mark)
        time.sleep(0.2)
    return game


def strike(game: Game, after: float) -> dict[int, Killed]:
    """Kill all processes of the site, so many seconds after a round began."""
    game.wait_for("round 2 of 6: asking")
    time.sleep(after)
    assert f"{SITE}: done" not in game.log().split("round 2 of 6")[1], "too late to strike"
    victims = game.processes()
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    return victims


def test_flower_goes_on_without_a_site_until_it_is_back(
    two_sites: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def act(game: Game) -> None:
        # Flower starts a process for the message first.
        victims = strike(game, 6.0)
        assert len(victims) > 1
        nodes = [v for v in victims.values() if "flower-supernode" in " ".join(v.command)]
        assert len(nodes) == 1
        game.wait_for(f"WARNING round 2: {SITE} is out: ")
        # What the site's administrator does, who starts the SuperNode with its key again.
        node = nodes[0]
        with (game.run / "engine.log").open("ab") as log:
            restarted.append(subprocess.Popen(
                node.command, env=node.environment, cwd=node.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            ))  # fmt: skip

    restarted: list[subprocess.Popen[bytes]] = []
    outcomes = play("flower", FLOWER, two_sites, tmp_path, act).read_outcomes()
    for process in restarted:
        process.wait(DEADLINE_SECONDS)
    record_property("outcomes", json.dumps(outcomes))
    outcome, seconds = outcomes[2]
    assert outcome in ("late", "dead")
    assert seconds < 90.0 + 20.0
    assert outcomes[1][0] == outcomes[6][0] == outcomes[7][0] == "ok"


def test_flare_goes_on_without_a_site(
    two_sites: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def act(game: Game) -> None:
        strike(game, 0.5)

    game = play("flare", FLARE, two_sites, tmp_path, act)
    outcomes = game.read_outcomes()
    record_property("outcomes", json.dumps(outcomes))
    assert outcomes[1][0] == "ok"
    outcome, seconds = outcomes[2]
    assert outcome in ("late", "dead")
    assert seconds < 25.0 + 20.0
