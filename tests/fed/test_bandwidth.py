"""Over a slow link, a round's time follows its bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && tc qdisc add dev lo root tbf "
         "rate 20mbit burst 16kb latency 200ms"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return f"no network namespace with a slow link can be made here: {done.stderr.strip()}"
    return None


def test_time_follows_bytes_over_a_slow_link(tmp_path: Path) -> None:
    why = why_not()
    if why is not None:
        pytest.skip(why)
    measured = tmp_path / "measured.json"
    subprocess.run(
        [sys.executable, "tools/measure_bandwidth.py", str(measured), "--width", "0.5"],
        cwd=ROOT, check=True, timeout=300,
    )  # fmt: skip
    found = json.loads(measured.read_text())["echo"]
    dense, sparse = found["dense"], found["sparse"]
    payloads = dense["payload_bytes"] / sparse["payload_bytes"]
    times = dense["seconds"] / sparse["seconds"]
    assert payloads > 15
    assert 0.85 < times / payloads < 1.15
    # The link was as slow as it was meant to be: with headers, 20 Mbit/s at most.
    assert 8 * dense["payload_bytes"] / dense["seconds"] < 20e6
