"""Kill a run's server again and again, resume it each time, and compare with one left alone.

    python tools/soak_kills.py FOLDER --kills 50 --seed 0

FOLDER is made, and holds the cohort and both runs. Moments are drawn from the seed: some while the
sites start, some in the first round after that, most in later ones. The account goes to
FOLDER/kills.json; the exit code is 1 unless every kill fell into the run and its end is the same,
bit for bit.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from process_watch import site_processes

COMMAND = (sys.executable, "-c", "from sparsekit.cli import main; main()")
SETTINGS = (
    *("--epochs", "1", "--batch", "2", "--width", "0.05", "--sparsity", "0.9", "--threads", "2"),
    *("--keep-checkpoints", "2"),
)
# Rounds that begin before the clock of a kill starts, the most seconds on it, and its share.
# The first round of new processes takes seconds, later ones a fraction of one.
WHEN = {"starting": (0, 5.0, 2), "first round": (1, 3.0, 2), "later rounds": (2, 0.7, 6)}
PATIENCE_SECONDS = 300.0


def sparsekit(*words: str | Path) -> None:
    """Run a command to its end."""
    subprocess.run([*COMMAND, *map(str, words)], check=True, capture_output=True)


def asked(run: Path) -> int:
    """Return how many rounds the run's log has seen begin."""
    try:
        return (run / "run.log").read_text(encoding="utf-8").count(": asking ")
    except FileNotFoundError:
        return 0


def wait_until_gone(run: Path) -> float:
    """Wait until the sites have noticed that their server is gone; return the seconds."""
    start = time.monotonic()
    while site_processes(run):
        if time.monotonic() - start > PATIENCE_SECONDS:
            raise RuntimeError(f"processes {site_processes(run)} outlive their server")
        time.sleep(0.02)
    return time.monotonic() - start


def strike(server: subprocess.Popen[bytes], run: Path, moments: random.Random) -> dict[str, Any]:
    """Kill the server at a drawn moment and say when that was."""
    when = moments.choices(list(WHEN), [share for _, _, share in WHEN.values()])[0]
    begun, most_seconds, _ = WHEN[when]
    delay = moments.uniform(0.0, most_seconds)
    before = asked(run)
    end = time.monotonic() + PATIENCE_SECONDS
    while asked(run) < before + begun and server.poll() is None:
        if time.monotonic() > end:
            raise RuntimeError(f"{run}: no round begins")
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(delay)
    hit = server.poll() is None
    server.kill()
    server.wait()
    log = (run / "run.log").read_text(encoding="utf-8").splitlines() if hit and before else []
    return {
        "hit": hit,
        "when": when,
        "rounds_begun": asked(run) - before,
        "last_line": log[-1].split(" ", 2)[2] if log else "",
        "sites_gone_after_seconds": round(wait_until_gone(run), 3),
    }


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the ledger's rows without times."""
    lines = (run / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"seconds": 0.0} for line in lines]


def differences(whole: Path, broken: Path) -> list[str]:
    """Compare a run that was killed with one left alone."""
    found = []
    if (whole / "model.spu").read_bytes() != (broken / "model.spu").read_bytes():
        found.append("the final weights differ")
    ours, theirs = rows_of(broken), rows_of(whole)
    keys = Counter((row["round"], row["client"], row["direction"]) for row in ours)
    if double := [key for key, count in keys.items() if count > 1]:
        found.append(f"counted twice: {double}")
    if [len(ours), set(keys)] != [
        len(theirs),
        {(row["round"], row["client"], row["direction"]) for row in theirs},
    ]:
        found.append("other messages were counted")
        return found
    for left, right in zip(ours, theirs, strict=True):
        # Sites that were started again got one model whole; engines frame in different ways.
        free = ["payload_bytes", "transport_bytes"] if left["direction"] == "down" else []
        for name in set(left) - {"framing_bytes", "transport_bytes", *free}:
            if left[name] != right[name]:
                place = f"round {left['round']}, {left['client']}, {left['direction']}"
                found.append(f"{name} differs in {place}")
        if left["payload_bytes"] < right["payload_bytes"]:
            found.append(f"a smaller payload in round {left['round']}")
    results = [json.loads((run / "result.json").read_text()) for run in (whole, broken)]
    if (
        results[0]["accuracy"] != results[1]["accuracy"]
        or results[0]["flops"] != results[1]["flops"]
    ):
        found.append("the results differ")
    return found


def kill_often(folder: Path, *, kills: int, seed: int, rounds: int) -> dict[str, Any]:
    """Play the run twice, once with so many kills, and return the account."""
    folder.mkdir(parents=True)
    cohort, cache = folder / "cohort", folder / "cache"
    whole, broken = folder / "whole", folder / "broken"
    sparsekit(
        *("cohort", "make", cohort, "--subjects", "16", "--sites", "2", "--resolution", "4"),
        *("--seed", str(seed)),
    )
    line = ("--cohort", cohort, "--cache", cache, "--rounds", str(rounds), *SETTINGS)
    sparsekit("fed", "run", "--out", whole, *line, "--engine", "inprocess")
    moments = random.Random(seed)
    strikes: list[dict[str, Any]] = []
    start = time.monotonic()
    with (folder / "servers.txt").open("wb") as log:
        while len(strikes) < kills and (not strikes or strikes[-1]["hit"]):
            words = ("fed", "resume", broken, "--cache", cache)
            if not (broken / "config.toml").exists():
                words = ("fed", "run", "--out", broken, *line)
            server = subprocess.Popen([*COMMAND, *map(str, words)], stdout=log, stderr=log)
            try:
                strikes.append(strike(server, broken, moments))
            finally:
                server.kill()
                server.wait()
    checkpoints = sorted(path.name for path in (broken / "checkpoints").glob("round-*"))
    sparsekit("fed", "resume", broken, "--cache", cache)
    found = differences(whole, broken)
    hits = [one for one in strikes if one["hit"]]
    return {
        "kills_wanted": kills,
        "kills": len(hits),
        "kills_when": {when: sum(one["when"] == when for one in hits) for when in WHEN},
        "seed": seed,
        "rounds": rounds,
        "rounds_begun_between_kills": [one["rounds_begun"] for one in hits],
        "newest_checkpoint_after_the_last_kill": checkpoints[-1] if checkpoints else None,
        "most_seconds_until_sites_were_gone": max(one["sites_gone_after_seconds"] for one in hits),
        "last_lines": [one["last_line"] for one in hits],
        "seconds": round(time.monotonic() - start, 1),
        "differences": found[:20],
        "identical": not found and len(hits) == kills,
    }


def main() -> int:
    """Read the command line, play, and write the account."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    account = kill_often(
        options.folder, kills=options.kills, seed=options.seed, rounds=options.rounds
    )
    text = json.dumps(account, indent=1) + "\n"
    (options.folder / "kills.json").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if account["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
