"""What a site sends back over a connection: its answer, or an account of why there is none."""

from collections.abc import Callable

from sparsekit.codec.wire import Buffer
from sparsekit.errors import BaseMismatchError, CodecError, SparsekitError
from sparsekit.fed import messages
from sparsekit.fed.engines import framed
from sparsekit.fed.engines.base import STALE, Failure
from sparsekit.fed.site import Site

_OUTCOMES = ("corrupt", "dead", STALE)


def answer(site: Site, request: Buffer, abandoned: Callable[[], bool]) -> tuple[int, bytes]:
    """Let the site handle a request; return the kind of frame and its bytes."""
    try:
        return framed.REPLY, site.handle(request, abandoned)
    except BaseMismatchError as error:
        outcome, detail = STALE, str(error)
    except CodecError as error:
        outcome, detail = "corrupt", str(error)
    except (SparsekitError, OSError) as error:
        outcome, detail = "dead", str(error)
    return framed.FAILURE, account(outcome, detail)


UNTOLD = "it was not told what the run is about"
"""Detail of a failure: the request came before an introduction, which is to be sent again."""


def account(outcome: str, detail: str) -> bytes:
    """Return the bytes that `read_account` reads."""
    return messages.pack({"outcome": outcome, "detail": detail})


def read_account(data: Buffer) -> Failure:
    """Return the failure that a site, which may be hostile, tells of."""
    try:
        control = messages.unpack(data).control
        outcome, detail = control.get("outcome"), control.get("detail")
    except CodecError as error:
        return Failure("corrupt", str(error))
    if outcome not in _OUTCOMES or not isinstance(detail, str):
        return Failure("corrupt", "its account of a failure is not one")
    return Failure(str(outcome), detail)
