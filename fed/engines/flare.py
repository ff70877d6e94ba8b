"""NVIDIA FLARE as an engine: ``python -m sparsekit.fed.engines.flare FOLDER`` submits the job.

Three kinds of place for it: FLARE's simulator, its proof-of-concept services on this machine, and
a provisioned FLARE elsewhere.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sparsekit.fed.engines.options import FlareOptions
from sparsekit.fed.engines.relayed import BRIDGE_FILE, JOB_FILE
from sparsekit.fed.engines.site_app import SITE_FILE

PROGRAM = "sparsekit.fed.engines.flare"
_JOB = "sparsekit"
_FINISHED = "FINISHED"
# For a job whose server side has been told goodbye.
_END_SECONDS = 20.0


def client_names(count: int) -> list[str]:
    """Return FLARE's names of the sites of this machine: it takes few of the letters we do."""
    return [f"site-{number}" for number in range(1, count + 1)]


def job_of(options: FlareOptions, names: list[str]) -> dict[str, Any]:
    """Return what the program below has to know."""
    admin = str(Path(options.admin).absolute()) if options.admin else ""
    return {"mode": options.mode, "clients": names, "admin": admin}


def main(folder: Path) -> None:
    """Run the job to its end; a signal ends it before."""
    job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    # Both are read when FLARE is imported.
    os.environ["NVFLARE_POC_WORKSPACE"] = str(folder / "poc")
    os.environ["NVFLARE_SIMULATOR_WORKSPACE_ROOT"] = str(folder / "simulator")
    if job["mode"] != "production":
        os.environ[SITE_FILE] = str(folder / "sites")
    from nvflare.collab import CollabRecipe
    from nvflare.recipe import PocEnv, ProdEnv, SimEnv

    from sparsekit.fed.engines.flare_app import Client, Server

    recipe = CollabRecipe(
        job_name=_JOB,
        server=Server(str(folder / BRIDGE_FILE)),
        client=Client(),
        min_clients=len(job["clients"]),
    )
    # Else parts of the package would travel with the job, and hide the one that is installed.
    recipe.finalize().set_app_packages(["sparsekit"])
    if job["mode"] == "simulator":
        env = SimEnv(
            clients=job["clients"],
            num_threads=len(job["clients"]),
            workspace_root=str(folder / "simulator"),
        )
    elif job["mode"] == "poc":
        env = PocEnv(clients=job["clients"], num_clients=len(job["clients"]))
    else:
        admin = Path(job["admin"])
        env = ProdEnv(str(admin), login_timeout=20.0, username=admin.name)
    run = recipe.execute(env)
    if job["mode"] != "simulator":
        _watch(run, ours_to_abort=job["mode"] == "production")


def _watch(run: Any, *, ours_to_abort: bool) -> None:
    """Wait for the end of a job that others run; abort it if we are told to end."""

    def stop(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        while not str(run.get_status() or "").startswith(_FINISHED):
            time.sleep(1.0)
    except KeyboardInterrupt:
        end = time.monotonic() + _END_SECONDS
        while ours_to_abort and not str(run.get_status() or "").startswith(_FINISHED):
            if time.monotonic() > end:
                run.abort()
                return
            time.sleep(1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
