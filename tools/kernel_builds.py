"""Compile Triton kernels for GPUs that need not be here, and read what came out."""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsekit.kernels.bitmap import builds as bitmap
from sparsekit.kernels.builds import Build
from sparsekit.kernels.masked_conv3d import builds as masked_conv3d
from sparsekit.kernels.topk_mask import builds as topk_mask

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_LISTS = 6
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
    """Instructions of matrix units in the main loop; on AMD, anywhere."""
    copies: int
    """Asynchronous copies of 16 bytes in the main loop; on AMD, loads of 16 bytes anywhere."""
    narrow: int
    """Asynchronous copies in the main loop of fewer bytes, such as those of the lists."""

    def lacks(self, build: Build) -> str:
        """Say what the code should have and has not; empty if it has all."""
        if build.tensor_cores and not self.tensor:
            return "uses no matrix unit"
        # What is narrow are a step's list and the places of its voxels.
        if build.wide_copies and (not self.copies or self.narrow > _LISTS):
            return "is not fed by copies of 16 bytes"
        return ""


def read(build: Build, target: str) -> Figures:
    """Compile for one kind of GPU and read the machine code."""
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
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loop = _main_loop(sass)
    tensor = len(re.findall(_MMA, loop))
    copies = len(re.findall(r"\bLDGSTS[\w.]*\.128\b", loop))
    narrow = len(re.findall(r"\bLDGSTS\b", loop)) - copies
    return Figures(
        name, target, int(found[1]), max(int(found[2]), local), shared, tensor, copies, narrow
    )  # fmt: skip


_MMA = r"\b(?:HG?MMA|UTC[A-Z]*MMA)\b"


def _main_loop(sass: str) -> str:
    """Lines between a label and the branch back to it, where most matrix instructions stand."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*(\.L_x_\d+)", line)
        if branch and labels.get(branch[1], i) < i:
            loops.append("\n".join(lines[labels[branch[1]] : i + 1]))
    # Of loops within loops, the innermost that has them all.
    return max(loops, key=_weight, default="")


def _weight(loop: str) -> tuple[int, int, int]:
    return len(re.findall(_MMA, loop)), len(re.findall(r"\bFFMA\b", loop)), -len(loop)


def _read_amd(name: str, target: str, shared: int, code: str) -> Figures:
    def last(field: str) -> int:
        values = re.findall(rf"\.{field}:\s+(\d+)", code)
        if not values:
            raise RuntimeError(f"{name}: no {field} in the code for {target}")
        return int(values[-1])

    spilled = last("vgpr_spill_count") + last("sgpr_spill_count")
    return Figures(
        name, target, last("vgpr_count"), spilled + last("private_segment_fixed_size"), shared,
        len(re.findall(r"\bv_mfma_", code)), len(re.findall(r"_load_dwordx4\b", code)), 0,
    )  # fmt: skip


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(_NVIDIA / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def builds(target: str, *, whole: bool) -> list[Build]:
    """All that is compiled for one kind of GPU; one of each kernel unless `whole`."""
    convolution = masked_conv3d.builds(target, whole=whole)
    others = [*topk_mask.builds(amd=target.startswith("gfx")), *bitmap.builds()]
    if not whole:
        others = list({build.kernel.__name__: build for build in others}.values())
    return [*convolution, *others]


def write_budget(rows: list[Figures], path: Path) -> None:
    """Keep what the kernels take today, registers rounded up to the 8 that hardware deals out."""
    budget: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        own = [-(-row.registers // 8) * 8, row.shared]
        budget.setdefault(row.target, {})[row.name] = own
    text = ",\n".join(
        f'"{target}": {{\n'
        + ",\n".join(f"{json.dumps(name)}: {own}" for name, own in sorted(of.items()))
        + "\n}"
        for target, of in budget.items()
    )
    path.write_text("{\n" + text + "\n}\n")
