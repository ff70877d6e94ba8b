"""Choices of tiles that were timed: whether that is wanted, and the file that keeps them.

Off unless the environment variable SPARSEKIT_AUTOTUNE is 1: the committed tiles and the model need
no device to choose, and choose alike in every process.
"""

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

VARIABLE = "SPARSEKIT_AUTOTUNE"
"""Environment variable that turns it on with the value 1."""

_lock = threading.Lock()
_forbidden: list[str] = []
Choices = dict[str, dict[str, Any]]


def why_off() -> str:
    """Say why nothing is timed, and no timed choice is used; empty if it is on."""
    if os.environ.get(VARIABLE) != "1":
        return f"{VARIABLE}=1 turns it on"
    reasons = tuple(_forbidden)
    if reasons:
        return reasons[0]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Each process would find other tiles, and wait for the others while it does.
        return "never within torch.distributed"
    return ""


@contextmanager
def forbidden(why: str) -> Iterator[None]:
    """Keep it off meanwhile, in all threads: backward passes run in torch's own."""
    _forbidden.append(why)
    try:
        yield
    finally:
        _forbidden.remove(why)


def path() -> Path:
    """The file, in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "sparsekit" / "autotune.json"


def read(versions: Mapping[str, str]) -> Choices:
    """Choices that were made with these versions; none if the file is of others.

    Warns about a file that cannot be read, or is damaged, and returns none.
    """
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        kept = found["choices"]
        if not isinstance(kept, dict) or not all(isinstance(c, dict) for c in kept.values()):
            raise TypeError("choices are no objects")
        return kept if found["versions"] == dict(versions) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path()} holds no timed tiles that can be read ({error}); it is ignored, and "
            "the next timing writes it anew",
            stacklevel=2,
        )
        return {}


def keep(versions: Mapping[str, str], key: str, choice: dict[str, Any]) -> None:
    """Add a choice to the file, which is whole at any moment; warns if it cannot be written."""
    with _lock:
        with warnings.catch_warnings():
            # Who reads warns; this replaces it.
            warnings.simplefilter("ignore")
            choices = read(versions)
        text = json.dumps(
            {"versions": dict(versions), "choices": choices | {key: choice}}, indent=1
        )
        target = path()
        temporary = ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".autotune-")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            # Another process may have added one meanwhile: it times that again.
            os.replace(temporary, target)
        except OSError as error:
            if temporary:
                with suppress(OSError):
                    os.unlink(temporary)
            warnings.warn(f"timed tiles are not kept: {target}: {error}", stacklevel=2)


def count() -> int:
    """How many choices the file holds, of whatever versions; 0 if it cannot be read."""
    try:
        return len(json.loads(path().read_text(encoding="utf-8"))["choices"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _after_fork() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
