"""Do the study's jobs, one after the other, beside other processes on the same folder.

A job is done when its file is there, so that a study that was stopped goes on where it was. A
process that works on a job holds a lock on a file, which the system lifts when it dies.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sparsekit.errors import RunError
from sparsekit.fed.result import describe_machine
from sparsekit.fed.storage import write_json
from tools.cohort_study.people import render_chunk, save
from tools.cohort_study.plan import Job, Study, jobs, renderings
from tools.cohort_study.predictors import absolute_errors

_WAIT_S = 2.0
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Say = Callable[[str], None]


def run(study: Study, root: Path, say: Say = print) -> None:
    """Do all jobs that nobody has done yet; return when everything is done.

    Raises
    ------
    RunError
        The folder holds results of other settings or of another generator.
    """
    torch.set_num_threads(1)
    check_folder(study, root)
    everything = list(jobs(study))
    while left := [job for job in everything if not job.target(root).exists()]:
        if not any(_attempt(study, job, root, len(everything) - len(left), say) for job in left):
            time.sleep(_WAIT_S)  # others work on all that can be done now


def check_folder(study: Study, root: Path) -> None:
    """Make the study's folder, or refuse one of other settings.

    Raises
    ------
    RunError
        It holds results of other settings or of another generator.
    """
    root.mkdir(parents=True, exist_ok=True)
    label = root / "study.json"
    wanted = study.fingerprint()
    if not label.exists():
        write_json(label, {"fingerprint": wanted, "machine": describe_machine()})
    found = json.loads(label.read_text(encoding="utf-8"))["fingerprint"]
    if found != wanted:
        raise RunError(
            f"{root}: holds results of other settings or another generator ({found}, wanted "
            f"{wanted}); remove it or name another folder"
        )


def run_with_workers(root: Path, workers: int) -> int:
    """Start processes of one thread each that share the study's jobs; return the worst exit code.

    Parameters
    ----------
    root : Path
        The study's folder.
    workers : int
    """
    command = [sys.executable, "-m", "tools.cohort_study", "run", str(root)]
    others = [subprocess.Popen(command, env={**os.environ, **_ONE_THREAD}) for _ in range(workers)]
    try:
        return max(other.wait() for other in others)
    finally:
        for other in others:
            if other.poll() is None:
                other.terminate()


def _attempt(study: Study, job: Job, root: Path, done: int, say: Say) -> bool:
    """Do a job unless another process is at it or its people are not there yet."""
    if job.kind != "render" and not _rendered(study, job, root):
        return False
    with _claim(job.target(root)) as mine:
        if not mine:
            return False
        if job.target(root).exists():
            return True
        count = sum(1 for _ in jobs(study))
        prefix = f"[{done + 1} of {count}] {job}"
        say(prefix)
        start, spent = time.perf_counter(), time.process_time()
        if job.kind == "render":
            save(job.target(root), render_chunk(study, job.draw, job.number))
        else:

            def progress(update: int, updates: int, error: float) -> None:
                if update % max(1, updates // 10) < 100:
                    say(f"{prefix}: update {update} of {updates}, training error {error:.2f} years")

            result = absolute_errors(study, job, root, progress)
            mean = sum(result["errors"]) / len(result["errors"])
            result |= {
                "predictor": job.kind,
                "people": job.number,
                "seed": job.draw.seed,
                "scale": job.draw.scale,
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - spent, 1),
            }
            write_json(job.target(root), result)
            say(f"{prefix}: {mean:.2f} years ({result['detail']})")
    return True


def _rendered(study: Study, job: Job, root: Path) -> bool:
    return all(part.target(root).exists() for part in renderings(study, job.draw))


@contextmanager
def _claim(target: Path) -> Iterator[bool]:
    """Hold a lock that names a job; False if another process has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
