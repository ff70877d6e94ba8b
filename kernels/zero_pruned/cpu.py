"""Setting pruned entries to 0 with Numba: they are read, and written only where they are not 0."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.mask_vectors import any_bits_outside
from sparsekit.kernels.memory import load_byte, store_float
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import LANES

# Vectors that are looked at before anything is written.
_VECTORS = 4
_RUN = _VECTORS * LANES
_ENTRIES_PER_THREAD = 1 << 17

JOB = record("values", "mask", "count")


@kernel(JOB)
def zero(job: Any) -> None:  # pragma: no cover - compiled
    """Set float32 numbers to 0 where the mask's byte is 0."""
    count, values, mask = job.count, job.values, job.mask
    part = parallel.take(job)
    while part < job.parts:
        i = count * part // job.parts
        last = count * (part + 1) // job.parts
        while i + _RUN <= last:
            if any_bits_outside(values + 4 * i, mask + i, _VECTORS) != 0:
                for k in range(i, i + _RUN):
                    if load_byte(mask + k) == 0:
                        store_float(values + 4 * k, np.float32(0.0))
            i += _RUN
        while i < last:
            if load_byte(mask + i) == 0:
                store_float(values + 4 * i, np.float32(0.0))
            i += 1
        part = parallel.take(job)


def zero_pruned(parameter: Tensor, mask: Tensor) -> None:
    """Run the kernel on contiguous float32 on a CPU; see `reference.zero_pruned`."""
    count = parameter.numel()
    threads = parallel.thread_count(count, _ENTRIES_PER_THREAD)
    job = zero.job(
        parts=threads, values=parameter.data_ptr(), mask=mask.data_ptr(), count=count
    )  # fmt: skip
    parallel.run(zero.address, job, threads)
    # Autograd must know that the values have changed.
    torch.autograd.graph.increment_version(parameter)
