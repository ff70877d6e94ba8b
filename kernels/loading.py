"""Modules that are imported at their first use, by one thread at a time.

Each of them imports Numba or Triton and much else, every one in another order: two threads that
start with two of them could each find a module that the other has only half imported.
"""

import importlib
import os
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


# A child of a fork would have to live with what another thread has half imported.
os.register_at_fork(
    before=lambda: _lock.acquire(),
    after_in_parent=lambda: _lock.release(),
    after_in_child=_after_fork,
)


@cache
def at_first_use(module: str, *before: str) -> Callable[[], Any]:
    """Return a function that imports a module of this package, once, and returns it.

    Parameters
    ----------
    module : str
        Its name below ``sparsekit.kernels``.
    *before : str
        Modules that are imported first; those of the CPU kernels by default.
    """
    first = before or ("numba", "sparsekit.kernels.parallel")
    found: Any = None

    def load() -> Any:
        nonlocal found
        if found is None:
            with _lock:
                for name in first:
                    importlib.import_module(name)
                found = importlib.import_module(f"sparsekit.kernels.{module}")
        return found

    return load
