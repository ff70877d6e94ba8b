"""Kernels on torch's threads: every part once, whoever calls, in whatever process."""

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import kernel
from tests.kernels.processes import in_forked_child

JOB = np.dtype(
    [("next", np.int64), ("parts", np.int64), ("values", np.uintp), ("threads", np.uintp)],
    align=True,
)


@pytest.fixture(scope="module")
def count_parts() -> Any:
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic

    def _add_one(_context: Any, base: Any, index: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            int64 = ir.IntType(64)
            pointer = builder.inttoptr(arguments[0], int64.as_pointer())
            place = builder.gep(pointer, [arguments[1]])
            builder.store(builder.add(builder.load(place), ir.Constant(int64, 1)), place)

        return types.void(base, index), codegen

    add_one: Any = intrinsic(_add_one)
    take = parallel.take

    @kernel(JOB)
    def count(job: Any) -> None:
        parts = job.parts
        values = job.values
        part = take(job)
        while part < parts:
            for _ in range(part % 7 * 1000):
                add_one(values, part)
            part = take(job)

    return count


def expected(parts: int) -> npt.NDArray[np.int64]:
    return np.arange(parts, dtype=np.int64) % 7 * 1000


def run(count_parts: Any, parts: int, threads: int) -> npt.NDArray[np.int64]:
    values = np.zeros(parts, np.int64)
    job = count_parts.job(parts=parts, values=values.ctypes.data)
    parallel.run(count_parts.address, job, threads)
    return values


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("parts", [0, 1, 2, 97])
def test_every_part_is_done_once(count_parts: Any, threads: int, parts: int) -> None:
    for _ in range(20):
        assert np.array_equal(run(count_parts, parts, threads), expected(parts))


def test_torch_has_a_runtime_that_we_use() -> None:
    # Without it the pool of Python threads would be the silent rule here.
    assert parallel._openmp() is not None


@pytest.mark.parametrize("threads", [2, 5])
def test_without_the_runtime_python_threads_do_it(
    count_parts: Any, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    for _ in range(20):
        assert np.array_equal(run(count_parts, 97, threads), expected(97))


def test_without_any_thread_the_caller_does_it(
    count_parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThreads:
        def submit(self, *_arguments: Any) -> None:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(parallel, "_openmp", lambda: None)
    monkeypatch.setattr(parallel, "_python_threads", NoThreads)
    assert np.array_equal(run(count_parts, 97, 4), expected(97))


@pytest.mark.parametrize("openmp", [True, False])
def test_several_python_threads_at_once(
    count_parts: Any, monkeypatch: pytest.MonkeyPatch, openmp: bool
) -> None:
    if not openmp:
        monkeypatch.setattr(parallel, "_openmp", lambda: None)
    found: dict[int, bool] = {}

    def work(i: int) -> None:
        found[i] = all(
            np.array_equal(run(count_parts, 40 + i, 2), expected(40 + i)) for _ in range(50)
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_inside_a_backward_pass(count_parts: Any) -> None:
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            seen.append(run(count_parts, 97, 2))
            (x,) = ctx.saved_tensors
            return grads[0] * 2 + torch.zeros_like(x)

    x = torch.ones(1 << 17, requires_grad=True)
    Twice.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    assert np.array_equal(seen[0], expected(97))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads(count_parts: Any) -> None:
    # The parent's runtime has threads already, which the child does not inherit.
    assert np.array_equal(run(count_parts, 97, 2), expected(97))

    def work() -> bytes:
        good = all(np.array_equal(run(count_parts, 97, 2), expected(97)) for _ in range(20))
        return b"good" if good else b"bad"

    assert in_forked_child(work) == b"good"
    assert np.array_equal(run(count_parts, 97, 2), expected(97))


def test_a_spawned_child(tmp_path: Path) -> None:
    # In a file of its own, because a child has to import what it runs.
    module = tmp_path / "spawned.py"
    here = Path(__file__).with_name("processes.py")
    module.write_text(
        "import importlib.util, multiprocessing, sys\n"
        f"spec = importlib.util.spec_from_file_location('cases', {str(here)!r})\n"
        "cases = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "def child(i):\n    return cases.select_in_child(i)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with context.Pool(2) as pool:\n"
        "        first, second = pool.map(child, [0, 1])\n"
        "    assert first == second == child(0)\n"
        "    print('good')\n"
    )
    assert multiprocessing.get_start_method(allow_none=True) in (None, "fork", "forkserver")
    done = subprocess.run(
        [sys.executable, str(module)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "good", done.stderr


def test_thread_count_follows_torch(torch_threads: Callable[[int], None]) -> None:
    torch_threads(3)
    assert parallel.thread_count(0, 100) == 1
    assert parallel.thread_count(199, 100) == 1
    assert parallel.thread_count(200, 100) == 3
    torch_threads(1)
    assert parallel.thread_count(10**9, 100) == 1
