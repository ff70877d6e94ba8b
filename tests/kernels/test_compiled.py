"""The cache of compiled kernels: hit when it should be, never stale, never in the way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import sparsekit
from sparsekit.kernels.compiled import Kernel, kernel

JOB = np.dtype([("next", np.int64), ("value", np.int64), ("other", np.int64)], align=True)

HELPER = """
import numba
@numba.njit
def change(x):
    return x + {added}
"""

OP = """
import numba
import numpy as np
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.helper import change

JOB = np.dtype([("next", np.int64), ("value", np.int64)], align=True)

def make(width, names=("a", "b")):
    @numba.njit
    def inner(x):
        return x * width

    @kernel(JOB)
    def scale(job):
        job.value = change(inner(job.value)) + len(names)
    return scale

if __name__ == "__main__":
    from sparsekit.kernels import parallel
    for width in (2, 3):
        scale = make(width)
        job = scale.job(value=10)
        parallel.run(scale.address, job, 1)
        print(int(job["value"]), scale.was_cached)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, whose sources a test may edit."""
    root = tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__", "fed", "bench", "cli")
    shutil.copytree(Path(str(sparsekit.__file__)).parent, root / "sparsekit", ignore=skip)
    (root / "sparsekit/kernels/helper.py").write_text(HELPER.format(added=100))
    (root / "sparsekit/kernels/op.py").write_text(OP)
    return root


def run_op(package: Path, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "sparsekit.kernels.op"],
        env={**os.environ, "PYTHONPATH": str(package), **environment},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def cached_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kernel"))


def test_a_second_process_hits_the_cache_also_from_factories(package: Path) -> None:
    assert run_op(package) == ["122", "False", "132", "False"]
    assert len(cached_files(package / "sparsekit/kernels/__pycache__")) == 2
    assert run_op(package) == ["122", "True", "132", "True"]
    assert len(cached_files(package)) == 2


def test_an_edited_helper_is_compiled_anew_into_the_same_files(package: Path) -> None:
    run_op(package)
    before = cached_files(package)
    (package / "sparsekit/kernels/helper.py").write_text(HELPER.format(added=200))
    assert run_op(package) == ["222", "False", "232", "False"]
    assert run_op(package) == ["222", "True", "232", "True"]
    assert cached_files(package) == before


def test_a_damaged_file_is_compiled_anew(package: Path) -> None:
    run_op(package)
    first, second = cached_files(package)
    first.write_bytes(first.read_bytes()[:-1])
    second.write_bytes(b"")
    assert run_op(package) == ["122", "False", "132", "False"]
    assert run_op(package) == ["122", "True", "132", "True"]


def test_the_users_folder_serves_where_the_package_is_read_only(
    package: Path, tmp_path: Path
) -> None:
    # A file in its place keeps out root as well.
    (package / "sparsekit/kernels/__pycache__").write_text("")
    home = tmp_path / "home"
    assert run_op(package, XDG_CACHE_HOME=str(home)) == ["122", "False", "132", "False"]
    assert run_op(package, XDG_CACHE_HOME=str(home)) == ["122", "True", "132", "True"]
    assert cached_files(package) == []
    assert len(cached_files(home)) == 2


def test_kernels_run_where_nothing_can_be_written(package: Path, tmp_path: Path) -> None:
    (package / "sparsekit/kernels/__pycache__").write_text("")
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    for _ in range(2):
        found = run_op(package, XDG_CACHE_HOME=str(occupied / "inside"))
        assert found == ["122", "False", "132", "False"]


def test_numbas_variable_is_followed(package: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    assert run_op(package, NUMBA_CACHE_DIR=str(chosen)) == ["122", "False", "132", "False"]
    assert run_op(package, NUMBA_CACHE_DIR=str(chosen)) == ["122", "True", "132", "True"]
    assert len(cached_files(chosen)) == 2


def value_after(made: Kernel, **fields: int) -> int:
    from sparsekit.kernels import parallel

    job = made.job(**fields)
    parallel.run(made.address, job, 1)
    return int(job["value"])


def test_a_job_starts_at_zero_and_division_by_zero_does_not_raise() -> None:
    @kernel(JOB)
    def divide(job: Any) -> None:
        """Divide."""
        job.value = job.value // job.other

    assert [divide.job()[name] for name in ("next", "value", "other")] == [0, 0, 0]
    assert value_after(divide, value=7, other=2) == 3
    value_after(divide, value=7, other=0)
    assert divide.__doc__ == "Divide."


def test_a_kernel_that_can_raise_is_refused() -> None:
    @kernel(JOB)
    def raises(job: Any) -> None:
        if job.value == 3:
            raise ValueError

    @kernel(JOB)
    def allocates(job: Any) -> None:
        values = [job.value]
        values.append(job.other)
        job.value = values[job.next]

    for made in (raises, allocates):
        with pytest.raises(AssertionError, match="can raise"):
            assert made.address
        # Not from the disk either.
        with pytest.raises(AssertionError, match="can raise"):
            assert made.address


def test_a_closure_that_has_no_stable_form_is_refused() -> None:
    def make(table: Any) -> Kernel:
        @kernel(JOB)
        def look_up(job: Any) -> None:
            job.value = table[job.value]

        return look_up

    with pytest.raises(AssertionError, match="table cannot be part"):
        assert make(np.arange(3)).address


def test_the_job_needs_its_counter_first() -> None:
    with pytest.raises(AssertionError):
        kernel(np.dtype([("value", np.int64), ("next", np.int64)]))(lambda _job: None)
    with pytest.raises(AssertionError):
        kernel(np.dtype([("next", np.int32)]))(lambda _job: None)


def test_importing_the_decorator_does_not_import_numba() -> None:
    code = "import sys, sparsekit.kernels.compiled; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_kernel_that_calls_a_compiled_function_is_refused() -> None:
    def polynomial(x: Any) -> Any:
        total = 0.0
        for i in range(x):
            total += (i + 1) * total * i
        return total

    # LLVM is kept from joining the two, as it may decide for larger functions.
    njit: Any = numba.njit
    apart = njit(polynomial, _dbg_optnone=True)

    @kernel(JOB)
    def calling(job: Any) -> None:
        job.value = int(apart(job.value))

    for _ in range(2):
        with pytest.raises(AssertionError, match="calls compiled functions of their own"):
            assert calling.address


def test_the_process_that_compiles_computes_the_bits_of_those_that_load(package: Path) -> None:
    code = """
import hashlib
import torch
from sparsekit import prune, sparsify
from sparsekit.kernels.zero_pruned import cpu
from sparsekit.models import BrainAgeCNN

torch.set_num_threads(2)
random = torch.Generator().manual_seed(1)
model = BrainAgeCNN((20, 22, 21), width=0.25, generator=random)
sparsify(model, prune.magnitude_masks(model, 0.9))
for block in model.blocks:
    block.conv.backend = "cpu"
y = model(torch.randn(2, 1, 20, 22, 21, generator=random))
y.sum().backward()
digest = hashlib.sha256(y.detach().numpy().tobytes())
for parameter in model.parameters():
    digest.update(parameter.grad.contiguous().numpy().tobytes())
print(digest.hexdigest(), cpu.zero.was_cached)
"""
    lines = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(package)},
            cwd=package,
            capture_output=True,
            text=True,
            check=True,
        )
        lines.append(done.stdout.split())
    (first, compiled), (second, loaded) = lines
    assert (compiled, loaded) == ("False", "True")
    assert first == second
