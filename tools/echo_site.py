"""A site that sends every message back as it came: ``python tools/echo_site.py PORT NAME``.

For measurements of what lies between server and site, without any local work.
"""

import os
import socket
import sys

from sparsekit.fed import messages
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.framed import Connection
from sparsekit.fed.engines.site_process import MOST_REQUEST_BYTES, SECRET


def main(port: int, name: str) -> None:
    """Serve until the server says goodbye."""
    connection = Connection(socket.create_connection((framed.HOST, port)))
    hello = messages.pack({"site": name})
    connection.send(framed.HELLO, os.environ[SECRET].encode() + hello)
    while (frame := connection.receive(most=MOST_REQUEST_BYTES)).kind == framed.REQUEST:
        connection.send(framed.REPLY, frame.data)
    connection.send(framed.BYE)
    try:
        # The server closes first, when it has read the counters.
        connection.receive(most=0)
    except EOFError:
        connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
