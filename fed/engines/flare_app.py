"""What NVIDIA FLARE runs: a server that passes bytes on, and a client that answers them.

FLARE copies this file into the job, but imports the installed package, which every site needs in
the same version.
"""

import threading
from pathlib import Path

from nvflare.collab import collab

from sparsekit.fed.engines.relay import serve
from sparsekit.fed.engines.site_app import SiteApp, find_site_file


class Server:
    """The job's server side.

    Parameters
    ----------
    bridge : str
        File of the run that the job is for.
    """

    def __init__(self, bridge: str) -> None:
        # FLARE finds the argument for the job's description by this name.
        self._bridge = bridge

    @collab.main
    def main(self) -> None:
        """Carry requests to the clients until the run is over."""
        clients = {client.name: client for client in collab.clients}

        def ask(site: str, request: bytes, seconds: float) -> bytes:
            answer = clients[site](timeout=seconds).answer(request)
            if not isinstance(answer, bytes):
                raise TypeError(f"expected bytes, got {type(answer).__name__}")
            return answer

        serve(Path(self._bridge), list(clients), ask)


class Client:
    """The job's client side, one for each site; it lives as long as the job."""

    def __init__(self) -> None:
        self._app: SiteApp | None = None
        self._opening = threading.Lock()

    @collab.publish
    def answer(self, request: bytes) -> bytes:
        """Return the site's answer to a request."""
        with self._opening:
            if self._app is None:
                self._app = SiteApp(find_site_file(client=collab.site_name))
        return self._app.answer(request)
