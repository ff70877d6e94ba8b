"""Flower as an engine: ``python -m sparsekit.fed.engines.flower FOLDER`` submits the app.

Either to a SuperLink that is running already, or to one that it starts on this machine, with a
SuperNode for every site and, on demand, certificates and node keys.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparsekit.fed.engines import framed
from sparsekit.fed.engines.options import FlowerOptions
from sparsekit.fed.engines.relayed import BRIDGE_FILE, JOB_FILE

PROGRAM = "sparsekit.fed.engines.flower"
_CONNECTION = "sparsekit"
# Each look is a process of its own.
_WATCH_SECONDS = 10.0
# For a run whose server side has been told goodbye.
_END_SECONDS = 15.0
_APP = """[project]
name = "sparsekit-relay"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "sparsekit"
[tool.flwr.app.components]
serverapp = "sparsekit.fed.engines.flower_app:server"
clientapp = "sparsekit.fed.engines.flower_app:client"
[tool.flwr.app.config]
bridge = ""
nodes = 0
start-seconds = 0.0
"""


def node_names(count: int) -> list[str]:
    """Return names for the files of the sites of this machine."""
    return [f"node-{number}" for number in range(1, count + 1)]


def job_of(options: FlowerOptions, names: list[str]) -> dict[str, Any]:
    """Return what the program below has to know."""
    return {
        "mode": options.mode,
        "tls": options.tls,
        "nodes": names,
        "address": options.address,
        "root_certificates": options.root_certificates,
        "start_seconds": options.start_seconds,
    }


def main(folder: Path) -> None:
    """Start what is to be started here, submit the app and wait; a signal ends it before."""
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    os.environ["FLWR_HOME"] = str(folder / "flwr")
    address, certificates = job["address"], job["root_certificates"]
    if job["mode"] == "local":
        address = f"{framed.HOST}:{_free_port()}"
        if job["tls"]:
            from sparsekit.fed.engines.flower_keys import make_keys

            make_keys(folder, job["nodes"])
            certificates = str(folder / "ca.crt")
        _start_superlink(folder, address, certificates)
    _configure(folder, address, certificates)
    if job["mode"] == "local":
        _start_supernodes(folder, job["nodes"], address, certificates)
    (folder / "app").mkdir()
    (folder / "app" / "pyproject.toml").write_text(_APP, encoding="utf-8")
    settings = {
        "bridge": json.dumps(str(folder / BRIDGE_FILE)),
        "nodes": len(job["nodes"]),
        "start-seconds": float(job["start_seconds"]),
    }
    started = _flwr(
        "run", str(folder / "app"), _CONNECTION, "--format", "json",
        "-c", " ".join(f"{name}={value}" for name, value in settings.items()),
    )  # fmt: skip
    _watch(str(started["run-id"]), ours_to_stop=job["mode"] == "deployed")


def _watch(run: str, *, ours_to_stop: bool) -> None:
    """Wait for the end of the run; stop it, if it goes on, once we are told to end."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while not _is_finished(run):
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        end = time.monotonic() + _END_SECONDS
        while ours_to_stop and not _is_finished(run):
            if time.monotonic() > end:
                _flwr("stop", run, _CONNECTION, "--format", "json")
                return
            time.sleep(1.0)


def _is_finished(run: str) -> bool:
    found = _flwr("list", _CONNECTION, "--run-id", run, "--format", "json")
    status = str(found["runs"][0]["status"])
    return status.startswith("finished")


def _start_superlink(folder: Path, address: str, certificates: str) -> None:
    host, port = address.rsplit(":", 1)
    if certificates:
        secure = [
            *("--ssl-ca-certfile", certificates, "--enable-supernode-auth"),
            *("--ssl-certfile", str(folder / "server.pem")),
            *("--ssl-keyfile", str(folder / "server.key")),
        ]
    else:
        secure = ["--insecure"]
    child = subprocess.Popen(
        [
            *(_program("flower-superlink"), "--host", host, "--port", port, *secure),
            "--disable-runtime-dependency-installation",
        ]
    )
    while not _listens(host, int(port)):
        if child.poll() is not None:
            raise SystemExit("the SuperLink ended; see above")
        time.sleep(0.1)


def _start_supernodes(folder: Path, nodes: list[str], address: str, certificates: str) -> None:
    for node in nodes:
        secure = ["--insecure"]
        if certificates:
            _flwr("supernode", "register", str(folder / f"{node}.pub"), _CONNECTION)
            secure = [
                *("--root-certificates", certificates),
                *("--auth-supernode-private-key", str(folder / node)),
            ]
        site = json.dumps(str(folder / "sites" / f"{node}.toml"))
        subprocess.Popen(
            [
                *(_program("flower-supernode"), *secure, "--superlink", address),
                *("--host", framed.HOST, "--port", str(_free_port())),
                *("--node-config", f"site-file={site}"),
            ]
        )


def _configure(folder: Path, address: str, certificates: str) -> None:
    """Write the connection that the `flwr` commands use; the user's own stays untouched."""
    root = f"root-certificates = {json.dumps(certificates)}"
    security = root if certificates else "insecure = true"
    home = folder / "flwr"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f"[superlink.{_CONNECTION}]\naddress = {json.dumps(address)}\n{security}\n",
        encoding="utf-8",
    )


def _flwr(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [_program("flwr"), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode != 0:
        raise SystemExit(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")
    start = done.stdout.find("{")
    found: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
    if found.get("success") is False:
        raise SystemExit(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")
    return found


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name}: not found on PATH, though Flower is installed")
    return found


def _free_port() -> int:
    with socket.create_server((framed.HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]))
