"""Machines for a test: network namespaces on one bridge, and the page of commands for them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\S+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_no_namespaces() -> str | None:
    """Say what keeps a test from making network namespaces."""
    name = f"spk{os.getpid()}-try"
    try:
        run_ip("netns", "add", name)
        run_ip("-n", name, "link", "set", "lo", "up")
    except OSError as error:
        return f"network namespaces are not permitted here: {error}"
    finally:
        with contextlib.suppress(OSError):
            run_ip("netns", "delete", name, check=False)
    return None


@dataclass
class Machine:
    """One namespace with a folder of its own, in which commands run as on a machine."""

    name: str
    namespace: str
    folder: Path
    prelude: str = ""

    def command(self, text: str) -> list[str]:
        script = f"set -euo pipefail\n{self.prelude}{text}"
        return ["ip", "netns", "exec", self.namespace, "bash", "-c", script]

    def environment(self) -> dict[str, str]:
        beside = str(Path(sys.executable).parent)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR", "NVFL"))}
        return clean | {"PATH": f"{beside}:{os.environ['PATH']}", "HOME": str(self.folder)}

    def run(self, text: str, *, seconds: float = 300.0) -> int:
        """Run commands; what they print goes to console.log, and may go on after they end."""
        with (self.folder / "console.log").open("ab") as log:
            child = subprocess.Popen(
                self.command(text),
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            return child.wait(seconds)

    def read(self) -> str:
        return (self.folder / "console.log").read_text(encoding="utf-8", errors="replace")

    def pids(self) -> list[int]:
        return [int(pid) for pid in run_ip("netns", "pids", self.namespace).split()]

    def end(self) -> None:
        """End whatever runs in the namespace, which this test made."""
        end = time.monotonic() + 20
        while (left := self.pids()) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


class Network:
    """Machines on one bridge, 192.0.2.0/24, which no other network of this computer sees."""

    def __init__(self, names: list[str], root: Path) -> None:
        self.machines: dict[str, Machine] = {}
        short = f"spk{os.getpid() % 100000}"
        self._hub = f"{short}-hub"
        try:
            run_ip("netns", "add", self._hub)
            run_ip("-n", self._hub, "link", "add", "hub", "type", "bridge")
            run_ip("-n", self._hub, "link", "set", "hub", "up")
            for number, name in enumerate(names, start=1):
                folder = root / name
                folder.mkdir()
                space = f"{short}-{name}"
                run_ip("netns", "add", space)
                self.machines[name] = Machine(name, space, folder)
                run_ip("-n", space, "link", "set", "lo", "up")
                port = f"port{number}"
                run_ip(
                    *("-n", space, "link", "add", "eth0", "type", "veth"),
                    *("peer", "name", port, "netns", self._hub),
                )
                run_ip("-n", self._hub, "link", "set", port, "master", "hub", "up")
                run_ip("-n", space, "address", "add", f"192.0.2.{number}/24", "dev", "eth0")
                run_ip("-n", space, "link", "set", "eth0", "up")
        except OSError:
            self.close()
            raise

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def close(self) -> None:
        for machine in self.machines.values():
            machine.end()
            run_ip("netns", "delete", machine.namespace, check=False)
        run_ip("netns", "delete", self._hub, check=False)


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, where it belongs and its text."""

    language: str
    place: str
    text: str


def blocks_of(page: Path, heading: str) -> list[Block]:
    """Return the marked blocks below a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)
    (part,) = [part for part in parts if part.startswith(heading)]
    return [Block(*found) for found in _BLOCK.findall(part)]
