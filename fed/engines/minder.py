"""Runs an engine's program and ends all that it started: ``python minder.py FOLDER COMMAND``.

It stays until the program ends, or until its own standard input does: that is when the run closes
it, and also when the run's process is gone, however it went. All processes that carry the folder's
name in their environment then end, the folder is removed. Only the standard library is imported,
so that it is there at once.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

MARK = "SPARSEKIT_ENGINE_FOLDER"
_PATIENCE_SECONDS = 30.0
_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


def processes_of(folder: Path) -> list[int]:
    """Return the numbers of the processes that were started with the folder's mark, but this."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def end_processes_of(folder: Path) -> None:
    """Kill them; again, for some may be starting others."""
    for _ in range(100):
        left = processes_of(folder)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit code, or 0 if it was told to end."""
    # Ended by the end of its input only: whoever is killed, this stays to tidy up.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    # Orphans become children of this process, which can then see them end.
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder, command = Path(arguments[0]), arguments[1:]
    child = subprocess.Popen(
        command,
        env=os.environ | {MARK: str(folder)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        restore_signals=True,
        preexec_fn=_listen_to_signals,
    )
    closed = threading.Event()

    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass
        closed.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while child.poll() is None and not closed.wait(0.1):
        pass
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE_SECONDS)
    code = 0 if closed.is_set() else child.returncode
    end_processes_of(folder)
    child.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _listen_to_signals() -> None:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
