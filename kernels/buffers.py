"""Large float32 buffers that are used again instead of being given back to the system.

Fresh pages cost about as much as writing them: on a step that is bound by memory this would be a
large part of its time. A buffer is a range of a slab, and returns to it when the last tensor on its
memory is gone; free neighbours become one. A training step asks for the same sizes in the same
order each time, with all slabs free at its start, so that it takes no new memory after the first
two.
"""

import bisect
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
# In float32 numbers: a line of the cache, and what the system has huge pages for.
_ALIGNMENT = 16
_LEAST_SLAB = 1 << 20
# Of the most that was lent at one time: what is kept, as ranges of many sizes never fit exactly.
_MOST_KEPT = 1.5

Numbers = npt.NDArray[np.float32]


class _Slab:
    """Memory from the system, and which ranges of it are free."""

    __slots__ = ("free", "numbers")

    def __init__(self, count: int) -> None:
        raw = np.empty(count + _ALIGNMENT, np.float32)
        start = -raw.ctypes.data % (4 * _ALIGNMENT) // 4
        self.numbers: Numbers = raw[start : start + count]
        self.free = [(0, count)]
        """Begin and end of each range, in order."""

    @property
    def unused(self) -> bool:
        """Whether all of it is free."""
        return self.free == [(0, self.numbers.size)]

    def give_back(self, begin: int, end: int) -> None:
        """Join a range with the free ones beside it."""
        at = bisect.bisect(self.free, (begin, end))
        if at < len(self.free) and self.free[at][0] == end:
            end = self.free.pop(at)[1]
        if at and self.free[at - 1][1] == begin:
            at -= 1
            begin = self.free.pop(at)[0]
        self.free.insert(at, (begin, end))


Range = tuple[_Slab, int, int]

_lock = threading.Lock()
_slabs: list[_Slab] = []
_held = 0
_lent = 0
_most_lent = 0
# A tensor may die at any moment, also when the collector runs while this very thread holds the
# lock: what comes back waits here until the lock is free.
_returned: deque[Range] = deque()


def empty(shape: Sequence[int]) -> Tensor:
    """Return a float32 tensor on the CPU with arbitrary content, 64-byte aligned."""
    count = math.prod(shape)
    if 4 * count < SMALLEST_BYTES:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    slab, begin, _ = taken = _take(count)
    # In its final shape: a torch view could not be changed in place behind an autograd function.
    array = slab.numbers[begin : begin + count].reshape(shape)
    tensor = torch.from_numpy(array)
    # torch keeps this very array object until the tensor's memory is freed.
    weakref.finalize(array, _give_back, taken).atexit = False
    return tensor


def held_bytes() -> tuple[int, int]:
    """Bytes lent to tensors at the moment, and bytes of all slabs."""
    with _lock:
        _sort_returned()
        return 4 * _lent, 4 * _held


def _take(count: int) -> Range:
    global _held, _lent, _most_lent
    size = -(-count // _ALIGNMENT) * _ALIGNMENT
    with _lock:
        _sort_returned()
        found = _best(size)
        if found is None:
            _make_room(size)
            slab = _Slab(max(size, _LEAST_SLAB))
            _slabs.append(slab)
            _held += slab.numbers.size
            found = slab, 0
        slab, at = found
        begin, end = slab.free[at]
        if end - begin == size:
            del slab.free[at]
        else:
            slab.free[at] = begin + size, end
        _lent += size
        _most_lent = max(_most_lent, _lent)
    return slab, begin, begin + size


def _best(size: int) -> tuple[_Slab, int] | None:
    """The smallest free range that is large enough."""
    best, least = None, 0
    for slab in _slabs:
        for at, (begin, end) in enumerate(slab.free):
            length = end - begin
            if length >= size and (best is None or length < least):
                best, least = (slab, at), length
    return best


def _make_room(size: int) -> None:
    """Drop unused slabs, the oldest first, if what is held would be more than is kept."""
    global _held
    most = _MOST_KEPT * max(_most_lent, _lent + size)
    for slab in [s for s in _slabs if s.unused]:
        if _held + max(size, _LEAST_SLAB) <= most:
            return
        _slabs.remove(slab)
        _held -= slab.numbers.size


def _give_back(taken: Range) -> None:
    _returned.append(taken)
    if _lock.acquire(blocking=False):
        try:
            _sort_returned()
        finally:
            _lock.release()


def _sort_returned() -> None:
    """Put what came back among the free ranges; the caller holds the lock."""
    global _lent
    while _returned:
        slab, begin, end = _returned.popleft()
        slab.give_back(begin, end)
        _lent -= end - begin


def release() -> None:
    """Give all memory that no tensor uses back to the system."""
    global _held, _most_lent
    with _lock:
        _sort_returned()
        _slabs[:] = [slab for slab in _slabs if not slab.unused]
        _held = sum(slab.numbers.size for slab in _slabs)
        _most_lent = _lent


def _after_fork() -> None:
    # Another thread of the parent may have held it.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
