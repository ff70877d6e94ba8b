"""The process of one site: ``python -m sparsekit.fed.engines.site_process``, started by the server.

It reads its scans, introduces itself to the server and answers until it is told goodbye. A lost
connection is opened again, as long as the server's process lives. The run's secret, which keeps
strangers on this machine out, comes through the environment.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import torch

from sparsekit.fed.config import load_config_file, make_config
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.answers import answer
from sparsekit.fed.engines.framed import BrokenFrameError, Connection
from sparsekit.fed.prepare import prepare_sites
from sparsekit.fed.site import Site
from sparsekit.fed.training import Cancelled

SECRET, THREADS = "SPARSEKIT_RUN_SECRET", "SPARSEKIT_SITE_THREADS"
SERVER = "SPARSEKIT_SERVER_PID"
MOST_REQUEST_BYTES = 1 << 34
_RETRY_SECONDS = 0.2


def main(arguments: list[str]) -> None:
    """Serve one site until the server says goodbye or is gone."""
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
    while os.getppid() == server:
        try:
            connection = Connection(socket.create_connection((framed.HOST, port)))
            connection.send(framed.HELLO, hello)
            if _serve(site, connection, lambda: os.getppid() != server):
                return
        except (OSError, EOFError, BrokenFrameError):
            pass
        except Cancelled:
            return
        time.sleep(_RETRY_SECONDS)


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
            kind, data = answer(site, frame.data, abandoned)
            connection.send(kind, data)
    except EOFError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1:])
