"""A server that is killed at random moments, and one whose disk is full."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekit.fed.config import RunConfig
from sparsekit.fed.ledger import Ledger
from sparsekit.fed.runner import start_run

ROOT = Path(__file__).parents[2]


def test_five_kills_change_nothing(tmp_path: Path) -> None:
    # `make soak` does it fifty times.
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "soak_kills.py"), str(tmp_path / "kills")),
            *("--kills", "5", "--seed", "4", "--rounds", "40"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    account: dict[str, Any] = json.loads((tmp_path / "kills" / "kills.json").read_text())
    assert account["kills"] == 5
    assert account["differences"] == []
    # The seed is one that has kills of every kind.
    assert all(account["kills_when"].values())


SCRIPT = """
set -u
mount -t tmpfs -o size=$1 tmpfs "$2"
shift
small=$1 kept=$2 python=$3
shift 3
main='from sparsekit.cli import main; main()'
"$python" -c "$main" fed run --out "$small/run" "$@" 2> "$kept/first"
echo $? > "$kept/first.code"
cp -r "$small/run/checkpoints" "$kept/"
mount -o remount,size=64m "$small"
"$python" -c "$main" fed resume "$small/run" --cache "$4" 2> "$kept/second"
echo $? > "$kept/second.code"
rm -rf "$kept/run"
cp -r "$small/run" "$kept/run"
"""


def may_mount() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a file system of its own")
def test_a_full_file_system_while_checkpointing(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    """A real one, so small that some checkpoint finds no room; then it grows."""
    settings: dict[str, Any] = {
        "rounds": 6, "epochs": 1, "batch": 2, "width": 0.2, "sparsity": 0.5, "threads": 2,
        "seed": 3, "keep_checkpoints": 0,
    }  # fmt: skip
    whole = tmp_path / "whole"
    start_run(
        RunConfig(cohort=str(tiny_cohort), engine="inprocess", **settings), whole, cache=tiny_cache
    )
    checkpoints = sorted((whole / "checkpoints").iterdir())
    room = sum(file.stat().st_size for one in checkpoints[:4] for file in one.iterdir())
    line = [
        word
        for name, value in settings.items()
        for word in ("--" + name.replace("_", "-"), str(value))
    ]
    small, kept = tmp_path / "small", tmp_path / "kept"
    small.mkdir()
    kept.mkdir()
    subprocess.run(
        [
            *("unshare", "--mount", "sh", "-c", SCRIPT, "sh", str(room)),
            *(str(small), str(kept), sys.executable),
            *("--cohort", str(tiny_cohort), "--cache", str(tiny_cache), *line),
        ],
        check=True,
        cwd=ROOT,
    )
    assert (kept / "first.code").read_text().strip() == "1"
    error = (kept / "first").read_text(encoding="utf-8")
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"sparsekit: error: {small / 'run'}")
    assert "No space left on device. The finished rounds are kept" in last
    assert last.endswith(f"continue with `sparsekit fed resume {small / 'run'}`")
    # Nothing half-written had a final name, and nothing finished was lost.
    saved = sorted(path.name for path in (kept / "checkpoints").iterdir())
    assert saved == [f"round-{number:05d}" for number in range(len(saved))]
    assert 2 <= len(saved) <= 5
    for name in saved:
        assert (kept / "checkpoints" / name / "model.spu").read_bytes() == (
            whole / "checkpoints" / name / "model.spu"
        ).read_bytes()
    assert (kept / "second.code").read_text().strip() == "0", (kept / "second").read_text()
    assert (kept / "run" / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    keys = [(r.round, r.client, r.direction) for r in Ledger(kept / "run" / "ledger.jsonl")]
    assert keys == [(r.round, r.client, r.direction) for r in Ledger(whole / "ledger.jsonl")]
    shutil.rmtree(kept)
