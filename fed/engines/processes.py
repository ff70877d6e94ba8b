"""A process for every site, and real TCP between them and the server, on this machine only."""

import contextlib
import dataclasses
import hmac
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsekit.errors import CodecError, RunError
from sparsekit.fed import messages
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.answers import read_account
from sparsekit.fed.engines.base import Answered, Failure, Reply, ask_all
from sparsekit.fed.engines.framed import BrokenFrameError, Connection, Counts
from sparsekit.fed.engines.nursery import ForkedProcess, Nursery, can_fork
from sparsekit.fed.engines.site_process import SECRET, SERVER, THREADS

_MOST_HELLO_BYTES = 1 << 16
_HELLO_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
# A process imports torch first, and many may do so on few cores.
_START_SECONDS, _START_SECONDS_EACH = 120.0, 10.0
# For one that lives and may be about to connect again.
_MOMENT_SECONDS = 1.0
SITE_COMMAND = (sys.executable, "-m", "sparsekit.fed.engines.site_process")
_NO_LOG = logging.Logger("sparsekit.fed.engines.processes")
_NO_LOG.addHandler(logging.NullHandler())


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
        Seconds within which a site must have replied. The process of one that has not is ended:
        sites keep nothing that they need from round to round, and a new one starts for the next.
    log : logging.Logger, optional
        Told when processes start and connections open and end.
    command : sequence of str, optional
        What a site's process runs; tests put one there that misbehaves.
    """

    travels = True
    frame_bytes = framed.FRAME_BYTES

    def __init__(
        self,
        sites: Sequence[SiteProcess],
        *,
        run: Path,
        cache: Path,
        threads: int,
        deadline: float,
        log: logging.Logger = _NO_LOG,
        command: Sequence[str] = SITE_COMMAND,
    ) -> None:
        self._sites = {site.name: site for site in sites}
        self._run, self._cache, self._deadline = run, cache, deadline
        self._log, self._command = log, tuple(command)
        self._start_seconds = _START_SECONDS + _START_SECONDS_EACH * len(sites)
        self._workers = max(1, min(threads, len(sites)))
        self._torch_threads = max(1, threads // self._workers)
        self._secret = secrets.token_hex(16)
        # OpenMP's threads do not survive a fork: sites that have several start on their own.
        forks = self._torch_threads == 1 and len(sites) > 1 and self._command == SITE_COMMAND
        self._nursery = Nursery(run) if forks and can_fork() else None
        self._children: dict[str, subprocess.Popen[bytes] | ForkedProcess] = {}
        self._connections: dict[str, Connection] = {}
        self._hellos: dict[str, bytes] = {}
        self._troubles: dict[str, str] = {}
        """Why a site has no connection, where more is known than that its process is gone."""
        self._busy: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self.closed: list[dict[str, Any]] = []
        """Bytes of every connection that has ended, ours and the operating system's."""
        self._listener = socket.create_server((framed.HOST, 0))
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
            name = missing[0]
            why = self._troubles.get(name, f"see {self._log_file(name)}")
            raise RunError(f"site {name}: its process did not introduce itself; {why}")
        return dict(self._hellos)

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        """Send each site its request, so many at a time; those that are gone are started again."""
        for name, connection in list(self._connections.items()):
            child = self._children.get(name)
            if child is not None and child.poll() is not None:
                self._drop(name, connection)
        self._start([name for name in requests if name not in self._connections])
        sizes = {name: self._sites[name].size for name in requests}
        return ask_all(self._pool, self._ask, requests, sizes, answered)

    def _ask(self, name: str, request: bytes) -> Reply | Failure:
        start = time.monotonic()
        until = start + self._deadline
        with self._changed:
            connection = self._connections.get(name)
            if connection is None:
                why = self._troubles.get(name, "its process is gone")
                return Failure("dead", why, sent_bytes=0, seconds=time.monotonic() - start)
            self._busy.add(name)
        sent, received = connection.sent, connection.received
        # A reply holds a model as the request does, coded in another way or not at all.
        most = 16 * len(request) + (1 << 24)
        try:
            connection.send(framed.REQUEST, request, until=until)
            frame = connection.receive(most=most, until=until)
            if frame.kind == framed.REPLY:
                return Reply(frame.data, time.monotonic() - start)
            if frame.kind == framed.FAILURE:
                received = connection.received - received
                return dataclasses.replace(
                    read_account(frame.data),
                    received_bytes=received,
                    seconds=time.monotonic() - start,
                )
            outcome, detail = "corrupt", f"it sent a frame of kind {frame.kind} as its reply"
        except TimeoutError:
            outcome, detail = "late", f"no reply within {self._deadline:g} s"
        except BrokenFrameError as error:
            outcome, detail = "corrupt", str(error)
        except (EOFError, OSError) as error:
            outcome, detail = "dead", f"its connection ended: {error}"
        finally:
            with self._changed:
                self._busy.discard(name)
        # What it still works on, or sends, belongs to no later round.
        seconds = time.monotonic() - start
        self._drop(name, connection)
        with contextlib.suppress(KeyError):
            self._children[name].kill()
        return Failure(
            outcome, detail, connection.sent - sent, connection.received - received, seconds
        )

    def _start(self, names: Sequence[str]) -> None:
        """Start the processes of sites that have none, and wait until all are connected."""
        ends = dict.fromkeys(names, time.monotonic() + _MOMENT_SECONDS)
        started: set[str] = set()
        while True:
            for name in names:
                child = self._children.get(name)
                gone = child is None or child.poll() is not None
                if gone and name not in started and name not in self._connections:
                    started.add(name)
                    self._spawn(self._sites[name])
                    ends[name] = time.monotonic() + self._start_seconds
            with self._changed:
                if not any(self._may_come(name, ends[name], started) for name in names):
                    return
                self._changed.wait(0.1)

    def _may_come(self, name: str, end: float, started: set[str]) -> bool:
        if name in self._connections or name in self._troubles or time.monotonic() >= end:
            return False
        child = self._children.get(name)
        return name not in started or (child is not None and child.poll() is None)

    def _spawn(self, site: SiteProcess) -> None:
        self._troubles.pop(site.name, None)
        own = {SECRET: self._secret, THREADS: str(self._torch_threads)}
        arguments = [
            *(str(self._run), str(self._cache), quote(site.name, safe="")),
            *(str(self._listener.getsockname()[1]), str(site.folder)),
        ]
        log_file = self._log_file(site.name)
        try:
            site.folder.mkdir(parents=True, exist_ok=True)
            if self._nursery is not None:
                child = self._nursery.fork(arguments, own, log_file)
                self._children[site.name] = child
            else:
                self._children[site.name] = self._popen(arguments, own, log_file)
        except OSError as error:
            self._troubles[site.name] = f"its process could not be started: {error}"
            return
        pid = self._children[site.name].pid
        self._log.info("%s: process %d started, see %s", site.name, pid, log_file)

    def _popen(
        self, arguments: Sequence[str], own: dict[str, str], log_file: Path
    ) -> subprocess.Popen[bytes]:
        with log_file.open("ab") as log:
            return subprocess.Popen(
                [*self._command, *arguments],
                env=os.environ | own | {SERVER: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the server, which says goodbye; the sites end with it.
                start_new_session=True,
            )

    def _log_file(self, name: str) -> Path:
        return self._sites[name].folder / "process.log"

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                # Out of files, perhaps only for now.
                time.sleep(0.05)
                continue
            # One that says nothing must not keep others waiting.
            try:
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            except RuntimeError:
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        until = time.monotonic() + _HELLO_SECONDS
        try:
            frame = connection.receive(most=_MOST_HELLO_BYTES, until=until)
            secret, hello = frame.data[: len(self._secret)], bytes(frame.data[len(self._secret) :])
            known = hmac.compare_digest(secret, self._secret.encode())
            name = str(messages.unpack(hello).control.get("site")) if known else ""
            if frame.kind != framed.HELLO or name not in self._sites:
                raise BrokenFrameError("no site of this run")
        except (BrokenFrameError, CodecError, EOFError, OSError):
            connection.close()
            return
        if self._hellos.get(name, hello) != hello:
            with self._changed:
                self._troubles[name] = "it introduces itself with other people than before"
                self._changed.notify_all()
            with contextlib.suppress(BrokenFrameError, EOFError, OSError):
                connection.send(framed.BYE, until=until)
                connection.receive(most=0, until=until)
            self._end(name, connection, in_order=False)
            return
        with self._changed:
            if self._closing:
                connection.close()
                return
            before = self._connections.pop(name, None)
            self._connections[name] = connection
            self._hellos[name] = hello
            self._changed.notify_all()
        self._log.info("%s: connected", name)
        if before is not None:
            self._end(name, before, in_order=False)

    def _drop(self, name: str, connection: Connection) -> None:
        with self._changed:
            if self._connections.get(name) is not connection:
                # Whoever took it away also ends it.
                return
            del self._connections[name]
        self._end(name, connection, in_order=False)

    def _end(self, name: str, connection: Connection, *, in_order: bool) -> None:
        try:
            counts = connection.counts(linger=in_order)
        except OSError:
            counts = Counts(connection.sent, connection.received, None, None)
        connection.close()
        row = {"site": name, "in_order": in_order, **dataclasses.asdict(counts)}
        with self._changed:
            self.closed.append(row)
        how = "in order" if in_order else "early"
        self._log.info(
            "%s: connection ended %s, %d bytes sent, %d received (operating system: %s, %s)",
            *(name, how, counts.sent, counts.received, counts.kernel_sent, counts.kernel_received),
        )

    def close(self) -> None:
        """Say goodbye, compare the counters, and end all processes."""
        with self._changed:
            self._closing = True
            connections = dict(self._connections)
            self._connections.clear()
            busy = set(self._busy)
        until = time.monotonic() + _GOODBYE_SECONDS
        try:
            # Closing alone would not wake the thread that waits for connections.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._acceptor.join()
            for name in sorted(connections.keys() & busy):
                # In the middle of a request: another thread reads from it.
                self._end(name, connections.pop(name), in_order=False)
                self._children[name].kill()
            asked = set()
            for name, connection in connections.items():
                with contextlib.suppress(OSError):
                    connection.send(framed.BYE, until=until)
                    asked.add(name)
            for name, connection in sorted(connections.items()):
                in_order = False
                if name in asked:
                    with contextlib.suppress(BrokenFrameError, EOFError, OSError):
                        in_order = connection.receive(most=0, until=until).kind == framed.BYE
                self._end(name, connection, in_order=in_order)
        finally:
            for connection in connections.values():
                connection.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._end_children(until)

    def _end_children(self, until: float) -> None:
        try:
            for child in self._children.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, until - time.monotonic()))
        finally:
            for child in self._children.values():
                child.kill()
                child.wait()
            if self._nursery is not None:
                self._nursery.close(max(1.0, until - time.monotonic()))
