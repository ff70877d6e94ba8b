"""Compiled CPU kernels: the decorator that all of them use, and their cache on disk.

A kernel is a Numba function of one job record, compiled to a C function at its first use;
`sparsekit.kernels.parallel` runs it on torch's threads::

    JOB = np.dtype([("next", np.int64), ("parts", np.int64), ("x", np.uintp)], align=True)

    @kernel(JOB)
    def double(job): ...

    parallel.run(double.address, job, threads)

Numba's own disk cache looks at the file of the kernel only, so that it would run old code after a
change of a helper in another file, and it mixes up kernels that a factory makes for several tile
sizes when two processes save them at once. Here a kernel has one file, and its name and first bytes
cover everything that decides on the machine code: all sources in this folder, the constants in the
kernel's closure, versions, the processor. Loading takes a few milliseconds. Files lie in the first
of these folders that can be written: ``NUMBA_CACHE_DIR`` if it is set, ``__pycache__`` beside this
module, ``sparsekit/kernels`` in the user's cache folder. If none can be, each process compiles.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import platform
import re
import tempfile
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from sparsekit.kernels.record import Fields, Job

_PLAIN = (bool, int, float, str, bytes, type(None), np.dtype, np.generic)


# One for all kernels: Numba compiles one at a time anyway.
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


# A fork waits for another thread's compilation: a child would find Numba's own lock taken for
# ever, and LLVM in the middle of its work.
os.register_at_fork(
    before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(),
    after_in_child=_after_fork,
)  # fmt: skip


class Kernel:
    """A function of one job record, compiled or loaded from the disk at its first use."""

    def __init__(
        self,
        function: Callable[[Any], None],
        job_dtype: np.dtype[np.void],
        fastmath: Collection[str] = (),
    ) -> None:
        self.job_dtype = job_dtype
        self._fields = Fields(job_dtype)
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__
        self._function = function
        self._fastmath = tuple(sorted(fastmath))
        # Read while this process imports its code, so that an edit after that is another stamp.
        self._sources = _sources(function.__code__.co_filename)
        self._compiled: Any = None

    @property
    def address(self) -> int:
        """Address of the C function ``void kernel(void *job)``."""
        if self._compiled is None:
            with _lock:
                if self._compiled is None:
                    self._compiled = self._compile()
        address: int = self._compiled.address
        return address

    @property
    def was_cached(self) -> bool:
        """Whether the machine code came from the disk; compiles the kernel if need be."""
        assert self.address
        return bool(self._compiled.cache_hits)

    def job(self, **fields: Any) -> Job:
        """Return a new record with these fields; the others are 0."""
        job = Job(self._fields, self._fields.zeros[:])
        job.set(fields)
        return job

    def _compile(self) -> Any:
        import numba
        from numba import types
        from numba.core.ccallback import CFunc

        # Division by zero must not raise: a thread of OpenMP has nobody to raise to.
        options: dict[str, Any] = {"error_model": "numpy"}
        if self._fastmath:
            options["fastmath"] = set(self._fastmath)
        signature = (numba.from_dtype(self.job_dtype),), types.void
        compiled: Any = CFunc(self._function, signature, {}, options)
        constants = (_constants(self._function), self.job_dtype.descr, self._fastmath)
        compiled._cache = _DiskCache(self._function, repr(constants), self._sources)
        compiled.compile()
        return compiled


def kernel(
    job_dtype: np.dtype[np.void], *, fastmath: Collection[str] = ()
) -> Callable[[Callable[[Any], None]], Kernel]:
    """Make a `Kernel` of a function of one job record.

    Parameters
    ----------
    job_dtype : dtype
        A structured dtype made with ``align=True`` whose first field is ``next``, int64. Pointers
        are fields of type uintp. A kernel should read its fields once, before its loop over parts:
        behind an atomic operation the compiler must load them again.
    fastmath : collection of str
        LLVM's flags; ``contract`` alone gives fused multiply-add.

    Returns
    -------
    callable
        The decorator. The function may use helpers of any file in ``kernels/``. What a factory
        puts into its closure must be numbers, strings, tuples of them, modules, or compiled
        helpers whose closure again holds only these: they are part of the key on the disk.
        A global must not depend on anything but the sources and the processor.
    """
    return functools.partial(Kernel, job_dtype=job_dtype, fastmath=fastmath)


def _constants(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What a function's closure holds, in a form that is the same in every process."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        inner = getattr(value, "py_func", None) or getattr(value, "_defn", None)
        if inner is not None:
            value = (inner.__module__, inner.__qualname__, _constants(inner))
        elif inspect.ismodule(value):
            value = value.__name__
        elif not all(isinstance(v, _PLAIN) for v in (value if type(value) is tuple else [value])):
            raise AssertionError(f"{function.__qualname__}: {name} cannot be part of a cache's key")
        found.append((name, value))
    return tuple(found)


@functools.lru_cache
def _sources(kernel_file: str) -> bytes:
    """Digest of every source in this folder, and of the kernel's file where it lies elsewhere."""
    digest = hashlib.sha256()
    folder = Path(__file__).resolve().parent
    for path in [*sorted(folder.rglob("*.py")), Path(kernel_file)]:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def _check(result: Any) -> None:
    """Refuse a kernel that threads cannot run, or that the disk cannot hold whole."""
    code = result.library.get_llvm_str()
    name = result.fndesc.qualname
    called = set(re.findall(r"\bcall [^\n]*?@\"?(_ZN[^\s\"(]*)", code))
    others = sorted(called - {result.fndesc.llvm_func_name})
    if others:
        raise AssertionError(
            f"{name} calls compiled functions of their own, {others}: make them with "
            "sparsekit.kernels.intrinsics.inlined"
        )
    # Every exception leaves this in the optimised code, and every allocation has one.
    if "picklebuf" in code:
        raise AssertionError(
            f"{name} allocates or can raise, which a thread could not report; "
            "a range with a variable step and a tuple with a variable index can raise too"
        )


def _folders() -> list[Path]:
    from numba.core import config

    named = getattr(config, "CACHE_DIR", "")
    chosen = [Path(named) / "sparsekit"] if named else []
    own = Path(__file__).resolve().parent / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [*chosen, own, *([user / "sparsekit" / "kernels"] if user.is_absolute() else [])]


class _DiskCache:
    """Where Numba's compiler looks for a kernel and leaves it: one file, whole or absent."""

    def __init__(self, function: Callable[..., Any], constants: str, sources: bytes) -> None:
        self._function = function
        self._constants = constants
        self._sources = sources

    def _file_name(self, target: Any) -> str:
        import llvmlite
        import numba

        from sparsekit.kernels.vector_ir import LANES, REGISTERS

        key = (
            # Of the processor itself, whatever Numba is told about it.
            (LANES, REGISTERS),
            self._constants,
            target.codegen().magic_tuple(),
            (platform.python_implementation(), platform.python_version_tuple()[:2]),
            (numba.__version__, llvmlite.__version__, np.__version__),
        )
        name = re.sub(r"[^\w.]", "", f"{self._function.__module__}.{self._function.__qualname__}")
        return f"{name[-120:]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.kernel"

    def _stamp(self, body: bytes) -> bytes:
        return hashlib.sha256(self._sources + body).digest()

    def load_overload(self, _signature: Any, target: Any) -> Any:
        from numba.core.compiler import CompileResult

        target.refresh()
        name = self._file_name(target)
        for folder in _folders():
            try:
                content = (folder / name).read_bytes()
            except OSError:
                continue
            # Of other sources, or damaged.
            if content[:32] != self._stamp(content[32:]):
                continue
            return CompileResult._rebuild(target, *pickle.loads(content[32:]))
        return None

    def save_overload(self, _signature: Any, result: Any) -> None:
        from numba.core.serialize import dumps

        # Links what the kernel calls, and only then is its code what will run.
        body = dumps(result._reduce())
        _check(result)
        assert not result.library.has_dynamic_globals
        name = self._file_name(result.target_context)
        for folder in _folders():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _write_whole(folder / name, self._stamp(body) + body)
            except OSError:
                continue
            return


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
