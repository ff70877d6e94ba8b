"""The files of a cache folder: content keys, an index of known files, safe writing.

An array's name carries a key over the content of every source file, in order, and over the
preprocessing id. Files are written under a temporary name that is locked by the writer and
renamed when they are complete; a temporary without a living writer is removed by the next build.
"""

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from sparsekit.fed.cohort.scans import Scan

LAYOUT = 1
"""Of the arrays, manifests and index; files of another layout are ignored."""


class Shelf:
    """The files of one site and one way of preparing scans.

    Parameters
    ----------
    root : Path
        The cache folder.
    site : str
    recipe : str
        The preprocessing id.
    """

    def __init__(self, root: Path, site: str, recipe: str) -> None:
        self.root = root
        self.recipe = recipe
        # Names that are legal in a file; two sites may share one, their keys differ.
        self.stem = re.sub(r"[^A-Za-z0-9_-]+", "-", site)[:40] or "site"
        self.index_path = root / f"{self.stem}.index.json"

    def key(self, digests: Sequence[str]) -> str:
        """Return the key of an array made from files with these content digests."""
        text = json.dumps([LAYOUT, self.recipe, list(digests)])
        return xxhash.xxh3_128(text.encode()).hexdigest()

    def known_digests(self, scans: Sequence[Scan]) -> list[str] | None:
        """Return the content digests of unchanged files, or None when one must be read."""
        index = _read_json(self.index_path).get("files", {})
        digests = [index.get(stamp) for stamp in map(stamp_of, scans)]
        return None if any(d is None for d in digests) else [str(d) for d in digests]

    def remember(self, stamps: Sequence[str], digests: Sequence[str]) -> None:
        """Store which content the files had, for the next `known_digests`."""
        files = _read_json(self.index_path).get("files", {})
        # Only what lies where it lay is worth keeping: the index must not grow for ever.
        current = {stamp.split("|")[0] for stamp in stamps}
        files = {s: d for s, d in files.items() if s.split("|")[0] not in current}
        files |= dict(zip(stamps, digests, strict=True))
        write_json(self.index_path, {"layout": LAYOUT, "files": files})

    def find(self, digests: Sequence[str]) -> dict[str, Any] | None:
        """Return the manifest of a complete array made from `digests`, or None."""
        manifest = _read_json(self.manifest_path(self.key(digests)))
        if not manifest:
            return None
        try:
            array = np.load(self.root / manifest["array"], mmap_mode="r")
        except (OSError, ValueError, KeyError):
            return None
        return manifest if list(array.shape) == manifest["shape"] else None

    def array_path(self, key: str) -> Path:
        """Return the final name of the array with this key."""
        return self.root / f"{self.stem}-{key}.npy"

    def manifest_path(self, key: str) -> Path:
        """Return the final name of the manifest with this key."""
        return self.root / f"{self.stem}-{key}.json"


def remove_dead_temporaries(root: Path) -> None:
    """Delete the temporaries in `root` whose writer is no longer alive."""
    for path in root.glob(".*.tmp"):
        try:
            with path.open("rb") as file:
                # A living writer holds the lock, which makes this raise.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        except OSError:
            continue


def stamp_of(scan: Scan) -> str:
    """Name a file and its state; any write to it changes the inode's change time."""
    parts: list[str] = []
    for path in (scan.path, scan.mask):
        if path is None:
            continue
        try:
            stat = path.stat()
            state = f"{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
        except OSError:
            state = "absent"
        parts.append(f"{path.absolute()}|{state}")
    return "|".join(parts)


@contextmanager
def temporary_file(root: Path, stem: str) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a locked temporary in `root`; whatever happens, it is gone afterwards or renamed."""
    while True:
        path = root / f".{stem}-{secrets.token_hex(8)}.tmp"
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():
            break
        file.close()  # taken for a dead one between its creation and its lock
    try:
        with file:
            yield file, path
    finally:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("layout") == LAYOUT else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that readers see the old file or the whole new one."""
    with temporary_file(path.parent, path.stem) as (file, temporary):
        file.write(json.dumps(content, indent=1).encode())
        file.flush()
        os.replace(temporary, path)
