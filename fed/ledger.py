"""The run's account of bytes and FLOPs: one JSON object a line, appended as things happen."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import RunError
from sparsekit.fed.messages import FRAMING_BYTES
from sparsekit.fed.storage import about

OUTCOME_OK = "ok"


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One message, or the lack of it.

    Attributes
    ----------
    round : int
        1..rounds; 0 for the introduction, rounds + 1 for handing out the final model.
    client : str
        The site.
    direction : str
        ``"down"`` to the site, ``"up"`` from it.
    outcome : str
        ``"ok"``, or why the message did not count: corrupt, stale-base, shape, nan, norm,
        wrong-round, dead, late.
    seconds : float
        For ``up``: from the request until the reply, or until its absence was known; for
        ``down``: 0.
    dense_equivalent_bytes : int
        4 bytes for each weight of the model, what an uncompressed float32 message would carry.
    payload_bytes, control_bytes, framing_bytes, transport_bytes : int
        The codec's bytes, our other bytes, the message headers, and their sum. All are 0 in a
        centralized run, where nothing has to travel.
    kernel_bytes : int or None
        What the operating system counted on the socket; None where there is none.
    flops_counted, flops_executed : int
        Of the training behind this message: as the masks allow, and as the kernels really did.
    """

    round: int
    client: str
    direction: str
    outcome: str
    seconds: float
    dense_equivalent_bytes: int
    payload_bytes: int
    control_bytes: int
    framing_bytes: int
    transport_bytes: int
    kernel_bytes: int | None
    flops_counted: int
    flops_executed: int


def message_row(
    *,
    round_number: int,
    client: str,
    direction: str,
    outcome: str,
    dense_equivalent_bytes: int,
    message_bytes: int,
    payload_bytes: int,
    travels: bool,
    frame_bytes: int = 0,
    carried_bytes: int | None = None,
    seconds: float = 0.0,
    flops_counted: int = 0,
    flops_executed: int = 0,
) -> LedgerRow:
    """Split a packed message of ``message_bytes`` into its named levels.

    Of one that was cut off ``carried_bytes`` travelled, the engine's frame with them; a message
    ends with its payload.
    """
    # No message, no frame: a site that is gone sends neither.
    whole = frame_bytes + message_bytes if message_bytes else 0
    total = whole if carried_bytes is None else carried_bytes
    payload = max(0, payload_bytes - max(0, whole - total))
    framing = min(total, frame_bytes + FRAMING_BYTES)
    if not travels:
        total = payload = framing = 0
    return LedgerRow(
        round=round_number,
        client=client,
        direction=direction,
        outcome=outcome,
        seconds=seconds,
        dense_equivalent_bytes=dense_equivalent_bytes if travels else 0,
        payload_bytes=payload,
        control_bytes=total - framing - payload,
        framing_bytes=framing,
        transport_bytes=total,
        kernel_bytes=None,
        flops_counted=flops_counted,
        flops_executed=flops_executed,
    )


class Ledger:
    """Appends rows to a file; a resumed run first cuts off what its checkpoint does not know.

    Parameters
    ----------
    path : Path
        The JSONL file; made when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    @property
    def size_bytes(self) -> int:
        """Length of the file: the mark that a checkpoint stores."""
        return self.path.stat().st_size

    def append(self, rows: Iterable[LedgerRow]) -> None:
        """Write rows and wait until the disk has them."""
        text = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        with about(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    def truncate(self, size_bytes: int) -> None:
        """Cut the file back to a checkpoint's mark.

        Raises
        ------
        RunError
            If the file is shorter than the mark.
        """
        if self.size_bytes < size_bytes:
            raise RunError(
                f"ledger: {self.path} has {self.size_bytes} bytes, its checkpoint expects "
                f"{size_bytes}: the file was changed. Start the run anew in another folder."
            )
        os.truncate(self.path, size_bytes)

    def __iter__(self) -> Iterator[LedgerRow]:
        return self._rows(torn=False)

    def whole_rows(self) -> Iterator[LedgerRow]:
        """Yield the rows but for a last line without an end: one that is being written, or was."""
        return self._rows(torn=True)

    def _rows(self, *, torn: bool) -> Iterator[LedgerRow]:
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if torn and not line.endswith(b"\n"):
                    return
                try:
                    values: dict[str, Any] = json.loads(line.decode("utf-8"))
                    yield LedgerRow(**values)
                except (ValueError, TypeError) as error:
                    raise RunError(f"ledger: {self.path} line {number}: {error}") from None
