"""Plans kept from call to call, beside the mask that they are of."""

import ctypes
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.kernels import parallel
from sparsekit.kernels.bitmap import cpu as bitmap
from sparsekit.kernels.blocks import bits_of_bools, load_u64
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.parallel import Prepared
from sparsekit.kernels.record import record

# From here on a mask is compared with bits, by threads.
_LEAST_PACKED = 1 << 15
_ENTRIES_PER_THREAD = 1 << 17

_COMPARE = record("mask", "bits", "words", "differs")
_EIGHT = np.uint64(8)
_WORD = np.uint64(64)


@kernel(_COMPARE)
def _compare(job: Any) -> None:  # pragma: no cover - compiled
    """Set ``differs`` unless the bools of a mask are those bits."""
    mask, bits = np.uint64(job.mask), np.uint64(job.bits)
    part = parallel.take(job)
    while part < job.parts:
        different = np.uint64(0)
        for i in range(job.words * part // job.parts, job.words * (part + 1) // job.parts):
            word = np.uint64(i)
            different |= bits_of_bools(mask + word * _WORD) ^ load_u64(bits + word * _EIGHT)
        if different != np.uint64(0):
            # Whoever else does so writes the same.
            job.differs = 1
        part = parallel.take(job)


class PlanCache:
    """Plans of one mask tensor in its present state.

    They belong to the very tensor: a copy or a pickle of it starts without plans. Every call
    compares the mask with a copy of it: torch's count of changes misses those through numpy,
    ``mask.data`` and DistributedDataParallel's broadcasts, and inference mode does not count.
    """

    MOST = 4

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.detach().clone(memory_format=torch.contiguous_format)
        """As it was when the cache was made, contiguous."""
        self.density = np.count_nonzero(self.mask.numpy()) / max(1, mask.numel())
        self.plans: dict[Any, Any] = {}
        count = mask.numel()
        self._packed = 0 if count < _LEAST_PACKED else count - count % 64
        if self._packed:
            bits = bitmap.pack(self.mask.numpy().reshape(-1)[: self._packed])
            threads = parallel.thread_count(count, _ENTRIES_PER_THREAD)
            job = _compare.job(
                parts=threads, bits=bits.ctypes.data, words=self._packed // 64
            )  # fmt: skip
            self._compare = Prepared(_compare.address, job, threads, keeps=bits)

    def is_of(self, mask: Tensor) -> bool:
        """Whether the plans are those of the tensor as it is now."""
        # Its storage may have been exchanged for one of another size.
        if mask.shape != self.mask.shape:
            return False
        if not mask.is_contiguous():
            return torch.equal(self.mask, mask)
        own, other, count = self.mask.data_ptr(), mask.data_ptr(), mask.numel()
        if self._packed and self._compare.run(mask=other)["differs"]:
            return False
        # Some 15 times faster than torch.equal, which compares byte by byte.
        rest = count - self._packed
        return not _memcmp(own + self._packed, other + self._packed, rest)

    @classmethod
    def of(cls, mask: Tensor) -> "PlanCache":
        """Return the cache of a mask, a new one if the mask has changed."""
        compared = _thread.__dict__.pop("compared", None)
        if compared is not None and compared[0] is mask:
            last: PlanCache = compared[1]
            return last
        entry = _caches.get(id(mask))
        if entry is not None and entry[0]() is mask and entry[1].is_of(mask):
            return entry[1]
        found = cls(mask)
        key = id(mask)
        _caches[key] = weakref.ref(mask, lambda dead: _drop(key, dead)), found
        return found

    @classmethod
    def compare(cls, mask: Tensor) -> "PlanCache":
        """Do as `of`, and spare this thread's next `of` for the same mask the comparison.

        For the first of two looks within one call, between which nothing else can run. Whoever
        takes no second look calls `forget`.
        """
        cls.forget()
        found = cls.of(mask)
        _thread.compared = mask, found
        return found

    @staticmethod
    def forget() -> None:
        """Let the next `of` compare again."""
        _thread.__dict__.pop("compared", None)

    def get(self, key: Any, make: Any) -> Any:
        """Return the plan with this key, made if there is none; the oldest makes room."""
        plan = self.plans.get(key)
        if plan is None:
            plan = make()
            # Other threads may do the same meanwhile.
            for old in list(self.plans)[: len(self.plans) + 1 - self.MOST]:
                self.plans.pop(old, None)
            self.plans[key] = plan
        return plan


def watched(mask: Tensor) -> Tensor | None:
    """What a forward pass saves of its mask, so that torch refuses the backward pass if it changed.

    A mask that was made in inference mode counts no changes, and torch would refuse to save it.
    """
    return None if mask.is_inference() else mask


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memcmp.restype = ctypes.c_int

_thread = threading.local()

# Beside the tensors, not on them: what stands on a tensor goes into its pickle.
_caches: dict[int, tuple[weakref.ref[Tensor], PlanCache]] = {}


def _drop(key: int, dead: weakref.ref[Tensor]) -> None:
    """Forget a mask that is gone, unless another has its number by now."""
    entry = _caches.get(key)
    if entry is not None and entry[0] is dead:
        del _caches[key]
