"""A process for every site, and real TCP between them and the server, on this machine only."""

import contextlib
import dataclasses
import hmac
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from sparsekit.errors import CodecError, RunError
from sparsekit.fed import messages
from sparsekit.fed.engines.base import Answered, Failure, Reply
from sparsekit.fed.engines.framed import (
    BYE,
    FAILURE,
    FRAME_BYTES,
    HELLO,
    HOST,
    REPLY,
    REQUEST,
    BrokenFrameError,
    Connection,
    Counts,
)
from sparsekit.fed.engines.site_process import SECRET, THREADS

_MOST_HELLO_BYTES = 1 << 16
_HELLO_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
_MOMENT_SECONDS = 1.0
_OUTCOMES = ("corrupt", "dead")


@dataclasses.dataclass(frozen=True)
class SiteProcess:
    """What the process of a site is started with."""

    name: str
    size: int
    """Training scans; the largest sites are asked first."""
    folder: Path


class ProcessesEngine:
    """Starts the sites' processes, and carries each request and reply over its connection.

    Parameters
    ----------
    sites : sequence of SiteProcess
    run, cache : Path
        Folder of the run, with its settings, and of the prepared scans.
    threads : int
        Total number of computing threads: this many sites work at a time, and what is left over
        goes to torch inside each.
    deadline : float
        Seconds within which a site must have replied; the connection of one that has not is
        closed.
    start_seconds : float
        Within which a new process must have introduced itself.
    """

    travels = True
    frame_bytes = FRAME_BYTES

    def __init__(
        self,
        sites: Sequence[SiteProcess],
        *,
        run: Path,
        cache: Path,
        threads: int,
        deadline: float,
        start_seconds: float = 120.0,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._run, self._cache = run, cache
        self._deadline, self._start_seconds = deadline, start_seconds
        self._workers = max(1, min(threads, len(sites)))
        self._torch_threads = max(1, threads // self._workers)
        self._secret = secrets.token_hex(16)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._connections: dict[str, Connection] = {}
        self._hellos: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._closing = False
        self.closed: list[dict[str, Any]] = []
        """Bytes of every connection that has ended, ours and the operating system's."""
        self._listener = socket.create_server((HOST, 0))
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="site")
        self._acceptor = threading.Thread(target=self._accept, name="acceptor", daemon=True)
        self._acceptor.start()

    def hello(self) -> dict[str, bytes]:
        """Start every site's process and return the introductions.

        Raises
        ------
        RunError
            If one does not come.
        """
        self._start(list(self._sites))
        missing = [name for name in self._sites if name not in self._connections]
        if missing:
            log = self._log(missing[0])
            raise RunError(
                f"site {missing[0]}: its process did not introduce itself within "
                f"{self._start_seconds:.0f} s; see {log}"
            )
        return dict(self._hellos)

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        """Send each site its request, so many at a time; those that are gone are started again."""
        self._start([name for name in requests if name not in self._connections])
        names = sorted(requests, key=lambda name: (-self._sites[name].size, name))
        futures: dict[Future[Reply | Failure], str] = {
            self._pool.submit(self._ask, name, requests[name]): name for name in names
        }
        replies: dict[str, Reply | Failure] = {}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                replies[futures[future]] = future.result()
                answered(futures[future])
        return replies

    def _ask(self, name: str, request: bytes) -> Reply | Failure:
        start = time.monotonic()
        until = start + self._deadline
        with self._changed:
            connection = self._connections.get(name)
        if connection is None:
            return Failure("dead", "its process is gone", delivered=False)
        # A reply holds a model as the request does, coded in another way or not at all.
        most = 16 * len(request) + (1 << 24)
        try:
            connection.send(REQUEST, request, until=until)
            frame = connection.receive(most=most, until=until)
            if frame.kind == REPLY:
                return Reply(frame.data, time.monotonic() - start)
            if frame.kind == FAILURE:
                return _failure(frame.data)
            failure = Failure("corrupt", f"it sent a frame of kind {frame.kind} as its reply")
        except TimeoutError:
            failure = Failure("late", f"no reply within {self._deadline:g} s")
        except BrokenFrameError as error:
            failure = Failure("corrupt", str(error))
        except (EOFError, OSError) as error:
            failure = Failure("dead", f"its connection ended: {error}")
        # Whatever still comes on it belongs to no later round.
        self._drop(name, connection)
        return failure

    def _start(self, names: Sequence[str]) -> None:
        """Start the processes of sites that have none, and wait until all are connected.

        One that lives without a connection is busy with an old request: it gets a moment only.
        """
        end = time.monotonic() + _MOMENT_SECONDS
        for name in names:
            child = self._children.get(name)
            if child is None or child.poll() is not None:
                self._children[name] = self._spawn(self._sites[name])
                end = time.monotonic() + self._start_seconds
        with self._changed:
            while missing := [name for name in names if name not in self._connections]:
                alive = any(self._children[name].poll() is None for name in missing)
                if not alive or time.monotonic() >= end:
                    return
                self._changed.wait(0.1)

    def _spawn(self, site: SiteProcess) -> "subprocess.Popen[bytes]":
        site.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {SECRET: self._secret, THREADS: str(self._torch_threads)}
        port = str(self._listener.getsockname()[1])
        with self._log(site.name).open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "sparsekit.fed.engines.site_process"),
                    *(str(self._run), str(self._cache), site.name, port, str(site.folder)),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the server, which says goodbye; the sites end with it.
                start_new_session=True,
            )

    def _log(self, name: str) -> Path:
        return self._sites[name].folder / "process.log"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            # One that says nothing must not keep others waiting.
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        try:
            frame = connection.receive(
                most=_MOST_HELLO_BYTES, until=time.monotonic() + _HELLO_SECONDS
            )
            secret, hello = frame.data[: len(self._secret)], frame.data[len(self._secret) :]
            known = hmac.compare_digest(secret, self._secret.encode())
            name = str(messages.unpack(hello).control.get("site")) if known else ""
            if frame.kind != HELLO or name not in self._sites:
                raise BrokenFrameError("no site of this run")
            if self._hellos.get(name, hello) != hello:
                raise BrokenFrameError("it introduces itself with other people than before")
        except (BrokenFrameError, CodecError, EOFError, OSError):
            connection.close()
            return
        with self._changed:
            if self._closing:
                connection.close()
                return
            before = self._connections.pop(name, None)
            self._connections[name] = connection
            self._hellos[name] = hello
            self._changed.notify_all()
        if before is not None:
            self._end(name, before, in_order=False)

    def _drop(self, name: str, connection: Connection) -> None:
        with self._changed:
            if self._connections.get(name) is connection:
                del self._connections[name]
        self._end(name, connection, in_order=False)

    def _end(self, name: str, connection: Connection, *, in_order: bool) -> None:
        try:
            counts = connection.counts()
        except OSError:
            counts = Counts(connection.sent, connection.received, None, None)
        connection.close()
        row = {"site": name, "in_order": in_order, **dataclasses.asdict(counts)}
        with self._changed:
            self.closed.append(row)

    def close(self) -> None:
        """Say goodbye, compare the counters, and end all processes."""
        with self._changed:
            self._closing = True
            connections = dict(self._connections)
            self._connections.clear()
        # Closing alone would not wake the thread that waits for connections.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        for name, connection in sorted(connections.items()):
            until = time.monotonic() + _GOODBYE_SECONDS
            in_order = False
            try:
                connection.send(BYE, until=until)
                in_order = connection.receive(most=0, until=until).kind == BYE
            except (BrokenFrameError, EOFError, OSError):
                pass
            self._end(name, connection, in_order=in_order)
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in self._children.values():
            try:
                child.wait(_GOODBYE_SECONDS if child.poll() is None else 0)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _failure(data: bytes) -> Failure:
    try:
        control = messages.unpack(data).control
        outcome, detail = control.get("outcome"), control.get("detail")
    except CodecError as error:
        return Failure("corrupt", str(error))
    if outcome not in _OUTCOMES or not isinstance(detail, str):
        return Failure("corrupt", "its account of a failure is not one")
    return Failure(str(outcome), detail)
