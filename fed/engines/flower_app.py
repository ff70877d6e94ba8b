"""What Flower runs: a ServerApp that passes bytes on, and a ClientApp that answers them.

The Flower app that `flower.py` submits holds nothing but the names of both; sparsekit itself must
be installed at every site, in the same version.
"""

import threading
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sparsekit.fed.engines.relay import serve
from sparsekit.fed.engines.site_app import SiteApp, find_site_file, is_introduction
from sparsekit.fed.engines.submitted import BRIDGE_FILE, read_job

_SITE_KEY = "site-file"  # in a SuperNode's configuration
_RECORD, _KEY, _KIND, _INTRODUCTION = "bytes", "data", "sparsekit", "introduction"
_POLL_SECONDS = 0.2
# One line each: Flower looks for the names before it imports this.
server = ServerApp()
client = ClientApp()


@server.main()
def run_server(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then carry requests to them until the run is over."""
    folder = Path(str(context.run_config["folder"]))
    job = read_job(folder)
    end = time.monotonic() + job["start_seconds"]
    # Of those who do not come in time, the run hears by the list that it gets.
    while len(nodes := {str(node): node for node in grid.get_node_ids()}) < len(job["names"]):
        if time.monotonic() > end:
            break
        time.sleep(_POLL_SECONDS)
    turn = threading.Lock()

    def ask(site: str, request: bytes, seconds: float) -> bytes:
        content, until = _record(request), time.monotonic() + seconds
        kind = MessageType.QUERY
        message = Message(content, dst_node_id=nodes[site], message_type=kind, ttl=seconds)
        with turn:
            (number,) = grid.push_messages([message])
        # Flower's own `send_and_receive` looks every 3 seconds.
        while time.monotonic() < until:
            with turn:
                replies = list(grid.pull_messages([number]))
            if replies:
                return _bytes_of(replies[0])
            time.sleep(_POLL_SECONDS)
        raise TimeoutError

    serve(folder / BRIDGE_FILE, list(nodes), ask)


@client.query()
def answer(message: Message, context: Context) -> Message:
    """Return the site's answer to a request; Flower starts a new process for each."""
    app = SiteApp(find_site_file(str(context.node_config.get(_SITE_KEY, ""))), keeps_model=True)
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
