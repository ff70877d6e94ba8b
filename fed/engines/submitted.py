"""What the programs have in common that submit a job to a framework (`flare.py`, `flower.py`)."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BRIDGE_FILE, JOB_FILE = "bridge.json", "job.json"
"""In the folder that such a program is started with."""
# For a job whose server side has been told goodbye.
_END_SECONDS = 20.0


def read_job(folder: Path) -> dict[str, Any]:
    """Return what the run has written down for the program."""
    job: dict[str, Any] = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
    return job


def follow(
    is_finished: Callable[[], bool], stop: Callable[[], object] | None, *, every: float
) -> None:
    """Wait for the end of a job that others run, looking at it every so many seconds.

    Once this process is told to end, the job has a while to do so by itself; then `stop` is
    called, if it is given.
    """

    def told(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, told)
    try:
        while not is_finished():
            time.sleep(every)
    except KeyboardInterrupt:
        end = time.monotonic() + _END_SECONDS
        while stop is not None and not is_finished():
            if time.monotonic() > end:
                stop()
                return
            time.sleep(1.0)
