"""The contract between the server loop and whatever carries its messages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

Answered = Callable[[str], None]
"""Called with a site's name as soon as its answer, or its failure, is known."""


@dataclass(frozen=True)
class Reply:
    """A site's answer and how long it took, in seconds."""

    data: bytes
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why a site gave no usable answer; ``outcome`` is the ledger's word for it."""

    outcome: str
    detail: str
    delivered: bool = True
    """Whether the request went out at all."""


class Engine(Protocol):
    """Carries bytes to sites and back; never looks inside them, never averages."""

    @property
    def travels(self) -> bool:
        """Whether messages would leave the machine of the data in a real federation."""
        ...

    @property
    def frame_bytes(self) -> int:
        """What the engine itself adds to each message on its way."""
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
