"""Sites behind another framework: the server loop stays here, its messages take that road.

A program of the framework is started (`flare.py`, `flower.py`), and what it runs as its server
connects back over a bridge on 127.0.0.1 (`relay.py`). docs/adr/0007-engines-as-roads.md says why.
"""

import contextlib
import dataclasses
import hmac
import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsekit.errors import CodecError, RunError
from sparsekit.fed import messages
from sparsekit.fed.engines import framed, minder
from sparsekit.fed.engines.answers import UNTOLD, read_account
from sparsekit.fed.engines.base import Answered, Failure, Reply, ask_all
from sparsekit.fed.engines.framed import BrokenFrameError, Connection
from sparsekit.fed.engines.options import counters
from sparsekit.fed.engines.relay import MOST_BYTES
from sparsekit.fed.engines.submitted import BRIDGE_FILE, JOB_FILE

LOG_FILE = "engine.log"
INTERFACE_FILE = "interface.json"
_GREETING_SECONDS = 10.0
_GOODBYE_SECONDS = 5.0
# The framework's own deadline comes first.
_GRACE_SECONDS = 10.0
_END_SECONDS = 60.0


class RelayedEngine:
    """Starts a framework's program and sends every request through it.

    Parameters
    ----------
    program : str
        Module that starts the framework: run with a folder that holds ``job.json``.
    job : mapping
        What that program has to know.
    files : mapping of str to str
        Further files for the folder, by name.
    run : Path
        The run's folder; ``engine.log`` and ``interface.json`` go there.
    introduction : bytes
        The request that every site is sent first.
    sizes : mapping of str to int
        Scans of every site that must take part; the largest are asked first.
    workers : int
        How many sites work at a time.
    deadline : float
        Seconds within which a site must have replied.
    start_seconds : float
        Seconds within which the framework must be there with all its sites.
    interface : str
        Network interface whose bytes are noted for every exchange; none if empty.
    """

    travels = True
    # The framework has the sockets: what it adds to a message is not known.
    frame_bytes = None

    def __init__(
        self,
        program: str,
        job: Mapping[str, Any],
        files: Mapping[str, str],
        *,
        run: Path,
        introduction: bytes,
        sizes: Mapping[str, int],
        workers: int,
        deadline: float,
        start_seconds: float,
        interface: str = "",
    ) -> None:
        self._run, self._introduction, self._sizes = run, introduction, dict(sizes)
        self._deadline, self._start_seconds = deadline, start_seconds
        self._counters = counters(interface) if interface else None
        self._names: dict[str, str] = {}
        """What the framework calls each site."""
        self._connection: Connection | None = None
        self._waiting: dict[int, Future[Reply | Failure]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._exchanges: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="site")
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server((framed.HOST, 0))
        self.folder = Path(tempfile.mkdtemp(prefix="sparsekit-"))
        port = self._listener.getsockname()[1]
        written = {
            BRIDGE_FILE: json.dumps({"port": port, "secret": self._secret}),
            JOB_FILE: json.dumps(dict(job)),
            **files,
        }
        for name, text in written.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).touch(0o600)
            (self.folder / name).write_text(text, encoding="utf-8")
        with (run / LOG_FILE).open("ab") as log:
            self._child = subprocess.Popen(
                [
                    # Not with the folder of the file as the first place to import from.
                    *(sys.executable, "-P", minder.__file__, str(self.folder)),
                    *(sys.executable, "-m", program, str(self.folder)),
                ],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the server loop, which closes the engine.
                start_new_session=True,
            )

    def hello(self) -> dict[str, bytes]:
        """Wait for the framework and its sites and return the introductions.

        Raises
        ------
        RunError
            If one does not come, or two have the same name. Sites that nobody expects are left
            alone.
        """
        self._connection, engine_names = self._greet(time.monotonic() + self._start_seconds)
        threading.Thread(target=self._receive, args=(self._connection,), daemon=True).start()
        self._names = {name: name for name in engine_names}
        replies = ask_all(
            self._pool,
            self._ask,
            dict.fromkeys(engine_names, self._introduction),
            dict.fromkeys(engine_names, 0),
            lambda _: None,
        )
        hellos: dict[str, bytes] = {}
        others: list[str] = []
        for engine_name, reply in sorted(replies.items()):
            if isinstance(reply, Failure):
                others.append(f"{engine_name}: {reply.detail}")
                continue
            try:
                name = str(messages.unpack(reply.data).control.get("site"))
            except CodecError as error:
                others.append(f"{engine_name}: {error}")
                continue
            if name in hellos:
                raise RunError(f"sites: {self._names[name]} and {engine_name} both say {name!r}")
            if name not in self._sizes:
                others.append(f"{engine_name}: says that it is {name!r}")
                continue
            hellos[name], self._names[name] = bytes(reply.data), engine_name
        missing = [name for name in self._sizes if name not in hellos]
        if missing:
            said = "; ".join([*others, f"see {self._run / LOG_FILE}"])
            raise RunError(f"sites: {', '.join(missing)} did not come; {said}")
        return hellos

    def _greet(self, until: float) -> tuple[Connection, list[str]]:
        """Wait for the framework's server program; strangers on this machine are turned away."""
        self._listener.settimeout(0.2)
        while time.monotonic() < until:
            if self._child.poll() is not None:
                break
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection = Connection(sock)
            try:
                greeting = connection.receive(
                    most=1 << 20, until=time.monotonic() + _GREETING_SECONDS
                )
                secret, hello = greeting.data[:32], greeting.data[32:]
                if hmac.compare_digest(secret, self._secret.encode()):
                    return connection, [str(n) for n in messages.unpack(hello).control["sites"]]
            except (BrokenFrameError, CodecError, EOFError, OSError):
                pass
            connection.close()
        late = self._child.poll() is None
        why = f"was not ready within {self._start_seconds:g} s" if late else "ended"
        raise RunError(f"engine: the framework {why}; see {self._run / LOG_FILE}")

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        """Send each site its request, so many at a time."""
        before, start = self._count(), time.monotonic()
        replies = ask_all(self._pool, self._ask_told, requests, self._sizes, answered)
        if before is not None and (after := self._count()) is not None:
            row = {name: after[name] - before[name] for name in before}
            payload = {
                "request_bytes": sum(map(len, requests.values())),
                "reply_bytes": sum(len(r.data) for r in replies.values() if isinstance(r, Reply)),
            }
            self._exchanges.append(row | payload | {"seconds": time.monotonic() - start})
        return replies

    def _count(self) -> dict[str, int] | None:
        if self._counters is None:
            return None
        return {
            f"interface_{name}_bytes": int((self._counters / f"{short}_bytes").read_text())
            for name, short in (("sent", "tx"), ("received", "rx"))
        }

    def _ask_told(self, name: str, request: bytes) -> Reply | Failure:
        reply = self._ask(name, request)
        if isinstance(reply, Failure) and reply.detail == UNTOLD:
            # The framework has started the site again since the run began.
            told = self._ask(name, self._introduction)
            reply = told if isinstance(told, Failure) else self._ask(name, request)
        return reply

    def _ask(self, name: str, request: bytes) -> Reply | Failure:
        future: Future[Reply | Failure] = Future()
        number = next(self._numbers)
        control = {"number": number, "site": self._names[name], "seconds": self._deadline}
        with self._lock:
            connection = self._connection
            if connection is None:
                return Failure("dead", "the framework's server is gone", sent_bytes=0)
            self._waiting[number] = future
            try:
                head = messages.head(control, len(request))
                connection.send(framed.REQUEST, head, request)
            except OSError as error:
                del self._waiting[number]
                return Failure("dead", f"the framework's server is gone: {error}", sent_bytes=0)
        try:
            return future.result(self._deadline + _GRACE_SECONDS)
        except TimeoutError:
            with self._lock:
                self._waiting.pop(number, None)
            return Failure("late", f"no reply within {self._deadline:g} s")

    def _receive(self, connection: Connection) -> None:
        """Hand every answer to the one who waits for it."""
        broken = (BrokenFrameError, CodecError, EOFError, OSError, KeyError, ValueError)
        with contextlib.suppress(*broken):
            while (frame := connection.receive(most=MOST_BYTES)).kind != framed.BYE:
                message = messages.unpack(frame.data)
                with self._lock:
                    future = self._waiting.pop(int(message.control["number"]), None)
                if future is not None:
                    future.set_result(_reply(frame.kind, message))
        with self._lock:
            self._connection = None
            left = list(self._waiting.values())
            self._waiting.clear()
        for future in left:
            future.set_result(Failure("dead", "the framework's server is gone"))
        connection.close()

    def close(self) -> None:
        """Say goodbye and wait until nothing of the framework is left."""
        with self._lock:
            connection, busy = self._connection, bool(self._waiting)
        try:
            if connection is not None and not busy:
                with contextlib.suppress(OSError):
                    connection.send(framed.BYE, until=time.monotonic() + _GOODBYE_SECONDS)
                end = time.monotonic() + _GOODBYE_SECONDS
                while self._connection is not None and time.monotonic() < end:
                    time.sleep(0.01)
            if connection is not None:
                connection.close()
            self._listener.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
            if self._exchanges:
                self._note_exchanges(self._run / INTERFACE_FILE)
        finally:
            if self._child.stdin is not None:
                with contextlib.suppress(OSError):
                    self._child.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_SECONDS)
            self._child.kill()
            self._child.wait()
            minder.end_processes_of(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _note_exchanges(self, path: Path) -> None:
        before: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps([*before, *self._exchanges], indent=1) + "\n", encoding="utf-8")


def _reply(kind: int, message: messages.Message) -> Reply | Failure:
    control, data = message.control, message.payload
    if kind == framed.FAILURE:
        return Failure(str(control.get("outcome")), str(control.get("detail")))
    if data[:1] == bytes([framed.FAILURE]):
        return dataclasses.replace(read_account(data[1:]), received_bytes=0)
    if data[:1] != bytes([framed.REPLY]):
        return Failure("corrupt", "its answer is neither a reply nor an account of a failure")
    return Reply(data[1:], float(control.get("seconds", 0.0)))


def environment() -> dict[str, str]:
    """Return that of what is started: programs are found beside this Python, none calls home."""
    beside = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def site_files(
    cohort: str, run_folders: Mapping[str, Path], cache: Path, names: Sequence[str]
) -> dict[str, str]:
    """Return a TOML file for every site of this machine, by what the framework calls it."""
    return {
        f"sites/{engine_name}.toml": "".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
            for key, value in {
                "cohort": cohort,
                "site": site,
                "folder": str(folder.absolute()),
                "cache": str(cache.absolute()),
            }.items()
        )
        for engine_name, (site, folder) in zip(names, run_folders.items(), strict=True)
    }
