"""Compiled kernels on torch's own threads.

A kernel is a C function of one pointer, to a job record (`sparsekit.kernels.compiled`). Each thread
calls it once, and it takes numbered parts from the record's counter until none are left::

    part = take(job)
    while part < parts:
        ...
        part = take(job)

Parts write to disjoint memory and do not look at who computes them, so results do not depend on who
does. They do not depend on the number of threads either, unless a job has parts by that number, as
that of masked_conv3d's weight gradient.

The threads are those of the OpenMP runtime that torch has loaded: a kernel between two torch ops
finds them awake, and no second pool competes for the cores. A call costs a few microseconds, less
than a torch op that uses its threads; bench/bench_parallel.py measures both. Where torch has no
such runtime, and in a forked child, whose OpenMP threads are gone, a pool of Python threads calls
the same kernels.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsekit.kernels.record import Job

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _take(_typing_context: Any, job: Any) -> Any:
    """Number of the next part of a job; every thread gets its own."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(job), codegen


take: Any = intrinsic(_take)


def thread_count(work_items: int, least_per_thread: int) -> int:
    """Threads for a job: as many as torch uses, or 1 if they would have too little to do.

    Not a number between: a team of another size than torch's ends threads and starts new ones.

    Parameters
    ----------
    work_items : int
        Size of the job in any unit.
    least_per_thread : int
        Size from which two threads are faster than one.
    """
    return torch.get_num_threads() if work_items >= 2 * least_per_thread else 1


def run(kernel_address: int, job: Job, threads: int) -> None:
    """Run a kernel until all parts of a job are done.

    Parameters
    ----------
    kernel_address : int
        `Kernel.address`.
    job : Job
        The record; its counter ``next`` is set to 0 first. Memory that it points to must stay alive
        and unmoved during the call.
    threads : int
        Most threads to use, this one included. 1 calls the kernel right here.
    """
    job["next"] = 0
    pointer = job.address
    if threads == 1:
        _callable(kernel_address)(pointer)
        return
    parallel = None if _forked else _openmp()
    if parallel is not None:
        parallel(kernel_address, pointer, threads, 0)
        return
    _run_on_pool(_callable(kernel_address), pointer, threads)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A kernel and a job of which only some fields, as a rule addresses, are still unknown."""

    address: int
    job: Job
    threads: int
    keeps: object = None
    """Owners of memory that the job points to, where nobody else keeps them."""

    def run(self, **fields: int) -> Job:
        """Run a copy of the job with these fields, and return it."""
        job = self.job.again(**fields)
        run(self.address, job, self.threads)
        return job


def _run_on_pool(call: Callable[[int], None], pointer: int, threads: int) -> None:
    helpers = []
    try:
        pool = _python_threads()
        # One by one, so that those that were submitted are known when the next is refused.
        for _ in range(threads - 1):
            helpers.append(pool.submit(call, pointer))  # noqa: PERF401
    except RuntimeError:
        # No new threads, as at the end of the interpreter: those that there are take all parts.
        pass
    finally:
        # Whatever happens here, the job's memory must outlive those that work on it.
        _finish(helpers, lambda: call(pointer))


def _finish(helpers: list[Future[None]], own: Callable[[], None]) -> None:
    """Do one's own share and wait for the others, also if that is interrupted."""
    try:
        own()
    finally:
        # One that has not begun would find nothing left to do.
        running = [helper for helper in helpers if not helper.cancel()]
        interrupt: BaseException | None = None
        while running:
            try:
                wait(running)
                running = []
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


@functools.cache
def _callable(kernel_address: int) -> Callable[[int], None]:
    # ctypes releases the GIL during the call.
    return _CALL(kernel_address)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel of the runtime that torch is linked to; LLVM's and Intel's have it as well."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    result: Callable[[int, int, int, int], None] = parallel
    return result


_forked = False
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _python_threads() -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sparsekit")
        return _pool


def _after_fork() -> None:
    global _forked, _pool, _pool_lock
    _forked = True
    _pool = None
    _pool_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
