"""``sparsekit doctor``: what this machine can run."""

import importlib.util
import os
import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsekit import flops
from sparsekit._version import __version__
from sparsekit.kernels import dispatch, implementations, tuning
from sparsekit.models import BrainAgeCNN
from sparsekit.nn import sparsify

_LIBRARIES = ("torch", "numpy", "scipy", "nibabel", "numba", "triton", "zstandard", "xxhash")
_EXTRAS = {
    "report": ("matplotlib",),
    "bench": ("pytest_benchmark",),
    "flare": ("nvflare",),
    "flower": ("flwr",),
}
_SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


def doctor() -> None:
    """Show which implementation each op takes here, versions, threads and optional extras."""
    console = Console(highlight=False)
    console.print(_system())
    console.print(_ops())
    console.print(_layers())
    console.print(_fit())
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
    table.add_row("autotuning on a GPU", escape(_autotuning()))
    return table


def _autotuning() -> str:
    why = tuning.why_off()
    return f"off: {why}" if why else f"on, {tuning.count()} choices in {tuning.path()}"


def _ops() -> Table:
    table = _table("Ops", "op", "device", "taken", "why", "also available")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in implementations.ops():
        for device in devices:
            choice = dispatch.resolve(op, device)
            others = [i.backend for i in implementations.available(op, device)[1:]]
            table.add_row(
                op, device, choice.implementation.backend, choice.reason, ", ".join(others) or "-"
            )
    return table


def _layers() -> Table:
    """Predictions for the default network, whose blocks run as one op each."""
    model = sparsify(BrainAgeCNN())
    shape = (1, 1, *model.in_shape)
    table = _table(
        "Training step of BrainAgeCNN, one scan, on the CPU: predicted ms of the kernels : of the "
        "dense path; * is taken",
        "layer",
        *(f"{sparsity:.0%} pruned" for sparsity in _SPARSITIES),
    )
    cells: dict[str, list[str]] = {}
    for sparsity in _SPARSITIES:
        for name, d in flops.decisions(model, shape, 1.0 - sparsity).items():
            kernels, dense = f"{1e3 * d.kernel_seconds:.3g}", f"{1e3 * d.dense_seconds:.3g}"
            text = f"{kernels} : {dense}*" if d.dense else f"{kernels}* : {dense}"
            cells.setdefault(name, []).append(text)
    for name, row in cells.items():
        table.add_row(name, *row)
    return table


def _fit() -> Table:
    """How far to trust the predictions."""
    from sparsekit.kernels.masked_conv3d import cost

    shipped = cost.shipped()
    table = _table("Predictions, on layers that took no part in the fit", "what", "found")
    machine = shipped["machine"]
    table.add_row(
        "fitted on",
        f"{machine['cpu']}, {machine['instructions']}, {machine['threads']} threads, "
        f"torch {machine['torch']}",
    )
    for side, error in shipped["errors"].items():
        table.add_row(
            f"predicted / measured, {side}",
            f"median {error['median_ratio']}, typically off by {error['median_error']:.0%}, "
            f"worst {error['worst_ratio']}",
        )
    regret = shipped["regret"]["held_out"]
    table.add_row(
        "slower than the better path",
        f"median {regret['median']:.0%}, mean {regret['mean']:.1%}, worst {regret['worst']:.0%} "
        f"of {regret['choices']} choices",
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
