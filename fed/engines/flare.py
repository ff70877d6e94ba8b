"""NVIDIA FLARE as an engine: ``python -m sparsekit.fed.engines.flare FOLDER`` submits the job.

Three kinds of place for it: FLARE's simulator, its proof-of-concept services on this machine, and
a provisioned FLARE elsewhere.
"""

import os
import sys
from pathlib import Path
from typing import Any

from sparsekit.fed.engines.site_app import SITE_FILE
from sparsekit.fed.engines.submitted import BRIDGE_FILE, follow, read_job


def main(folder: Path) -> None:
    """Run the job to its end; a signal ends it before."""
    job = read_job(folder)
    mode, names = job["mode"], job["names"]
    # Both are read when FLARE is imported.
    os.environ["NVFLARE_POC_WORKSPACE"] = str(folder / "poc")
    os.environ["NVFLARE_SIMULATOR_WORKSPACE_ROOT"] = str(folder / "simulator")
    if mode != "production":
        os.environ[SITE_FILE] = str(folder / "sites")
    from nvflare.collab import CollabRecipe
    from nvflare.recipe import PocEnv, ProdEnv, SimEnv

    from sparsekit.fed.engines.flare_app import Client, Server

    server, client = Server(str(folder / BRIDGE_FILE)), Client()
    recipe = CollabRecipe("sparsekit", server=server, client=client, min_clients=len(names))
    # Else parts of the package would travel with the job, and hide the one that is installed.
    recipe.finalize().set_app_packages(["sparsekit"])
    if mode == "simulator":
        root = str(folder / "simulator")
        env = SimEnv(clients=names, num_threads=len(names), workspace_root=root)
    elif mode == "poc":
        env = PocEnv(clients=names, num_clients=len(names))
    else:
        admin = Path(job["admin"])
        env = ProdEnv(str(admin), login_timeout=20.0, username=admin.name)
    run: Any = recipe.execute(env)
    if mode != "simulator":
        stop = run.abort if mode == "production" else None
        follow(lambda: str(run.get_status() or "").startswith("FINISHED"), stop, every=1.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
