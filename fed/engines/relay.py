"""The end of a run's bridge that lies inside a framework's server: passes requests on to sites.

The server loop is a process of its own. It listens on 127.0.0.1 and leaves port and secret in a
file that only its user can read; whatever the framework starts as its server program connects
there, says which sites it sees, and then only carries bytes.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from sparsekit.codec.wire import Buffer
from sparsekit.fed import messages
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.framed import Connection

MOST_BYTES = 1 << 34

Ask = Callable[[str, bytes, float], bytes]
"""Sends a site, by the framework's name, a request and returns its answer within so many seconds.

`TimeoutError` means that the site is late, any other error that it is out of reach.
"""


def serve(bridge: Path, sites: Sequence[str], ask: Ask) -> None:
    """Carry requests until the run says goodbye or is gone.

    Parameters
    ----------
    bridge : Path
        The file of the run, with its port and its secret.
    sites : sequence of str
        What the framework calls the sites that are connected to it.
    ask : callable
        Carries one request; it is called from several threads.
    """
    info = json.loads(bridge.read_text(encoding="utf-8"))
    connection = Connection(socket.create_connection((framed.HOST, info["port"])))
    hello = messages.pack({"sites": list(sites)})
    connection.send(framed.HELLO, str(info["secret"]).encode() + hello)
    turn = threading.Lock()

    def carry(request: Buffer) -> None:
        message = messages.unpack(request)
        site, seconds = str(message.control["site"]), float(message.control["seconds"])
        start = time.monotonic()
        answer, told = b"", {}
        try:
            answer = ask(site, bytes(message.payload), seconds)
            # A reply holds a model as the request does, coded in another way or not at all.
            most = 16 * len(message.payload) + (1 << 24)
            if len(answer) > most:
                said = f"a reply of {len(answer)} bytes, at most {most} are taken"
                answer, told = b"", {"outcome": "corrupt", "detail": said}
        except TimeoutError:
            told = {"outcome": "late", "detail": f"no reply within {seconds:g} s"}
        except Exception as error:
            # A framework's errors are of many kinds; this site is out, the others are not.
            told = {"outcome": "dead", "detail": f"{type(error).__name__}: {error}"[:2000]}
        taken = {"number": message.control["number"], "seconds": time.monotonic() - start}
        head = messages.head(taken | told, len(answer))
        with turn, suppress(OSError):
            connection.send(framed.FAILURE if told else framed.REPLY, head, answer)

    pool = ThreadPoolExecutor(max(1, len(sites)), thread_name_prefix="site")
    try:
        while True:
            frame = connection.receive(most=MOST_BYTES)
            if frame.kind == framed.BYE:
                with turn:
                    connection.send(framed.BYE)
                return
            if frame.kind == framed.REQUEST:
                pool.submit(carry, frame.data)
    except (EOFError, OSError):
        return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        connection.close()
