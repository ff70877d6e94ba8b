"""Weights with 0 at the pruned ones, with Numba: torch's own selection takes some ten times longer.

A dense convolution of a large layer would wait for it twice, in the forward pass and in that of
the gradient.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekit.kernels import buffers, parallel
from sparsekit.kernels.batched import stands_for_others
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.mask_vectors import copy_kept
from sparsekit.kernels.memory import load_byte, load_float, store_float
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import LANES

_ENTRIES_PER_THREAD = 1 << 17

JOB = record("source", "target", "mask", "count")


@kernel(JOB)
def select(job: Any) -> None:  # pragma: no cover - compiled
    """Copy float32 numbers, with 0 where the mask's byte is 0."""
    count, source, target, mask = job.count, job.source, job.target, job.mask
    part = parallel.take(job)
    while part < job.parts:
        i = count * part // job.parts
        last = count * (part + 1) // job.parts
        while i + LANES <= last:
            copy_kept(target + 4 * i, source + 4 * i, mask + i)
            i += LANES
        while i < last:
            value = np.float32(0.0)
            if load_byte(mask + i) != 0:
                value = load_float(source + 4 * i)
            store_float(target + 4 * i, value)
            i += 1
        part = parallel.take(job)


class _KeptWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.save_for_forward(mask)
        return select_kept(weight, mask)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        mask = ctx.saved_tensors[0]
        if stands_for_others(grad):
            return torch.where(mask, grad, 0.0), None
        # The function itself, so that gradients can be differentiated again.
        return kept_weights(grad, mask), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.where(ctx.saved_tensors[0], tangent, 0.0)


def select_kept(weight: Tensor, mask: Tensor) -> Tensor:
    """Do as `kept_weights`, unseen by autograd."""
    weight, mask = weight.contiguous(), mask.contiguous()
    count = weight.numel()
    found = buffers.empty(tuple(weight.shape))
    threads = parallel.thread_count(count, _ENTRIES_PER_THREAD)
    job = select.job(
        parts=threads, source=weight.data_ptr(), target=found.data_ptr(), mask=mask.data_ptr(),
        count=count,
    )  # fmt: skip
    parallel.run(select.address, job, threads)
    return found


def kept_weights(weight: Tensor, mask: Tensor) -> Tensor:
    """Run the kernel on float32 on a CPU; see `reference.kept_weights`."""
    y: Tensor = _KeptWeights.apply(weight, mask)  # type: ignore[no-untyped-call]
    return y
