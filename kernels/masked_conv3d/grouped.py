"""Forward pass with all weights, zeros included, for masks that keep most of them.

Several output channels share each vector that is loaded, so that multiply-adds set the pace. The
layout and the walk are those of `sparsekit.kernels.masked_conv3d.cpu`.
"""

from functools import cache
from typing import Any

import numpy as np

from sparsekit.kernels.compiled import Kernel, kernel
from sparsekit.kernels.masked_conv3d.geometry import CHANNELS_AT_ONCE
from sparsekit.kernels.masked_conv3d.rows import stream_numbers
from sparsekit.kernels.memory import load_byte, load_float, load_int, store_float
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import (
    VECTOR_BYTES,
    add_products,
    biased,
    leave_tile,
    load_tile,
    store_tile,
    stream_tile,
)

WEIGHTS = record("weight", "mask", "packed", "c_out", "columns")


@kernel(WEIGHTS)
def pack_weights(job: Any) -> None:  # pragma: no cover - compiled
    """Put the weights of `CHANNELS_AT_ONCE` output channels side by side; pruned ones are 0."""
    columns = job.columns
    part = take(job)
    while part < job.parts:
        place = job.packed + 4 * part * CHANNELS_AT_ONCE * columns
        for i in range(columns):
            for q in range(CHANNELS_AT_ONCE):
                o = part * CHANNELS_AT_ONCE + q
                # Rows behind the last channel repeat it; nobody reads their results.
                at = min(o, job.c_out - 1) * columns + i
                value = load_float(job.weight + 4 * at)
                # A selection without a branch: nobody could predict it.
                store_float(place, value if load_byte(job.mask + at) != 0 else np.float32(0.0))
                place += 4
        part = take(job)


FORWARD = record(
    "x", "y", "weights", "bias", "taps", "tap_count", "scratch",
    "c_in", "c_out", "tile_parts", "steps", "sequence",
    "x_sample", "x_channel", "x_plane", "y_sample", "y_channel", "y_plane",
    "scratch_part", "out_depth", "dense", "stream", "lanes", "firsts",
)  # fmt: skip


@cache
def forward(a: int, b: int) -> Kernel:
    """Kernel of the forward pass for tiles of ``a`` planes by ``b`` vectors in each channel."""
    count = a * b
    row_bytes = b * VECTOR_BYTES
    tile_bytes = count * VECTOR_BYTES
    all_rows = CHANNELS_AT_ONCE * a
    line_bytes = row_bytes + VECTOR_BYTES

    @kernel(FORWARD)
    def masked_conv3d_grouped(job: Any) -> None:  # pragma: no cover - compiled
        c_in, c_out, taps, tap_count = job.c_in, job.c_out, job.taps, job.tap_count
        weights, bias, x_channel, x_plane = job.weights, job.bias, job.x_channel, job.x_plane
        y_channel, y_plane = job.y_channel, job.y_plane
        steps, sequence, tile_parts = job.steps, job.sequence, job.tile_parts
        out_depth, dense, stream = job.out_depth, job.dense, job.stream
        part = take(job)
        while part < job.parts:
            rows = job.scratch + part * job.scratch_part
            line = rows + CHANNELS_AT_ONCE * tile_bytes
            chunk = part % tile_parts
            sample = part // tile_parts
            for s in range(sequence * chunk // tile_parts, sequence * (chunk + 1) // tile_parts):
                tile = s // steps
                plane = s % steps * a
                source = job.x + sample * job.x_sample + plane * x_plane + tile * row_bytes
                target = job.y + sample * job.y_sample + plane * y_plane
                lanes = job.lanes + 2 * tile * b
                before = load_int(job.firsts + 4 * tile)
                voxels = load_int(job.firsts + 4 * tile + 4) - before
                weight = weights
                for o in range(0, c_out, CHANNELS_AT_ONCE):
                    total = biased(bias + 4 * o, CHANNELS_AT_ONCE, count)
                    for c in range(c_in):
                        here = source + c * x_channel
                        for t in range(tap_count):
                            total = add_products(
                                total, weight, here + 4 * load_int(taps + 4 * t), x_plane, a, b
                            )
                            weight += 4 * CHANNELS_AT_ONCE
                    store_tile(total, rows, row_bytes, all_rows, b)
                    for q in range(min(CHANNELS_AT_ONCE, c_out - o)):
                        part_total = load_tile(rows + q * tile_bytes, row_bytes, a, b)
                        place = target + (o + q) * y_channel
                        left = out_depth - plane
                        if dense == 0:
                            place += tile * row_bytes
                            if stream != 0:
                                stream_tile(part_total, place, y_plane, a, b)
                            else:
                                store_tile(part_total, place, y_plane, a, b)
                        elif stream == 0:
                            leave_tile(part_total, place + 4 * before, y_plane, lanes, left, a, b)
                        else:
                            leave_tile(part_total, line, line_bytes, lanes, left, a, b)
                            for i in range(min(a, left)):
                                stream_numbers(
                                    place + 4 * before + i * y_plane, line + i * line_bytes, voxels
                                )
            part = take(job)

    return masked_conv3d_grouped
