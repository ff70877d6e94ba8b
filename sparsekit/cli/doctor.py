"""``sparsekit doctor``: what this machine can run."""

import importlib.util
import os
import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsekit._version import __version__
from sparsekit.kernels import dispatch

_LIBRARIES = ("torch", "numpy", "scipy", "nibabel", "numba", "triton", "zstandard", "xxhash")
_EXTRAS = {
    "report": ("matplotlib",),
    "bench": ("pytest_benchmark",),
}


def doctor() -> None:
    """Show which implementation each op takes here, versions, threads and optional extras."""
    console = Console(highlight=False)
    console.print(_system())
    console.print(_ops())
    console.print(_extras())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _system() -> Table:
    table = _table("System", "what", "found")
    table.add_row("sparsekit", __version__)
    table.add_row("python", platform.python_version())
    for name in _LIBRARIES:
        table.add_row(name, _version(name) or "not installed")
    table.add_row("platform", f"{platform.system()} {platform.machine()}")
    table.add_row("CPU instructions", torch.backends.cpu.get_cpu_capability())
    cores = len(os.sched_getaffinity(0))
    table.add_row("CPU cores usable", str(cores))
    table.add_row("threads of torch", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            table.add_row(f"cuda:{i}", torch.cuda.get_device_name(i))
    else:
        table.add_row("GPU", "none that torch can use")
    return table


def _ops() -> Table:
    table = _table("Ops", "op", "device", "taken", "why", "also available")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in dispatch.ops():
        for device in devices:
            choice = dispatch.resolve(op, device)
            others = [i.backend for i in dispatch.available(op, device)[1:]]
            table.add_row(
                op, device, choice.implementation.backend, choice.reason, ", ".join(others) or "-"
            )
    return table


def _extras() -> Table:
    table = _table("Optional extras", "extra", "state")
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        state = f"missing {', '.join(missing)}: pip install 'sparsekit3d[{extra}]'"
        table.add_row(extra, escape(state) if missing else "installed")
    return table


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
