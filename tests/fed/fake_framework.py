"""A framework without machines: `python -m tests.fed.fake_framework FOLDER`, for the relay's tests.

``job.json`` says what its sites do: each answers from its TOML file, or is late, broken or gone.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from sparsekit.fed.engines.relay import serve
from sparsekit.fed.engines.site_app import SiteApp
from sparsekit.fed.engines.submitted import BRIDGE_FILE, read_job


def main(folder: Path) -> None:
    job = read_job(folder)
    if job.get("leaves"):
        # A program that runs on after the framework, as services do.
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd="/")
    if job.get("ends"):
        raise SystemExit("no server today")
    files = Path(job.get("site_files", folder / "sites"))
    apps = {name: SiteApp(files / f"{name}.toml") for name in job["names"]}
    asked = dict.fromkeys(apps, 0)
    lock = threading.Lock()

    def ask(site: str, request: bytes, seconds: float) -> bytes:
        with lock:
            asked[site] += 1
            fault = job.get("faults", {}).get(f"{site} {asked[site]}")
        if fault == "late":
            time.sleep(seconds)
            raise TimeoutError
        if fault == "gone":
            raise ConnectionError("the client is not there")
        if fault == "server":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = apps[site].answer(request)
        if fault == "huge":
            return answer + bytes(17 * len(request) + (1 << 24))
        return {"empty": b"", "other": b"\x63" + answer, "cut": answer[:-1]}.get(fault, answer)

    serve(folder / BRIDGE_FILE, list(apps), ask)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
