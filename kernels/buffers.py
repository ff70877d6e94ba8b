"""Large float32 buffers that are used again instead of being given back to the system.

Fresh pages cost about as much as writing them: on a step that is bound by memory this would be a
large part of its time. A buffer returns here when the last tensor on its memory is gone.
"""

import math
import threading
import weakref
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


def empty(shape: Sequence[int]) -> Tensor:
    """Return a float32 tensor on the CPU with arbitrary content, 64-byte aligned."""
    count = math.prod(shape)
    if 4 * count < SMALLEST_BYTES:
        return torch.empty(*shape, dtype=torch.float32)
    block = _take(count)
    view = block[:count]
    tensor = torch.from_numpy(view)
    # torch keeps this very array object until the tensor's memory is freed.
    weakref.finalize(view, _give_back, block).atexit = False
    return tensor.view(*shape)


def _take(count: int) -> Block:
    global _free_bytes, _lent_bytes, _peak_lent_bytes
    with _lock:
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
    raw = np.empty(count + _ALIGNMENT // 4, np.float32)
    start = -raw.ctypes.data % _ALIGNMENT // 4
    return raw[start : start + count]


def _give_back(block: Block) -> None:
    global _free_bytes, _lent_bytes
    with _lock:
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
        _free.clear()
        _free_bytes = 0
        _peak_lent_bytes = _lent_bytes
