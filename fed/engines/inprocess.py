"""All sites in one process, several at a time on threads; every message is still made of bytes."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from sparsekit.errors import BaseMismatchError, CodecError, SparsekitError
from sparsekit.fed.engines.base import STALE, Answered, Failure, Reply, ask_all
from sparsekit.fed.site import Site


class InProcessEngine:
    """Runs the sites of one machine on a pool of threads.

    Parameters
    ----------
    sites : sequence of Site
        All sites of the federation.
    threads : int
        Total number of computing threads: this many sites work at a time, and what is left over
        goes to torch inside each.
    travels : bool
        False when the "sites" are one pooled data set, whose messages need not be sent.
    """

    frame_bytes = 0

    def __init__(self, sites: Sequence[Site], *, threads: int, travels: bool = True) -> None:
        self._sites = {site.data.name: site for site in sites}
        self._travels = travels
        self._stop = threading.Event()
        workers = max(1, min(threads, len(sites)))
        self._torch_threads = max(1, threads // workers)
        self._torch_threads_before = torch.get_num_threads()
        torch.set_num_threads(self._torch_threads)
        self._pool = ThreadPoolExecutor(
            workers,
            thread_name_prefix="site",
            initializer=torch.set_num_threads,
            initargs=(self._torch_threads,),
        )

    @property
    def travels(self) -> bool:
        """Whether messages would leave the machine of the data in a real federation."""
        return self._travels

    def hello(self) -> dict[str, bytes]:
        """Return every site's introduction."""
        return {name: site.hello() for name, site in self._sites.items()}

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        """Let every addressed site handle its request; a damaged request is that site's failure."""
        sizes = {name: len(self._sites[name].data.train) for name in requests}
        return ask_all(self._pool, self._ask, requests, sizes, answered)

    def _ask(self, name: str, request: bytes) -> Reply | Failure:
        start = time.perf_counter()
        try:
            data = self._sites[name].handle(request, self._stop.is_set)
        except BaseMismatchError as error:
            return Failure(STALE, str(error), seconds=time.perf_counter() - start)
        except CodecError as error:
            return Failure("corrupt", str(error), seconds=time.perf_counter() - start)
        except (SparsekitError, OSError) as error:
            return Failure("dead", str(error), seconds=time.perf_counter() - start)
        return Reply(data, time.perf_counter() - start)

    def close(self) -> None:
        """Ask working sites to stop after their current step, and wait for them."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads_before)
