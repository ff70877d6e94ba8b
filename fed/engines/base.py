"""The contract between the server loop and whatever carries its messages."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Protocol

from sparsekit.codec.wire import Buffer

Answered = Callable[[str], None]
"""Called with a site's name as soon as its answer, or its failure, is known."""


@dataclass(frozen=True)
class Reply:
    """A site's answer and how long it took, in seconds."""

    data: Buffer
    seconds: float


STALE = "stale-base"
"""Outcome where the other end does not hold what a message leans on."""


@dataclass(frozen=True)
class Failure:
    """Why a site gave no usable answer; ``outcome`` is the ledger's word for it."""

    outcome: str
    detail: str
    sent_bytes: int | None = None
    """What of the request went out, with the engine's frame; None if all did."""
    received_bytes: int = 0
    """What came back all the same."""
    seconds: float = 0.0
    """From the request until the failure was known."""


class Engine(Protocol):
    """Carries bytes to sites and back; never looks inside them, never averages."""

    @property
    def travels(self) -> bool:
        """Whether messages would leave the machine of the data in a real federation."""
        ...

    @property
    def frame_bytes(self) -> int | None:
        """What the engine itself adds to each message on its way; None where it is not known."""
        ...

    def hello(self) -> dict[str, bytes]:
        """Return every site's introduction."""
        ...

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        """Send each site its request and return each site's reply or failure."""
        ...

    def close(self) -> None:
        """Stop all work and let go of all resources."""
        ...


def ask_all(
    pool: ThreadPoolExecutor,
    ask: Callable[[str, bytes], Reply | Failure],
    requests: Mapping[str, bytes],
    sizes: Mapping[str, int],
    answered: Answered,
) -> dict[str, Reply | Failure]:
    """Ask every site on a pool of threads, the largest first: none idles behind it at the end."""
    names = sorted(requests, key=lambda name: (-sizes[name], name))
    waiting = {pool.submit(ask, name, requests[name]): name for name in names}
    replies: dict[str, Reply | Failure] = {}
    for future in as_completed(waiting):
        replies[waiting[future]] = future.result()
        answered(waiting[future])
    return replies
