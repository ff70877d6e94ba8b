"""Numba kernels that move data between torch's layout and padded planes, and weights to lists.

geometry.py has the layout.
"""

from typing import Any

import numpy as np

from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.memory import clear_bytes, copy_bytes, load_float, load_int, store_float
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record

PACK = record(
    "source", "target", "sums", "channels", "samples", "source_voxels",
    "depth", "height", "width", "before_d", "before_h", "before_w",
    "pitch", "plane", "channel", "sample",
)  # fmt: skip


@inlined(fastmath={"contract", "reassoc", "nsz"})
def _row_sum(source, count):  # pragma: no cover - compiled
    total = np.float32(0.0)
    for i in range(count):
        total += load_float(source + 4 * i)
    return total


@kernel(PACK)
def pack(job: Any) -> None:  # pragma: no cover - compiled
    """Copy (samples, channels, depth, height, width) into padded planes; the rest becomes 0.

    Where ``sums`` is not 0, the sum of each channel of each sample goes there, added up in float64.
    """
    depth, height, width = job.depth, job.height, job.width
    before_d, before_h, before_w = job.before_d, job.before_h, job.before_w
    pitch, plane = 4 * job.pitch, 4 * job.plane
    channels = job.channels
    part = take(job)
    while part < job.parts:
        sample, c = part // channels, part % channels
        source = job.source + 4 * part * job.source_voxels
        place = job.target + 4 * (sample * job.sample + c * job.channel)
        end = place + 4 * job.channel
        if c == channels - 1:
            end = job.target + 4 * (sample + 1) * job.sample
        total = 0.0
        filled_to = place
        for d in range(depth):
            for h in range(height):
                begin = place + (before_d + d) * plane + (before_h + h) * pitch + 4 * before_w
                clear_bytes(filled_to, begin - filled_to)
                copy_bytes(begin, source, 4 * width)
                if job.sums != 0:
                    total += np.float64(_row_sum(source, width))
                filled_to = begin + 4 * width
                source += 4 * width
        clear_bytes(filled_to, end - filled_to)
        if job.sums != 0:
            store_float(job.sums + 4 * part, np.float32(total))
        part = take(job)


CLASSES = record(
    "dense", "padded", "channels", "samples", "to_padded",
    "depth", "height", "width", "stride_d", "stride_h", "stride_w", "pad_d", "pad_h", "pad_w",
    "size_d", "size_h", "size_w", "pitch", "plane", "channel", "sample",
)  # fmt: skip


@kernel(CLASSES)
def move_classes(job: Any) -> None:  # pragma: no cover - compiled
    """Move between a dense grid and its classes of a strided convolution, either way.

    To the classes, what no voxel fills becomes 0; from them, a voxel that no output reads gets 0.
    """
    channels = job.channels
    stride_d, stride_h, stride_w = job.stride_d, job.stride_h, job.stride_w
    pitch, plane, channel = job.pitch, job.plane, job.channel
    part = take(job)
    while part < job.parts:
        sample, c = part // channels, part % channels
        dense = job.dense + 4 * part * job.depth * job.height * job.width
        padded = job.padded + 4 * (sample * job.sample + c * channel)
        if job.to_padded != 0:
            for k in range(stride_d * stride_h * stride_w):
                begin = 4 * k * channels * channel
                end = begin + 4 * channel
                if c == channels - 1 and k == stride_d * stride_h * stride_w - 1:
                    end = job.padded + 4 * (sample + 1) * job.sample - padded
                clear_bytes(padded + begin, end - begin)
        for d in range(job.depth):
            at_d = d + job.pad_d
            for h in range(job.height):
                at_h = h + job.pad_h
                inside = at_d // stride_d < job.size_d and at_h // stride_h < job.size_h
                k_row = (at_d % stride_d * stride_h + at_h % stride_h) * stride_w
                row = at_d // stride_d * plane + at_h // stride_h * pitch
                for w in range(job.width):
                    at_w = w + job.pad_w
                    here = inside and at_w // stride_w < job.size_w
                    number = (k_row + at_w % stride_w) * channels * channel + row + at_w // stride_w
                    if job.to_padded != 0:
                        if here:
                            store_float(padded + 4 * number, load_float(dense))
                    elif here:
                        store_float(dense, load_float(padded + 4 * number))
                    else:
                        store_float(dense, np.float32(0.0))
                    dense += 4
        part = take(job)


GATHER = record("weight", "index", "values", "count")


@kernel(GATHER)
def gather(job: Any) -> None:  # pragma: no cover - compiled
    """Collect the weights of a list in its order."""
    part = take(job)
    while part < job.parts:
        begin = job.count * part // job.parts
        end = job.count * (part + 1) // job.parts
        for k in range(begin, end):
            store_float(
                job.values + 4 * k, load_float(job.weight + 4 * load_int(job.index + 4 * k))
            )
        part = take(job)


SCATTER = record(
    "grad", "grad_bytes", "index", "starts", "sums", "sums_part", "tile_parts", "rows", "spread"
)


@kernel(SCATTER)
def scatter(job: Any) -> None:  # pragma: no cover - compiled
    """Add the partial sums of each weight and put them in their places; see `cpu.backward`."""
    part = take(job)
    while part < job.parts:
        for row in range(job.rows * part // job.parts, job.rows * (part + 1) // job.parts):
            begin = load_int(job.starts + 4 * row)
            for k in range(begin, load_int(job.starts + 4 * (row + 1))):
                place = job.sums + 4 * (k + job.spread * row)
                total = 0.0
                for _ in range(job.tile_parts):
                    total += np.float64(load_float(place))
                    place += job.sums_part
                store_float(job.grad + 4 * load_int(job.index + 4 * k), np.float32(total))
        part = take(job)
