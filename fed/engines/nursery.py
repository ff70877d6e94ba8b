"""A process that has imported everything once, and forks the sites' processes from itself.

Each of them would need seconds and 150 MB of its own to import torch. They share both here, as long
as each works on one thread: the threads of OpenMP do not survive a fork, so that sites with more of
them start on their own (`sparsekit.fed.engines.processes`).

The server writes one line of JSON for each process that it wants and reads the number of that
process. The nursery ends with the server, whose end of the pipe is then closed, and the sites with
the nursery, which is their parent.
"""

import contextlib
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_MOST_LINE_BYTES = 1 << 16


def can_fork() -> bool:
    """Whether there are handles of processes: Linux before 5.3 and some sandboxes have none."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


class ForkedProcess:
    """A process that somebody else has started: what is needed of `subprocess.Popen`.

    Parameters
    ----------
    pid : int
        Its number; it may have ended already.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        # Unlike its number, this cannot come to mean another process.
        try:
            self._handle: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._handle = None

    def poll(self) -> int | None:
        """Return 0 if it has ended, however that was, and None while it runs."""
        return 0 if self._wait(0.0) else None

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; `subprocess.TimeoutExpired` if it has not in time."""
        if not self._wait(timeout):
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        return 0

    def kill(self) -> None:
        """Send SIGKILL if it runs."""
        if self._handle is not None:
            try:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            except ProcessLookupError:
                self._wait(0.0)

    def _wait(self, timeout: float | None) -> bool:
        if self._handle is None:
            return True
        poller = select.poll()
        poller.register(self._handle, select.POLLIN)
        if not poller.poll(None if timeout is None else timeout * 1000):
            return False
        os.close(self._handle)
        self._handle = None
        return True


class Nursery:
    """The server's side: starts the nursery when the first process is wanted.

    Parameters
    ----------
    run : Path
        Folder of the run, for those who look at the list of processes.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def fork(
        self, arguments: Sequence[str], environment: dict[str, str], log: Path
    ) -> ForkedProcess:
        """Start `site_process.main` with these arguments.

        Raises
        ------
        OSError
            If the nursery cannot be started, or has ended.
        """
        order = {"arguments": list(arguments), "environment": environment, "log": str(log)}
        line = json.dumps(order).encode() + b"\n"
        with self._lock:
            process = self._alive()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(_MOST_LINE_BYTES)
        if not answer.endswith(b"\n"):
            raise OSError("the process that starts the sites has ended")
        return ForkedProcess(int(answer))

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._let_go(self._process)
            self._process = None
        if self._process is None:
            with (self._run / "nursery.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "sparsekit.fed.engines.nursery", str(self._run)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
        return self._process

    def close(self, timeout: float) -> None:
        """End it, and with it every process that is left."""
        process, self._process = self._process, None
        if process is None:
            return
        self._let_go(process)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @staticmethod
    def _let_go(process: subprocess.Popen[bytes]) -> None:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                # Of a nursery that is gone: what was not written need not be.
                with contextlib.suppress(OSError):
                    stream.close()


def main() -> None:
    """Import what sites need, then fork one for each line."""
    site_main = _import_everything()
    # Nobody waits for the children here: the server watches them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := _read_line():
        order = json.loads(line)
        sys.stderr.flush()
        if (pid := os.fork()) == 0:
            _become_site(order, site_main)
        os.write(1, f"{pid}\n".encode())


def _import_everything() -> Callable[[list[str]], None]:
    import torch

    # So that no OpenMP threads exist before a fork.
    torch.set_num_threads(1)
    from sparsekit.fed.engines import site_process
    from sparsekit.fed.engines.site_process import SERVER
    from sparsekit.kernels.conv_norm_pool_relu import autograd as _blocks  # noqa: F401
    from sparsekit.kernels.masked_conv3d import autograd as _convolutions  # noqa: F401

    # Making an optimizer imports half of torch.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    os.environ[SERVER] = str(os.getpid())
    # What the collector does not touch stays shared.
    gc.collect()
    gc.freeze()
    return site_process.main


def _read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(0, _MOST_LINE_BYTES)
        if not piece:
            return b""
        line += piece
    return bytes(line)


def _become_site(order: dict[str, object], site_main: Callable[[list[str]], None]) -> None:
    """Be the site's process until the end; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(str(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(log)
        os.close(nothing)
        environment, arguments = order["environment"], order["arguments"]
        assert isinstance(environment, dict)
        assert isinstance(arguments, list)
        os.environ.update(environment)
        site_main(arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the loop of the parent is none of the child's business.
        os._exit(code)


if __name__ == "__main__":
    main()
