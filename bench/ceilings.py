"""What limits the kernels on this machine: memory's stream, and loads from the first cache.

A masked convolution adds one weight times one vector of input to a register tile. Each product
needs one vector from an address that is not a multiple of the vector's size, so that, out of the
first cache, the number of such loads per second bounds it: `loads` runs the same instructions as
the kernels, over random places in 24 KiB.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from sparsekit.bench.pairs import Case
from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import Kernel, kernel
from sparsekit.kernels.memory import load_float, load_int
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import (
    LANES,
    REGISTERS,
    add_product,
    add_product_and_dot,
    filled,
    load_tile,
    store_tile,
)

STREAM_BYTES = 256 << 20
_CACHE_BYTES = 24 << 10
_ENTRIES = 512
_REPEATS = 400
# Vectors of a tile, as the largest of the kernels have them.
FORWARD_VECTORS = REGISTERS - 6
BACKWARD_VECTORS = (REGISTERS - 6) // 2

JOB = record("x", "offsets", "values", "entries", "repeats", "out")


@cache
def _forward(vectors: int) -> Kernel:
    @kernel(JOB)
    def loads_forward(job: Any) -> None:  # pragma: no cover - compiled
        x, offsets, values, entries = job.x, job.offsets, job.values, job.entries
        out = job.out
        part = take(job)
        while part < job.parts:
            total = filled(vectors, np.float32(0.0))
            for _ in range(job.repeats):
                k = 0
                while k < entries:
                    total = add_product(
                        total, load_float(values + 4 * k), x + 4 * load_int(offsets + 4 * k),
                        0, 1, vectors,
                    )  # fmt: skip
                    k += 1
            store_tile(total, out + part * 64 * vectors, 0, 1, vectors)
            part = take(job)

    return loads_forward


@cache
def _backward(vectors: int) -> Kernel:
    @kernel(JOB)
    def loads_backward(job: Any) -> None:  # pragma: no cover - compiled
        x, offsets, values, entries = job.x, job.offsets, job.values, job.entries
        out = job.out
        part = take(job)
        while part < job.parts:
            total = filled(vectors, np.float32(0.0))
            own = load_tile(x, 0, 1, vectors)
            place = out + part * 64 * (vectors + 1)
            for _ in range(job.repeats):
                k = 0
                while k < entries:
                    total, product = add_product_and_dot(
                        total, own, load_float(values + 4 * k), x + 4 * load_int(offsets + 4 * k),
                        0, 1, vectors,
                    )  # fmt: skip
                    store_tile(product, place, 0, 1, 1)
                    k += 1
            store_tile(total, place + 64, 0, 1, vectors)
            part = take(job)

    return loads_backward


def loads(backward: bool, threads: int) -> tuple[Callable[[], None], int]:
    """Return a call that runs products out of the first cache, and the multiply-adds it makes.

    Parameters
    ----------
    backward : bool
        Use each loaded vector twice, as the fused backward pass does.
    threads : int
        All of them do the same amount.
    """
    vectors = BACKWARD_VECTORS if backward else FORWARD_VECTORS
    random = np.random.default_rng(1)
    x = np.zeros(_CACHE_BYTES // 4, np.float32)
    offsets = random.integers(0, x.size - LANES * vectors, _ENTRIES).astype(np.int32)
    values = np.zeros(_ENTRIES, np.float32)
    out = np.zeros(threads * 16 * (vectors + 8), np.float32)
    made = _backward(vectors) if backward else _forward(vectors)
    job = made.job(
        parts=threads, x=x.ctypes.data, offsets=offsets.ctypes.data, values=values.ctypes.data,
        entries=_ENTRIES, repeats=_REPEATS, out=out.ctypes.data,
    )  # fmt: skip

    def call(*_kept: object) -> None:
        parallel.run(made.address, job, threads)

    products = threads * _REPEATS * _ENTRIES * vectors * LANES
    # The job holds addresses only: the call keeps the arrays.
    kept = partial(call, x, offsets, values, out)
    return kept, 2 * products if backward else products


def stream_case() -> Case:
    """Read and copy more memory than any cache holds, with torch's threads."""
    source = torch.ones(STREAM_BYTES // 4)
    target = torch.empty_like(source)
    labels = {"what": "ceiling: memory"}
    # What a write reads first, where the copy does not go past the caches, is not counted.
    notes = {"bytes": {"copy": 2 * STREAM_BYTES, "read": STREAM_BYTES}}
    return Case(labels, {"copy": lambda: target.copy_(source), "read": source.sum}, notes)


def loads_case() -> Case:
    """Products out of the first cache: on one thread and all, for either pass."""
    threads = torch.get_num_threads()
    sides: dict[str, Callable[[], None]] = {}
    products = {}
    for count in sorted({1, threads}):
        for name, backward in (("forward", False), ("backward", True)):
            side = f"{name}, {count} thread{'s' if count > 1 else ''}"
            sides[side], products[side] = loads(backward, count)
    return Case({"what": "ceiling: loads from the first cache"}, sides, {"multiply_adds": products})
