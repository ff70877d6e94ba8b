"""Play runs that are large in one way each, and watch what they hold.

    python tools/soak_load.py sites|state|rounds FOLDER      # writes FOLDER/PART.json

`sites`: 64 of them. `state`: a dense model of 500 MB. `rounds`: 250 of them, with a tiny model.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from process_watch import Holding, descendants_of, holding, peak_bytes, site_processes

COMMAND = (sys.executable, "-c", "from sparsekit.cli import main; main()")
SMALL = (*("--epochs", "1", "--batch", "2", "--width", "0.05", "--threads", "2"),)

# 125 million weights; one step of plain SGD, for its optimizer holds nothing.
LARGE = """
strategy = "fedavg"
rounds = 1
epochs = 1
batch = 1
max_steps = 1
optimizer = "sgd"
weight_decay = 0.0
width = 10.4
threads = 1
keep_checkpoints = 1
"""


def write_account(path: Path, account: dict[str, Any]) -> int:
    """Write and print what was measured."""
    text = json.dumps(account, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


def counters_agree(closed: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Count connections: all, closed in order, and those where both counts are the same."""
    in_order = [one for one in closed if one["in_order"]]
    equal = [
        one
        for one in in_order
        if (one["sent"], one["received"]) == (one["kernel_sent"], one["kernel_received"])
    ]
    return {"all": len(closed), "in_order": len(in_order), "equal": len(equal)}


class Watch:
    """Samples a server and its sites' processes."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.server_peak = self.site_peak = self.most_together = 0
        self.most_sites = 0

    def look(self) -> tuple[Holding, list[Holding]] | None:
        """Measure all of them now; None once the server is gone."""
        own = holding(self.server)
        if own is None:
            return None
        sites = [found for pid in descendants_of(self.server) if (found := holding(pid))]
        try:
            self.server_peak = max(self.server_peak, peak_bytes(self.server))
            peaks = [peak_bytes(one.pid) for one in sites]
        except OSError:
            peaks = []
        self.site_peak = max([self.site_peak, *peaks])
        self.most_sites = max(self.most_sites, len(sites))
        together = own.memory_bytes + sum(one.memory_bytes for one in sites)
        self.most_together = max(self.most_together, together)
        return own, sites


def play(
    folder: Path, line: Sequence[str | Path], every: float, sampled: Callable[[Any], None]
) -> tuple[Path, Watch, float]:
    """Run `sparsekit fed run` and look at it every so many seconds."""
    run = folder / "run"
    words = ("fed", "run", "--out", run, "--cache", folder / "cache", *line)
    start = time.monotonic()
    with (folder / "server.txt").open("wb") as log:
        server = subprocess.Popen([*COMMAND, *map(str, words)], stdout=log, stderr=log)
    watch = Watch(server.pid)
    try:
        while server.poll() is None:
            if (seen := watch.look()) is not None:
                sampled(seen)
            time.sleep(every)
    finally:
        server.kill()
        server.wait()
    seconds = time.monotonic() - start
    if server.returncode:
        raise RuntimeError((folder / "server.txt").read_text(encoding="utf-8")[-2000:])
    return run, watch, seconds


def make_cohort(folder: Path, subjects: int, sites: int) -> Path:
    """Make a synthetic cohort on the 4 mm grid."""
    words = ("--subjects", str(subjects), "--sites", str(sites), "--resolution", "4")
    made = ("cohort", "make", str(folder / "cohort"), *words, "--workers", "2")
    subprocess.run([*COMMAND, *made], check=True, capture_output=True)
    return folder / "cohort"


def account_of(run: Path, watch: Watch, seconds: float) -> dict[str, Any]:
    """Return what every part says of its run."""
    result = json.loads((run / "result.json").read_text())
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    outcomes: dict[str, int] = {}
    for row in ledger:
        outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
    return {
        "sites": result["data"]["sites"],
        "rounds": result["config"]["rounds"],
        "parameters": result["model"]["parameters"],
        "state_bytes": 4 * result["model"]["parameters"],
        "seconds": round(seconds, 1),
        "seconds_until_the_first_round": round(_until_first_round(run), 1),
        "seconds_of_the_rounds": round(result["seconds"], 1),
        "server_peak_bytes": watch.server_peak,
        "site_peak_bytes": watch.site_peak,
        "most_bytes_together": watch.most_together,
        "most_processes": watch.most_sites,
        "processes_left": len(site_processes(run)),
        "outcomes": outcomes,
        "connections": counters_agree(json.loads((run / "connections.json").read_text())),
    }


def _until_first_round(run: Path) -> float:
    lines = (run / "run.log").read_text(encoding="utf-8").splitlines()
    asked = next(line for line in lines if ": asking " in line)
    times = [datetime.fromisoformat(line.split(" ", 1)[0]) for line in (lines[0], asked)]
    return (times[1] - times[0]).total_seconds()


def many_sites(folder: Path) -> dict[str, Any]:
    """Play 3 rounds with 64 sites."""
    line = ("--cohort", make_cohort(folder, 256, 64), "--rounds", "3", *SMALL)
    return account_of(*play(folder, line, 2.0, lambda _: None))


def large_state(folder: Path) -> dict[str, Any]:
    """Play a round of dense averaging with a model of 500 MB and 2 sites, one at a time."""
    config = folder / "large.toml"
    config.write_text(LARGE, encoding="utf-8")
    line = ("--cohort", make_cohort(folder, 8, 2), "--config", config)
    return account_of(*play(folder, line, 0.5, lambda _: None))


def many_rounds(folder: Path, rounds: int = 250) -> dict[str, Any]:
    """Play 250 rounds with 4 sites and note what server and sites hold on the way."""
    line = ("--cohort", make_cohort(folder, 16, 4), "--rounds", str(rounds), *SMALL)
    log = folder / "run" / "run.log"
    samples: dict[int, dict[str, int]] = {}

    def sampled(seen: tuple[Holding, list[Holding]]) -> None:
        number = log.read_text(encoding="utf-8").count(": asking ") if log.exists() else 0
        if 0 < number <= rounds and number not in samples and len(seen[1]) == 5:
            own, sites = seen
            samples[number] = {
                "round": number,
                "server_bytes": own.memory_bytes,
                "sites_bytes": sum(one.memory_bytes for one in sites),
                "files": own.files + sum(one.files for one in sites),
                "sockets": own.sockets + sum(one.sockets for one in sites),
                "threads": own.threads + sum(one.threads for one in sites),
                "processes": 1 + len(sites),
            }

    account = account_of(*play(folder, line, 0.1, sampled))
    taken = [samples[number] for number in sorted(samples)]
    parts = {
        "early": [one for one in taken if rounds // 5 <= one["round"] < 2 * rounds // 5],
        "late": [one for one in taken if one["round"] >= 4 * rounds // 5],
    }
    account["samples"] = {name: len(part) for name, part in parts.items()}
    for name, part in parts.items():
        account[name] = {key: sorted(one[key] for one in part)[len(part) // 2] for key in part[0]}
        account[name]["most_files"] = max(one["files"] for one in part)
        account[name]["most_sockets"] = max(one["sockets"] for one in part)
    return account


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "sites": many_sites,
    "state": large_state,
    "rounds": many_rounds,
}


def main() -> int:
    """Play one part."""
    if len(sys.argv) != 3 or sys.argv[1] not in PARTS:
        print(__doc__, file=sys.stderr)
        return 2
    part, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True)
    return write_account(folder / f"{part}.json", PARTS[part](folder))


if __name__ == "__main__":
    sys.exit(main())
