"""Lists of unpruned weights, made from a mask's bits.

A row of the forward pass belongs to one output channel, one of the backward pass to one channel of
the padded input; so threads that take channels never write to the same row. The entries of a row
are counted first, and filled in once all rows' starts are known.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsekit.kernels import parallel
from sparsekit.kernels.bitmap import cpu as bitmap
from sparsekit.kernels.blocks import count_ones, load_u64, lowest_one
from sparsekit.kernels.compiled import Kernel, kernel
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.masked_conv3d.geometry import Geometry
from sparsekit.kernels.memory import load_int, store_int
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import Job, record

Ints = npt.NDArray[np.int32]

_ENTRIES_PER_THREAD = 1 << 14
# Taps that are looked at together: with up to 7 bits before them they fit into a word.
_AT_ONCE = 56
_ONE = np.uint64(1)

_LISTS = record(
    "bits", "starts", "offsets", "index", "block", "rows", "c_in", "c_out", "group_in", "group_out",
    "taps", "tap_offsets", "classes", "strided", "channel", "fill",
)  # fmt: skip


@inlined()
def _kept(bits, position, count):  # pragma: no cover - compiled
    """Up to `_AT_ONCE` bits from a position on."""
    word = load_u64(np.uint64(bits + position // 8)) >> np.uint64(position % 8)
    return word & ((_ONE << np.uint64(count)) - _ONE)


@kernel(_LISTS)
def _forward(job: Any) -> None:  # pragma: no cover - compiled
    """Count or fill the rows of output channels; starts move to their rows' ends."""
    taps, group_in, c_in, c_out, block = job.taps, job.group_in, job.c_in, job.c_out, job.block
    bits, starts, offsets, index = job.bits, job.starts, job.offsets, job.index
    group_out, channel, fill = job.group_out, job.channel, job.fill
    tap_offsets, classes = job.tap_offsets, job.classes
    o = take(job)
    while o < job.parts:
        first = o // group_out * group_in
        position = o * group_in * taps
        for c in range(group_in):
            start = starts + 4 * (c // block * c_out + o)
            entry = load_int(start)
            tap = 0
            while tap < taps:
                word = _kept(bits, position + tap, min(_AT_ONCE, taps - tap))
                if fill == 0:
                    entry += np.int64(count_ones(word))
                else:
                    while word != np.uint64(0):
                        t = tap + np.int64(lowest_one(word))
                        word &= word - _ONE
                        row = load_int(classes + 4 * t) * c_in + first + c
                        store_int(index + 4 * entry, position + t)
                        store_int(
                            offsets + 4 * entry, row * channel + load_int(tap_offsets + 4 * t)
                        )
                        entry += 1
                tap += _AT_ONCE
            store_int(start, entry)
            position += taps
        o = take(job)


@kernel(_LISTS)
def _backward(job: Any) -> None:  # pragma: no cover - compiled
    """Count or fill the rows of input channels; starts move to their rows' ends."""
    taps, group_in, c_in, block = job.taps, job.group_in, job.c_in, job.block
    bits, starts, offsets, index = job.bits, job.starts, job.offsets, job.index
    group_out, channel, fill, rows = job.group_out, job.channel, job.fill, job.rows
    tap_offsets, classes, strided = job.tap_offsets, job.classes, job.strided
    c = take(job)
    while c < job.parts:
        group = c // group_in
        for o in range(group * group_out, (group + 1) * group_out):
            position = (o * group_in + c - group * group_in) * taps
            row = starts + 4 * (o // block * rows + c)
            tap = 0
            while tap < taps:
                word = _kept(bits, position + tap, min(_AT_ONCE, taps - tap))
                if fill == 0 and strided == 0:
                    store_int(row, load_int(row) + np.int64(count_ones(word)))
                    word = np.uint64(0)
                while word != np.uint64(0):
                    t = tap + np.int64(lowest_one(word))
                    word &= word - _ONE
                    start = row + 4 * load_int(classes + 4 * t) * c_in
                    entry = load_int(start)
                    store_int(start, entry + 1)
                    if fill != 0:
                        store_int(index + 4 * entry, position + t)
                        store_int(offsets + 4 * entry, o * channel + load_int(tap_offsets + 4 * t))
                tap += _AT_ONCE
        c = take(job)


def build_lists(
    mask: Tensor, geometry: Geometry, forward_block: int, backward_block: int
) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints, Ints]]:
    """Starts, offsets and positions of both passes' entries; arguments as of `plan.build`."""
    shape = geometry.shape
    rows = geometry.source.channels
    packed = bitmap.pack(mask.numpy().reshape(-1))
    # Words are read from any byte on.
    bits = np.concatenate([packed, np.zeros(8, np.uint8)])
    classes = np.array(geometry.tap_classes, np.int32)
    common = {
        "bits": bits.ctypes.data, "c_in": shape.c_in, "c_out": shape.c_out,
        "group_in": shape.c_in // shape.groups, "group_out": shape.c_out // shape.groups,
        "taps": len(classes), "classes": classes.ctypes.data, "rows": rows,
        "strided": int(geometry.classes != (1, 1, 1)),
    }  # fmt: skip
    forward_taps = np.array(geometry.source_taps, np.int32)
    backward_taps = np.array(geometry.gradient_taps, np.int32)
    forward_rows = -(-shape.c_in // shape.groups // forward_block) * shape.c_out
    forward = _forward.job(
        parts=shape.c_out, block=forward_block, channel=geometry.source.channel,
        tap_offsets=forward_taps.ctypes.data, **common,
    )  # fmt: skip
    backward = _backward.job(
        parts=shape.c_in, block=backward_block, channel=geometry.gradient.channel,
        tap_offsets=backward_taps.ctypes.data, **common,
    )  # fmt: skip
    threads = parallel.thread_count(mask.numel(), _ENTRIES_PER_THREAD)
    backward_rows = -(-shape.c_out // backward_block) * rows
    return (
        count_and_fill(_forward, forward, forward_rows, threads),
        count_and_fill(_backward, backward, backward_rows, threads),
    )


def count_and_fill(kernel_: Kernel, job: Job, rows: int, threads: int) -> tuple[Ints, Ints, Ints]:
    """Run a kernel twice: to count the entries of each row, and to fill them in."""
    # One place in front: filling moves each start to the next row's.
    starts = np.zeros(rows + 1, np.int32)
    job["starts"] = starts.ctypes.data + 4
    parallel.run(kernel_.address, job, threads)
    np.cumsum(starts, out=starts)
    entries = int(starts[-1])
    offsets, index = np.empty(entries, np.int32), np.empty(entries, np.int32)
    # The starts of the rows stand one place further down than their counts did.
    ends = starts[:-1].copy()
    job.set(
        {
            "starts": ends.ctypes.data, "offsets": offsets.ctypes.data,
            "index": index.ctypes.data, "fill": 1,
        }
    )  # fmt: skip
    parallel.run(kernel_.address, job, threads)
    return starts, offsets, index
