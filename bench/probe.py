"""What a fresh process needs for its first steps: time and memory, measured in child processes."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# torch is imported and timed before anything of ours, which would import it too.
_CHILD = """
import sys, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
import sparsekit.nn
times.append(time.perf_counter())
from sparsekit.bench import probe
probe.main(times, *sys.argv[1:])
"""


def measure(side: str, sparsity: float, steps: int, folder: Path | None) -> dict[str, Any]:
    """Train for some steps; return the seconds of each stage, and resident bytes.

    Stages: importing Numba, which the kernels need; building the network, its masks
    and a scan; `sparsekit.sparsify`; each step. The memory before the first step is taken when all
    but the steps is done, so that libraries, weights and masks count as there before.
    """
    times = [time.perf_counter()]
    import numba  # noqa: F401

    times.append(time.perf_counter())
    import torch

    from sparsekit.bench import network
    from sparsekit.bench.steps import training_step
    from sparsekit.kernels import compiled
    from sparsekit.models import BrainAgeCNN

    if folder is not None:
        # The checkout's own folder may hold kernels of earlier runs.
        compiled._folders = lambda: [folder]
    masked = BrainAgeCNN(network.GRID)
    masks = network.random_masks(sparsity)
    x = network.scan()
    times.append(time.perf_counter())
    network.hold(masked, masks)
    times.append(time.perf_counter())
    model: torch.nn.Module = network.stock_network(masked) if side == "stock" else masked
    step = training_step(model, x)
    before = resident_bytes("VmRSS")
    ends = [time.perf_counter()]
    for _ in range(steps):
        step()
        ends.append(time.perf_counter())
    stages = ("import_numba_s", "build_s", "sparsify_s")
    return {
        **dict(zip(stages, _differences(times), strict=True)),
        "steps_s": _differences(ends),
        "resident_before_bytes": before,
        "peak_bytes": resident_bytes("VmHWM"),
    }


def _differences(times: list[float]) -> list[float]:
    return [round(b - a, 5) for a, b in itertools.pairwise(times)]


def resident_bytes(field: str) -> int:
    """``VmRSS``, what is resident now, or ``VmHWM``, the most that ever was."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no {field}")


def run(side: str, sparsity: float, steps: int, folder: Path | None = None) -> dict[str, Any]:
    """Call `measure` in a child process.

    Parameters
    ----------
    side : {"ours", "stock"}
    sparsity : float
        Of uniform random masks.
    steps : int
        How many to run.
    folder : Path, optional
        Where compiled kernels lie; by default where they always do.
    """
    command = [sys.executable, "-c", _CHILD, side, str(sparsity), str(steps)]
    if folder is not None:
        command.append(str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} at {sparsity}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(imports: list[float], side: str, sparsity: str, steps: str, folder: str = "") -> None:
    """Print what `measure` finds as one line of JSON: the child's part of `run`.

    `imports` are the times before and after torch was imported, and after sparsekit was.
    """
    found = measure(side, float(sparsity), int(steps), Path(folder) if folder else None)
    torch_s, sparsekit_s = _differences(imports)
    print(json.dumps({"import_torch_s": torch_s, "import_sparsekit_s": sparsekit_s, **found}))
