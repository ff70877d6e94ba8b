"""The folder in which a cohort grows, kept when the making is cut short."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsekit.errors import CohortError, UsageError
from sparsekit.fed.cohort.make.bids import is_whole_scan, read_settings


def partial_folder(root: Path) -> Path:
    """Name the hidden folder beside ``root`` that becomes it at the end."""
    final = root.absolute()
    return final.parent / f".{final.name}.partial"


def kept_scans(root: Path) -> int:
    """Count the scans that an earlier, unfinished making left."""
    return sum(1 for _ in partial_folder(root).glob("sub-*/anat/*.nii.gz"))


@contextmanager
def growing_folder(root: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Give the unfinished folder, old or new, and rename it to ``root`` at the end.

    Whatever ends the making early, the folder stays, and the next call goes on with it.

    Parameters
    ----------
    root : Path
        Where the cohort will be; absent or empty.
    settings : mapping
        What the cohort is made from.

    Yields
    ------
    Path
        The folder, locked against other processes of this machine.

    Raises
    ------
    UsageError
        If the folder holds the beginning of another cohort, or another process fills it.
    CohortError
        If the disk is full.
    """
    partial = partial_folder(root)
    partial.mkdir(parents=True, exist_ok=True)
    lock = _lock(partial, root)
    try:
        _refuse_another(partial, root, settings)
        yield partial
        partial.rename(root.absolute())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CohortError(
                f"{root}: the disk is full; free some space (a scan takes about 0.1 MB at 4 mm and "
                f"0.6 MB at 2 mm) and run the same command again, which goes on with the scans in "
                f"{partial}, or remove that folder"
            ) from error
        raise
    finally:
        os.close(lock)


def _lock(partial: Path, root: Path) -> int:
    """Hold the folder; the system lets go of it when the process ends, however it ends."""
    folder = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UsageError(
            f"{root}: another process is making it; wait for that one or name another folder"
        ) from None
    except OSError:
        # Some network disks cannot lock a folder; then nobody is kept out.
        pass
    return folder


def _refuse_another(partial: Path, root: Path, settings: Mapping[str, Any]) -> None:
    found = read_settings(partial)
    if found is None:
        # Settings are written before the first scan: without them nothing here is of use.
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif found != dict(settings):
        raise UsageError(
            f"{root}: an unfinished cohort of other settings ({difference(found, settings)}) is in "
            f"{partial}; finish that one with its settings, remove the folder, or name another one"
        )


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say which settings of a folder are not those asked for."""
    differing = (
        f"{name} {found.get(name)!r} there, {value!r} asked"
        for name, value in wanted.items()
        if found.get(name) != value
    )
    return ", ".join(differing) or "unknown settings"


def is_kept(path: Path) -> bool:
    """Tell whether a scan is there and whole, so that it need not be made again."""
    return path.is_file() and is_whole_scan(path)
