"""The process of one site, ``python -m sparsekit.fed.engines.site_process`` or forked by a nursery.

It reads its scans, introduces itself to the server and answers until it is told goodbye. A lost
connection is opened again, as long as the process lives that started this one. The run's secret,
which keeps strangers on this machine out, comes through the environment.
"""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import torch

from sparsekit.errors import BaseMismatchError, CodecError, SparsekitError
from sparsekit.fed import messages
from sparsekit.fed.config import load_config_file, make_config
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.base import STALE
from sparsekit.fed.engines.framed import BrokenFrameError, Connection
from sparsekit.fed.prepare import prepare_sites
from sparsekit.fed.site import Site
from sparsekit.fed.training import Cancelled
from sparsekit.fed.watching import line_format

SECRET, THREADS = "SPARSEKIT_RUN_SECRET", "SPARSEKIT_SITE_THREADS"
SERVER = "SPARSEKIT_SERVER_PID"
MOST_REQUEST_BYTES = 1 << 34
_RETRY_SECONDS = 0.2
_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Serve one site until the server says goodbye or is gone."""
    _log_to_stderr()
    run, cache, name = Path(arguments[0]), Path(arguments[1]), unquote(arguments[2])
    port = int(arguments[3])
    # Not the parent of this moment: while torch was imported, the server may have gone.
    server = int(os.environ[SERVER])
    torch.set_num_threads(int(os.environ[THREADS]))
    config = make_config(load_config_file(run / "config.toml"))
    prepared = prepare_sites(config, cache)
    (people,) = [one for one in prepared.sites if one.name == name]
    folder = Path(arguments[4])
    site = Site(people, folder=folder, device=config.device)
    hello = os.environ[SECRET].encode() + site.hello()
    text = "%s, process %d: %d scans to train on, %d held out"
    _log.info(text, name, os.getpid(), len(people.train), len(people.test))
    while os.getppid() == server:
        try:
            connection = Connection(socket.create_connection((framed.HOST, port)))
            connection.send(framed.HELLO, hello)
            if _serve(site, connection, lambda: os.getppid() != server):
                _log.info("the server said goodbye")
                return
            _log.warning("the connection ended; trying again while the server lives")
        except (OSError, EOFError, BrokenFrameError) as error:
            _log.warning("no connection: %s", error)
        except Cancelled:
            break
        time.sleep(_RETRY_SECONDS)
    _log.warning("the server is gone")


def _serve(site: Site, connection: Connection, abandoned: Callable[[], bool]) -> bool:
    """Answer requests; True once the server has said goodbye."""
    try:
        while True:
            frame = connection.receive(most=MOST_REQUEST_BYTES)
            if frame.kind == framed.BYE:
                connection.send(framed.BYE)
                # The server closes first, when it has read the counters.
                with contextlib.suppress(EOFError):
                    connection.receive(most=0)
                return True
            if frame.kind != framed.REQUEST:
                return False
            start = time.monotonic()
            kind, data = _answer(site, frame.data, abandoned)
            seconds = time.monotonic() - start
            sizes = len(frame.data), len(data)
            _log.info("request of %d bytes, answer of %d bytes after %.3f s", *sizes, seconds)
            connection.send(kind, data)
    except EOFError:
        return False
    finally:
        connection.close()


def _answer(site: Site, request: bytes, abandoned: Callable[[], bool]) -> tuple[int, bytes]:
    try:
        return framed.REPLY, site.handle(request, abandoned)
    except BaseMismatchError as error:
        outcome, detail = STALE, str(error)
    except CodecError as error:
        outcome, detail = "corrupt", str(error)
    except (SparsekitError, OSError) as error:
        outcome, detail = "dead", str(error)
    _log.warning("%s: %s", outcome, detail)
    return framed.FAILURE, messages.pack({"outcome": outcome, "detail": detail})


def _log_to_stderr() -> None:
    """The server has put the site's process.log there."""
    handler = logging.StreamHandler()
    handler.setFormatter(line_format())
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


if __name__ == "__main__":
    main(sys.argv[1:])
