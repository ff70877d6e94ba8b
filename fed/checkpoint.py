"""The server's state on disk: one folder a round, given its name only when it is whole."""

import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.codec import decode, decode_masks, encode
from sparsekit.errors import CodecError, RunError
from sparsekit.fed.algorithm import ServerState
from sparsekit.fed.storage import about, publish_folder

_MODEL = "model.spu"
_SENT = "sent.spu"
_STATE = "state.json"
_LAYOUT = 2
_READINGS = 20


@dataclass(frozen=True)
class Checkpoint:
    """A resumable moment: server's state, rounds' history, ledger's length, sites' contents."""

    server: ServerState
    history: list[dict[str, Any]]
    ledger_bytes: int
    seconds: float
    contents: dict[str, str]


def _folder(run: Path, round_number: int) -> Path:
    return run / "checkpoints" / f"round-{round_number:05d}"


def resume_command(run: Path) -> str:
    """Return what to type to continue a run, ready to be pasted into a shell."""
    return f"`sparsekit fed resume {shlex.quote(str(run))}`"


def save(run: Path, checkpoint: Checkpoint, *, keep: int) -> None:
    """Store a checkpoint and remove all but the ``keep`` newest (0 keeps all)."""
    server = checkpoint.server
    final = _folder(run, server.round)
    temporary = final.with_name(f".{final.name}.tmp")
    with about(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(".*.tmp"):
            shutil.rmtree(leftover)
        try:
            temporary.mkdir()
            # One payload at a time in memory.
            (temporary / _MODEL).write_bytes(
                encode(server.weights, masks=server.masks, round=server.round)
            )
            if server.sent is not None:
                (temporary / _SENT).write_bytes(encode(server.sent, round=server.round))
            state = {
                "layout": _LAYOUT,
                "round": server.round,
                "masked": sorted(server.masks) if server.masks is not None else None,
                "sent": server.sent is not None,
                "mean_age": server.mean_age,
                "first_voxel": list(server.first_voxel),
                "in_shape": list(server.in_shape),
                "history": checkpoint.history,
                "ledger_bytes": checkpoint.ledger_bytes,
                "seconds": checkpoint.seconds,
                "contents": checkpoint.contents,
            }
            (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
            publish_folder(temporary, final)
        except OSError:
            # On a full disk the room is needed, and nothing half-written is worth keeping.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if keep:
            for old in saved_rounds(run)[:-keep]:
                # Renamed first: a kill in the middle must not leave half a checkpoint.
                folder = _folder(run, old)
                shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.tmp")))


def saved_rounds(run: Path) -> Sequence[int]:
    """Return the rounds that have a checkpoint, oldest first."""
    names = (folder.name for folder in (run / "checkpoints").glob("round-*"))
    return sorted(int(name[6:]) for name in names if re.fullmatch(r"round-\d{5,9}", name))


def newest_state(run: Path) -> dict[str, Any] | None:
    """Return what the newest checkpoint says beside the weights, also while others are written.

    Raises
    ------
    RunError
        If it is damaged.
    """
    readings = 0
    while rounds := saved_rounds(run):
        folder = _folder(run, rounds[-1])
        readings += 1
        try:
            state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            state["history"][-1]["round"]
            return state
        except FileNotFoundError as error:
            # A running server has removed it, and a newer one is there.
            if readings == _READINGS:
                raise _damaged(folder, error) from error
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise _damaged(folder, error) from error
    return None


def load_newest(run: Path) -> Checkpoint | None:
    """Return the newest checkpoint, None if there is none.

    Raises
    ------
    RunError
        If the newest one is damaged.
    """
    rounds = saved_rounds(run)
    return load(run, rounds[-1]) if rounds else None


def model_payload(run: Path, round_number: int) -> bytes:
    """Return the model of one of the `saved_rounds`, as it lies on the disk."""
    return (_folder(run, round_number) / _MODEL).read_bytes()


def load(run: Path, round_number: int) -> Checkpoint:
    """Return the checkpoint of one of the `saved_rounds`.

    Raises
    ------
    RunError
        If it is damaged.
    """
    folder = _folder(run, round_number)
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if state["layout"] != _LAYOUT:
            raise RunError(f"checkpoint: {folder} has layout {state['layout']}, expected {_LAYOUT}")
        payload = (folder / _MODEL).read_bytes()
        weights = decode(payload)
        kept = decode_masks(payload)
        masks = (
            None
            if state["masked"] is None
            else {n: kept[n] for n in weights if n in state["masked"]}
        )
        first_d, first_h, first_w = state["first_voxel"]
        depth, height, width = state["in_shape"]
        server = ServerState(
            round=state["round"],
            weights=weights,
            masks=masks,
            mean_age=state["mean_age"],
            first_voxel=(first_d, first_h, first_w),
            in_shape=(depth, height, width),
            sent=decode((folder / _SENT).read_bytes()) if state["sent"] else None,
        )
        return Checkpoint(
            server=server,
            history=state["history"],
            ledger_bytes=state["ledger_bytes"],
            seconds=state["seconds"],
            contents=state["contents"],
        )
    except (OSError, KeyError, TypeError, ValueError, CodecError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> RunError:
    return RunError(
        f"checkpoint: {folder} is damaged ({error}). Remove that folder to resume from the "
        "one before it, or start the run anew."
    )
