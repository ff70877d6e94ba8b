"""Writing so that a reader finds either the whole old file or the whole new one."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, wait for the disk, then rename it into place.

    Raises
    ------
    OSError
        If that fails; it names ``path``, which is as it was, and no temporary is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with about(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporaries of writers that were killed; none may be at work in ``folder``."""
    for leftover in folder.rglob(".*.tmp"):
        if leftover.is_file():
            with suppress(FileNotFoundError):
                leftover.unlink()


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Let an error of the operating system name ``path``: a full disk names no file at all."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def publish_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name; one of that name is replaced."""
    for file in temporary.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    _sync_folder(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
