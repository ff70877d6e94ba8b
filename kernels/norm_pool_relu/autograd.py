"""The Numba kernels as a differentiable function."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsekit.kernels.norm_pool_relu import cpu

# Below this many voxels a call is over before a second thread has started.
_VOXELS_PER_THREAD = 1 << 16


def _new_pool() -> None:
    global _pool
    # Its threads start with the work, not here.
    _pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="norm_pool_relu")


_pool: ThreadPoolExecutor
_new_pool()
# Threads do not survive a fork: the child starts its own.
os.register_at_fork(after_in_child=_new_pool)


def _over_channels(work: Callable[[slice], None], channels: int, voxels: int) -> None:
    """Call ``work`` on ranges of channels, on as many threads as torch would use.

    Channels are independent, so the result does not depend on the number of threads.
    """
    threads = max(1, min(torch.get_num_threads(), channels, voxels // _VOXELS_PER_THREAD))
    if threads == 1:
        work(slice(0, channels))
        return
    edges = [channels * i // threads for i in range(threads + 1)]
    ranges = [slice(a, b) for a, b in itertools.pairwise(edges)]
    others = [_pool.submit(work, part) for part in ranges[1:]]
    work(ranges[0])
    for done in others:
        done.result()


def _channels(tensor: Tensor) -> Any:
    """View (n, c, d, h, w) as a numpy array (n * c, d, h, w)."""
    return tensor.detach().numpy().reshape(-1, *tensor.shape[2:])


class _NormPoolReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        n, c, d, h, w = x.shape
        y = x.new_empty(n, c, d // 2, h // 2, w // 2)
        winner = torch.empty_like(y, dtype=torch.uint8)
        statistics = np.empty((n * c, 3), np.float32)
        source, target, chosen = _channels(x), _channels(y), _channels(winner)

        def work(part: slice) -> None:
            row, row_winner = np.empty(w, np.float32), np.empty(w, np.uint8)
            cpu.forward(
                source[part], eps, target[part], chosen[part], statistics[part],
                row, row_winner,
            )  # fmt: skip

        _over_channels(work, n * c, x.numel())
        ctx.save_for_backward(x, y, winner)
        ctx.statistics = statistics
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_y: Tensor
    ) -> tuple[Tensor, None]:
        x, y, winner = ctx.saved_tensors
        statistics = ctx.statistics
        grad_x = torch.empty_like(x)
        source, pooled, chosen = _channels(x), _channels(y), _channels(winner)
        incoming, outgoing = _channels(grad_y.contiguous()), _channels(grad_x)

        def work(part: slice) -> None:
            cpu.backward(
                source[part], pooled[part], chosen[part], statistics[part],
                incoming[part], outgoing[part],
            )  # fmt: skip

        _over_channels(work, len(statistics), x.numel())
        return grad_x, None


def norm_pool_relu(x: Tensor, *, eps: float) -> Tensor:
    """Run the Numba kernels; arguments are those that `sparsekit.ops` checked, float32 on a CPU."""
    y: Tensor = _NormPoolReLU.apply(x, float(eps))  # type: ignore[no-untyped-call]
    return y
