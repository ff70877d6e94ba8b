"""A site that only echoes, for timing the engine: RUN CACHE SITE PORT FOLDER, as a real one.

A request that begins with ``wait`` gets no answer.
"""

import os
import socket
import sys
import threading
from contextlib import suppress
from urllib.parse import unquote

from sparsekit.fed import messages
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.framed import Connection
from sparsekit.fed.engines.site_process import SECRET


def main() -> None:
    """Echo until the server says goodbye."""
    name, port = unquote(sys.argv[3]), int(sys.argv[4])
    connection = Connection(socket.create_connection((framed.HOST, port)))
    connection.send(framed.HELLO, os.environ[SECRET].encode() + messages.pack({"site": name}))
    with suppress(EOFError):
        while (frame := connection.receive(most=1 << 30)).kind == framed.REQUEST:
            if frame.data.startswith(b"wait"):
                threading.Event().wait()
            connection.send(framed.REPLY, frame.data)
        connection.send(framed.BYE)
        connection.receive(most=0)


if __name__ == "__main__":
    main()
