"""The guard of tests/conftest.py: it stops what leaves the machine, here and in children."""

import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Kept free for documentation: nobody answers there (RFC 5737).
ELSEWHERE = "192.0.2.1"
GUARD = Path(__file__).parent / "guard" / "sitecustomize.py"


@pytest.fixture
def own_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "refusals.txt"
    monkeypatch.setenv("SPARSEKIT_TEST_REFUSALS", str(path))
    return path


@pytest.mark.parametrize("host", [ELSEWHERE, "10.1.2.3", "0.0.0.1"])
def test_other_machines_are_refused_here(own_refusals: Path, host: str) -> None:
    with socket.socket() as sock, pytest.raises(PermissionError, match="stay on this machine"):
        sock.connect((host, 9))
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(PermissionError, match="stay on this machine"),
    ):
        sock.sendto(b"x", (host, 9))
    assert own_refusals.read_text().count(host) == 2


def test_other_machines_are_refused_in_children(own_refusals: Path) -> None:
    code = f"import socket; socket.create_connection(('{ELSEWHERE}', 9), 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError: tests stay on this machine" in done.stderr
    assert ELSEWHERE in own_refusals.read_text()


def test_a_test_may_widen_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    is_allowed = runpy.run_path(str(GUARD), run_name="guard")["is_allowed"]
    assert not is_allowed(ELSEWHERE)
    monkeypatch.setenv("SPARSEKIT_TEST_NETWORKS", "127.0.0.0/8 192.0.2.0/24")
    assert is_allowed(ELSEWHERE)
    assert is_allowed("127.3.2.1")
    assert not is_allowed("192.0.3.1")


def test_loopback_is_fine(own_refusals: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert not own_refusals.exists()
