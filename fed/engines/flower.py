"""Flower as an engine: ``python -m sparsekit.fed.engines.flower FOLDER`` submits the app.

Either to a SuperLink that is running already, or to one that it starts on this machine, with a
SuperNode for every site and, on demand, a certificate and node keys that are good for one run.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sparsekit.fed.engines import framed
from sparsekit.fed.engines.submitted import follow, read_job

_CONNECTION = "sparsekit"
# Each look is a process of its own.
_LOOK_SECONDS = 10.0
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
folder = {folder}
"""
_CERTIFICATE = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"),
    *("-nodes", "-days", "30", "-subj", "/CN=sparsekit run"),
    *("-addext", "keyUsage=critical,digitalSignature,keyCertSign"),
    *("-addext", f"subjectAltName=IP:{framed.HOST}", "-keyout", "server.key", "-out", "server.pem"),
)
_NODE_KEY = ("ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f")


def main(folder: Path) -> None:
    """Start what is to be started here, submit the app and wait; a signal ends it before."""
    job = read_job(folder)
    os.environ["FLWR_HOME"] = str(folder / "flwr")
    here = job["mode"] == "local"
    address = f"{framed.HOST}:{_free_port()}" if here else job["address"]
    # It is its own authority.
    certificate = str(folder / "server.pem") if job["tls"] else job["root_certificates"]
    security = (
        f"root-certificates = {json.dumps(certificate)}" if certificate else "insecure = true"
    )
    for name, text in {
        # The connection that the commands use; the user's own stays untouched.
        "flwr/config.toml": f'[superlink.{_CONNECTION}]\naddress = "{address}"\n{security}\n',
        "app/pyproject.toml": _APP.format(folder=json.dumps(str(folder))),
    }.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
    if here:
        _start_superlink(folder, address, tls=job["tls"])
        for name in job["names"]:
            _start_supernode(folder, name, address, tls=job["tls"])
    run = str(_flwr("run", str(folder / "app"), _CONNECTION)["run-id"])

    def is_finished() -> bool:
        (found,) = _flwr("list", _CONNECTION, "--run-id", run)["runs"]
        return str(found["status"]).startswith("finished")

    stop = None if here else lambda: _flwr("stop", run, _CONNECTION)
    follow(is_finished, stop, every=_LOOK_SECONDS)


def _start_superlink(folder: Path, address: str, *, tls: bool) -> None:
    host, port = address.split(":")
    secure = ["--insecure"]
    if tls:
        subprocess.run(_CERTIFICATE, cwd=folder, check=True)
        files = (
            ("ca-certfile", "server.pem"),
            ("certfile", "server.pem"),
            ("keyfile", "server.key"),
        )
        secure = [w for name, file in files for w in (f"--ssl-{name}", str(folder / file))]
        secure.append("--enable-supernode-auth")
    words = ("flower-superlink", "--host", host, "--port", port, *secure)
    superlink = subprocess.Popen([*words, "--disable-runtime-dependency-installation"])
    while superlink.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, int(port)), timeout=1.0).close()
            return
        time.sleep(0.1)
    raise SystemExit("the SuperLink ended; see above")


def _start_supernode(folder: Path, name: str, address: str, *, tls: bool) -> None:
    secure = ["--insecure"]
    if tls:
        key = str(folder / name)
        subprocess.run([*_NODE_KEY, key], check=True)
        _flwr("supernode", "register", f"{key}.pub", _CONNECTION)
        certificate = str(folder / "server.pem")
        secure = ["--root-certificates", certificate, "--auth-supernode-private-key", key]
    site = json.dumps(str(folder / "sites" / f"{name}.toml"))
    words = ("flower-supernode", *secure, "--superlink", address, "--host", framed.HOST)
    # Else all would want the same port for their programs.
    port = str(_free_port())
    subprocess.Popen([*words, "--port", port, "--node-config", f"site-file={site}"])


def _flwr(*words: str) -> dict[str, Any]:
    command = ["flwr", *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found: dict[str, Any] = {"success": False}
    with contextlib.suppress(ValueError):
        found = json.loads(done.stdout[done.stdout.index("{") :])
    if done.returncode or not found.get("success"):
        raise SystemExit(f"flwr {' '.join(words)}: {done.stdout}{done.stderr}")
    return found


def _free_port() -> int:
    with socket.create_server((framed.HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    main(Path(sys.argv[1]))
