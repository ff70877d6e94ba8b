"""Compile Triton kernels for GPUs that need not be here, and read what came out."""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekit.kernels.builds import Build

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Figures:
    """What the machine code of one build holds."""

    name: str
    target: str
    registers: int
    spilled: int
    """Bytes of stack; on AMD, also registers spilled."""
    shared: int
    """Bytes of shared memory."""
    tensor: int
    """Instructions of matrix units."""
    copies: int
    """Asynchronous copies of 16 bytes; on AMD, loads of 16 bytes."""


def read(build: Build, target: str) -> Figures:
    source = ASTSource(build.kernel, build.signature, _at(build), build.attrs)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        return _read_amd(build.name, target, shared, compiled.asm["amdgcn"])
    return _read_nvidia(build.name, target, shared, compiled.asm["cubin"])


def _at(build: Build) -> dict[tuple[int, ...], Any]:
    """Constants by the position of their parameter."""
    names = list(build.kernel.arg_names)
    return {(names.index(name),): value for name, value in build.constexprs.items()}


def _read_nvidia(name: str, target: str, shared: int, cubin: bytes) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{name}: no REG and STACK in what cuobjdump says:\n{usage}")
    ops = Counter(re.findall(r"\b(HG?MMA|UTC[A-Z]*MMA|LDGSTS[\w.]*\.128|LDL|STL)\b", sass))
    local = ops["LDL"] + ops["STL"]
    copies = sum(n for op, n in ops.items() if op.startswith("LDGSTS"))
    tensor = sum(n for op, n in ops.items() if op.endswith("MMA"))
    return Figures(name, target, int(found[1]), max(int(found[2]), local), shared, tensor, copies)


def _read_amd(name: str, target: str, shared: int, code: str) -> Figures:
    def last(field: str) -> int:
        values = re.findall(rf"\.{field}:\s+(\d+)", code)
        if not values:
            raise RuntimeError(f"{name}: no {field} in the code for {target}")
        return int(values[-1])

    spilled = last("vgpr_spill_count") + last("sgpr_spill_count")
    return Figures(
        name, target, last("vgpr_count"), spilled + last("private_segment_fixed_size"), shared,
        len(re.findall(r"\bv_mfma_", code)), len(re.findall(r"_load_dwordx4\b", code)),
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_NVIDIA / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout
