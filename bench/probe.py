"""What a fresh process needs for its first steps: time and memory. Run as a child process.

    python -m sparsekit.bench.probe SIDE SPARSITY STEPS [FOLDER]

SIDE is ``ours`` or ``stock``. FOLDER, if given, is the only place where compiled kernels are looked
for and left. Prints one line of JSON.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(side: str, sparsity: float, steps: int, folder: Path | None) -> dict[str, Any]:
    """Train for some steps; return seconds from each stage to the next, and resident bytes."""
    start = time.perf_counter()
    import torch

    torch_imported = time.perf_counter()
    from sparsekit.bench import network
    from sparsekit.bench.steps import training_step
    from sparsekit.kernels import compiled

    if folder is not None:
        # The checkout's own folder may hold kernels of earlier runs.
        compiled._folders = lambda: [folder]
    model: torch.nn.Module = network.masked_network(network.random_masks(sparsity))
    if side == "stock":
        model = network.stock_network(model)  # type: ignore[arg-type]
    step = training_step(model, network.scan())
    # The libraries behind the kernels count as loaded, as torch's do.
    import numba  # noqa: F401

    resident_before = resident_bytes("VmRSS")
    built = time.perf_counter()
    ends = []
    for _ in range(steps):
        step()
        ends.append(time.perf_counter())
    seconds = [end - begin for begin, end in zip([built, *ends], ends, strict=False)]
    return {
        "import_torch_s": torch_imported - start,
        "build_s": built - torch_imported,
        "steps_s": seconds,
        "resident_before_bytes": resident_before,
        "peak_bytes": resident_bytes("VmHWM"),
    }


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
    command = [sys.executable, "-m", "sparsekit.bench.probe", side, str(sparsity), str(steps)]
    if folder is not None:
        command.append(str(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    _side, _sparsity, _steps, *_rest = sys.argv[1:]
    _folder = Path(_rest[0]) if _rest else None
    print(json.dumps(measure(_side, float(_sparsity), int(_steps), _folder)))
