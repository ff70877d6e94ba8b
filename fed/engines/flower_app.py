"""What Flower runs: a ServerApp that passes bytes on, and a ClientApp that answers them.

The Flower app that `flower.py` submits holds nothing but the names of both; sparsekit itself must
be installed at every site, in the same version.
"""

import os
import threading
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sparsekit.errors import UsageError
from sparsekit.fed.engines.relay import serve
from sparsekit.fed.engines.site_app import SITE_FILE, SiteApp, is_introduction

BRIDGE, NODES, START_SECONDS = "bridge", "nodes", "start-seconds"
"""Names of the run's settings."""
SITE_KEY = "site-file"
"""Name in a SuperNode's configuration."""

_RECORD, _KEY, _KIND = "bytes", "data", "sparsekit"
_INTRODUCTION = "introduction"
_POLL_SECONDS = 0.2

server = ServerApp()
client = ClientApp()


@server.main()
def run_server(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then carry requests to them until the run is over."""
    settings = context.run_config
    wanted = int(settings[NODES])
    end = time.monotonic() + float(settings[START_SECONDS])
    while len(nodes := {str(node): node for node in grid.get_node_ids()}) < wanted:
        if time.monotonic() > end:
            # The run sees who is missing from the list that it gets.
            break
        time.sleep(_POLL_SECONDS)
    turn = threading.Lock()

    def ask(site: str, request: bytes, seconds: float) -> bytes:
        message = Message(
            _record(request), dst_node_id=nodes[site], message_type=MessageType.QUERY, ttl=seconds
        )
        until = time.monotonic() + seconds
        with turn:
            (number,) = grid.push_messages([message])
        while time.monotonic() < until:
            with turn:
                replies = list(grid.pull_messages([number]))
            if replies:
                return _bytes_of(replies[0])
            time.sleep(_POLL_SECONDS)
        raise TimeoutError

    serve(Path(str(settings[BRIDGE])), list(nodes), ask)


@client.query()
def answer(message: Message, context: Context) -> Message:
    """Return the site's answer to a request; Flower starts a new process for each."""
    given = str(context.node_config.get(SITE_KEY) or os.environ.get(SITE_FILE) or "")
    if not given:
        raise UsageError(f"{SITE_KEY}: start the SuperNode with --node-config '{SITE_KEY}=\"...\"'")
    app = SiteApp(Path(given), keeps_model=True)
    request = _bytes_of(message)
    if is_introduction(request):
        context.state[_INTRODUCTION] = ConfigRecord({_KEY: request})
    elif _INTRODUCTION in context.state:
        known = context.state.config_records[_INTRODUCTION][_KEY]
        assert isinstance(known, bytes)
        app.answer(known)
    return Message(_record(app.answer(request)), reply_to=message)


def _record(data: bytes) -> RecordDict:
    # An array travels in pieces; the values of other records do not.
    return RecordDict({_RECORD: ArrayRecord({_KEY: Array("bytes", (len(data),), _KIND, data)})})


def _bytes_of(message: Message) -> bytes:
    if message.has_error():
        raise RuntimeError(f"Flower error {message.error.code}: {message.error.reason}")
    return bytes(message.content.array_records[_RECORD][_KEY].data)
