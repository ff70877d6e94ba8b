"""What a process and those it started hold: memory, open files, sockets; read from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holding:
    """Of one process: bytes of memory (its share of what is shared), open files, threads."""

    pid: int
    memory_bytes: int
    files: int
    sockets: int
    threads: int


def descendants_of(pid: int) -> list[int]:
    """Return the processes that a process has started, and those started by them, zombies too."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for word in (task / "children").read_text().split():
                found += [int(word), *descendants_of(int(word))]
    except OSError:
        # It has ended meanwhile.
        pass
    return sorted(found)


def holding(pid: int) -> Holding | None:
    """Measure one process, None if it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        memory = _kilobytes(folder / "smaps_rollup", "Pss:") * 1024
        links = [os.readlink(link) for link in (folder / "fd").iterdir()]
        threads = len(list((folder / "task").iterdir()))
    except OSError:
        return None
    sockets = sum(link.startswith("socket:") for link in links)
    return Holding(pid, memory, len(links), sockets, threads)


def peak_bytes(pid: int) -> int:
    """Return the most memory that was resident at once, libraries included."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:") * 1024


def _kilobytes(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise OSError(f"{path} has no {name}")


_STARTED_AS = {b"sparsekit.fed.engines.site_process", b"sparsekit.fed.engines.nursery"}


def site_processes(run: Path) -> list[int]:
    """Return the processes of a run's sites, and their nursery, also after their server is gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if _STARTED_AS & set(words) and str(run).encode() in words:
            found.append(int(path.parent.name))
    return found
