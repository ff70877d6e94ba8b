"""Large float32 buffers that are used again instead of being given back to the system.

Fresh pages cost about as much as writing them: on a step that is bound by memory this would be a
large part of its time. A buffer returns here when the last tensor on its memory is gone.
"""

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SMALLEST_BYTES = 1 << 19
"""Smaller tensors come from torch's own allocator."""
_ALIGNMENT = 64
# Of a buffer that is used again for something smaller, at most this share is left unused.
_MOST_UNUSED = 0.125

Block = npt.NDArray[np.float32]

_lock = threading.Lock()
_free: list[Block] = []
_free_bytes = 0
_lent_bytes = 0
_peak_lent_bytes = 0
# A tensor may die at any moment, also when the collector runs while this very thread holds the
# lock: what comes back waits here until the lock is free.
_returned: deque[Block] = deque()


def empty(shape: Sequence[int]) -> Tensor:
    """Return a float32 tensor on the CPU with arbitrary content, 64-byte aligned."""
    count = math.prod(shape)
    if 4 * count < SMALLEST_BYTES:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    block = _take(count)
    # In its final shape: a torch view could not be changed in place behind an autograd function.
    array = block[:count].reshape(shape)
    tensor = torch.from_numpy(array)
    # torch keeps this very array object until the tensor's memory is freed.
    weakref.finalize(array, _give_back, block).atexit = False
    return tensor


def _take(count: int) -> Block:
    global _free_bytes, _lent_bytes, _peak_lent_bytes
    with _lock:
        _sort_returned()
        best = -1
        for i, block in enumerate(_free):
            fits = count <= block.size <= count / (1 - _MOST_UNUSED)
            if fits and (best < 0 or block.size < _free[best].size):
                best = i
        found = None
        if best >= 0:
            found = _free.pop(best)
            _free_bytes -= found.nbytes
        _lent_bytes += 4 * count if found is None else found.nbytes
        _peak_lent_bytes = max(_peak_lent_bytes, _lent_bytes)
    if found is not None:
        return found
    try:
        raw = np.empty(count + _ALIGNMENT // 4, np.float32)
    except MemoryError:
        with _lock:
            _lent_bytes -= 4 * count
        release()
        raise
    start = -raw.ctypes.data % _ALIGNMENT // 4
    return raw[start : start + count]


def _give_back(block: Block) -> None:
    _returned.append(block)
    if _lock.acquire(blocking=False):
        try:
            _sort_returned()
        finally:
            _lock.release()


def _sort_returned() -> None:
    """Put what came back among the free buffers; the caller holds the lock."""
    global _free_bytes, _lent_bytes
    while _returned:
        block = _returned.popleft()
        _lent_bytes -= block.nbytes
        _free.append(block)
        _free_bytes += block.nbytes
    # Never keep more than was in use at one time: old sizes go first.
    while _free_bytes + _lent_bytes > _peak_lent_bytes and len(_free) > 1:
        _free_bytes -= _free.pop(0).nbytes


def release() -> None:
    """Give all unused buffers back to the system."""
    global _free_bytes, _peak_lent_bytes
    with _lock:
        _sort_returned()
        _free.clear()
        _free_bytes = 0
        _peak_lent_bytes = _lent_bytes


def _after_fork() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
