"""Numba kernels of masked 3D convolution over padded planes (geometry.py has the layout).

A tile of output voxels is summed up in registers while a list of unpruned weights goes by: one
vector load per multiply-add in the forward pass, and one per two multiply-adds in the backward
pass, where a loaded vector of the output's gradient serves the gradient of the input and that of
the weight. Tiles are walked along the depth first, so that a step needs one new plane; it is asked
for ahead. Weights are taken in blocks of channels whose planes stay in a cache.
"""

from functools import cache
from typing import Any

import numpy as np

from sparsekit.kernels.compiled import Kernel, kernel
from sparsekit.kernels.masked_conv3d.rows import (
    clear_rows,
    stream_numbers,
)
from sparsekit.kernels.memory import (
    clear_bytes,
    load_byte,
    load_float,
    load_int,
)
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record
from sparsekit.kernels.vector import (
    LANES,
    VECTOR_BYTES,
    add_lane_sums,
    add_product,
    add_product_and_dot,
    filled,
    leave_tile,
    load_tile,
    prefetch,
    store_tile,
    stream_tile,
)

WAITING = 128
"""Weights whose products wait in a row buffer for their lanes to be added (8 KiB at 512 bits)."""
SUMS_AT_ONCE = min(8, LANES)
"""Lane sums taken at once; up to this many numbers behind a row's sums are overwritten."""


# Addresses, strides and offsets between buffers count bytes; names ending in s count things.
FORWARD = record(
    "x", "y", "starts", "offsets", "values", "bias", "scratch", "active",
    "samples", "blocks", "c_in", "c_out", "channel_parts", "tile_parts", "steps", "sequence",
    "x_sample", "x_channel", "x_plane", "ahead", "y_sample", "y_channel", "y_plane",
    "scratch_part", "out_depth", "out_height", "out_width", "pitch", "dense", "stream",
    "lanes", "firsts",
)  # fmt: skip
BACKWARD = record(
    "g", "x", "dx", "starts", "offsets", "values", "sums", "scratch", "active",
    "samples", "blocks", "c_out", "rows", "edges", "tile_parts", "row_parts", "steps", "sequence",
    "g_sample", "g_channel", "g_plane", "ahead", "x_sample", "x_channel", "x_plane",
    "dx_sample", "dx_channel", "dx_plane", "sums_part", "scratch_part",
    "depth", "dense", "lanes", "firsts", "fresh",
)  # fmt: skip


@cache
def forward(a: int, b: int) -> Kernel:
    """Kernel of the forward pass for tiles of ``a`` planes by ``b`` vectors."""
    count = a * b
    lines = b + 7
    tile_bytes = count * VECTOR_BYTES
    row_bytes = b * VECTOR_BYTES
    line_bytes = row_bytes + VECTOR_BYTES

    @kernel(FORWARD)
    def masked_conv3d_forward(job: Any) -> None:  # pragma: no cover - compiled
        c_in, c_out, blocks = job.c_in, job.c_out, job.blocks
        starts, offsets, values, bias = job.starts, job.offsets, job.values, job.bias
        x_channel, x_plane, ahead = job.x_channel, job.x_plane, job.ahead
        y_channel, y_plane = job.y_channel, job.y_plane
        steps, sequence, active = job.steps, job.sequence, job.active
        tile_parts, channel_parts = job.tile_parts, job.channel_parts
        out_depth, out_height, out_width = job.out_depth, job.out_height, job.out_width
        pitch, dense, stream = job.pitch, job.dense, job.stream
        part = take(job)
        while part < job.parts:
            scratch = job.scratch + part * job.scratch_part
            # The end of the scratch memory holds rows on their way past the caches.
            line = scratch + job.scratch_part - a * line_bytes
            chunk = part % tile_parts
            slab = part // tile_parts % channel_parts
            sample = part // (tile_parts * channel_parts)
            o_begin = c_out * slab // channel_parts
            o_end = c_out * (slab + 1) // channel_parts
            for s in range(sequence * chunk // tile_parts, sequence * (chunk + 1) // tile_parts):
                tile = s // steps
                plane = s % steps * a
                source = job.x + sample * job.x_sample + plane * x_plane + tile * row_bytes
                target = job.y + sample * job.y_sample + plane * y_plane
                first = tile * b * LANES
                lanes = job.lanes + 2 * tile * b
                before = load_int(job.firsts + 4 * tile)
                voxels = load_int(job.firsts + 4 * tile + 4) - before
                before *= 4
                if active != 0 and load_byte(active + sample * sequence + s) == 0:
                    for o in range(o_begin, o_end):
                        for i in range(min(a, out_depth - plane)):
                            clear_rows(
                                target + o * y_channel + i * y_plane,
                                first, b * LANES, pitch, out_height, out_width,
                            )  # fmt: skip
                    continue
                for block in range(blocks):
                    for o in range(o_begin, o_end):
                        if block == 0:
                            if ahead != 0:
                                for c in range(c_in * o // c_out, c_in * (o + 1) // c_out):
                                    prefetch(source + c * x_channel + ahead, lines, 0)
                            start = np.float32(0.0)
                            if bias != 0:
                                start = load_float(bias + 4 * o)
                            total = filled(count, start)
                        else:
                            total = load_tile(scratch + (o - o_begin) * tile_bytes, row_bytes, a, b)
                        row = starts + 4 * (block * c_out + o)
                        k = load_int(row)
                        end = load_int(row + 4)
                        while k < end:
                            total = add_product(
                                total,
                                load_float(values + 4 * k),
                                source + 4 * load_int(offsets + 4 * k),
                                x_plane, a, b,
                            )  # fmt: skip
                            k += 1
                        if block < blocks - 1:
                            store_tile(total, scratch + (o - o_begin) * tile_bytes, row_bytes, a, b)
                        elif dense == 0:
                            place = target + o * y_channel + tile * row_bytes
                            if stream != 0:
                                stream_tile(total, place, y_plane, a, b)
                            else:
                                store_tile(total, place, y_plane, a, b)
                        else:
                            place = target + o * y_channel + before
                            left = out_depth - plane
                            if stream == 0:
                                leave_tile(total, place, y_plane, lanes, left, a, b)
                            else:
                                leave_tile(total, line, line_bytes, lanes, left, a, b)
                                for i in range(min(a, left)):
                                    stream_numbers(
                                        place + i * y_plane, line + i * line_bytes, voxels
                                    )
            part = take(job)

    return masked_conv3d_forward


@cache
def backward(a: int, b: int) -> Kernel:
    """Kernel of both gradients for tiles of ``a`` planes by ``b`` vectors.

    A row of its list belongs to one channel of the input. The sums for the weight's gradient of
    row ``r`` stand ``SUMS_AT_ONCE * r`` numbers further on than the list's entries.
    """
    count = a * b
    lines = b + 7
    own_lines = b + 1
    tile_bytes = count * VECTOR_BYTES
    row_bytes = b * VECTOR_BYTES

    @kernel(BACKWARD)
    def masked_conv3d_backward(job: Any) -> None:  # pragma: no cover - compiled
        c_out, blocks, rows = job.c_out, job.blocks, job.rows
        starts, offsets, values = job.starts, job.offsets, job.values
        g_channel, g_plane, ahead = job.g_channel, job.g_plane, job.ahead
        x_channel, x_plane = job.x_channel, job.x_plane
        dx_channel, dx_plane = job.dx_channel, job.dx_plane
        steps, sequence, active = job.steps, job.sequence, job.active
        tile_parts = job.tile_parts
        depth, dense = job.depth, job.dense
        part = take(job)
        while part < job.parts:
            scratch = job.scratch + part * job.scratch_part
            products = scratch + job.scratch_part - WAITING * VECTOR_BYTES
            chunk = part % tile_parts
            slab = part // tile_parts
            sums = job.sums + chunk * job.sums_part
            r_begin = load_int(job.edges + 4 * slab)
            r_end = load_int(job.edges + 4 * (slab + 1))
            if job.fresh != 0:
                for block in range(blocks):
                    row = block * rows + r_begin
                    begin = sums + 4 * (load_int(starts + 4 * row) + SUMS_AT_ONCE * row)
                    row = block * rows + r_end
                    end = sums + 4 * (load_int(starts + 4 * row) + SUMS_AT_ONCE * row)
                    clear_bytes(begin, end - begin)
            total_steps = job.samples * sequence
            for n in range(
                total_steps * chunk // tile_parts, total_steps * (chunk + 1) // tile_parts
            ):
                sample = n // sequence
                s = n % sequence
                tile = s // steps
                plane = s % steps * a
                g = job.g + sample * job.g_sample + plane * g_plane + tile * row_bytes
                x = job.x + sample * job.x_sample + plane * x_plane + tile * row_bytes
                dx = job.dx + sample * job.dx_sample + plane * dx_plane
                lanes = job.lanes + 2 * tile * b
                before = 4 * load_int(job.firsts + 4 * tile)
                used = active == 0 or load_byte(active + n) != 0
                for block in range(blocks):
                    for r in range(r_begin, r_end):
                        if block == 0:
                            if ahead != 0:
                                for c in range(c_out * r // rows, c_out * (r + 1) // rows):
                                    prefetch(g + c * g_channel + ahead, lines, 0)
                                prefetch(x + r * x_channel + a * x_plane, own_lines, 0)
                                if dense != 0:
                                    prefetch(
                                        dx + r * dx_channel + a * dx_plane + before, own_lines, 1
                                    )
                            total = filled(count, np.float32(0.0))
                        else:
                            total = load_tile(scratch + (r - r_begin) * tile_bytes, row_bytes, a, b)
                        own = load_tile(x + r * x_channel, x_plane, a, b)
                        row = block * rows + r
                        k = load_int(starts + 4 * row)
                        end = load_int(starts + 4 * (row + 1))
                        if not used:
                            end = k
                        sum_place = sums + 4 * (k + SUMS_AT_ONCE * row)
                        while k < end:
                            stop = min(end, k + WAITING)
                            place = products
                            while k < stop:
                                total, product = add_product_and_dot(
                                    total, own,
                                    load_float(values + 4 * k),
                                    g + 4 * load_int(offsets + 4 * k),
                                    g_plane, a, b,
                                )  # fmt: skip
                                store_tile(product, place, 0, 1, 1)
                                place += VECTOR_BYTES
                                k += 1
                            waiting = products
                            while waiting < place:
                                add_lane_sums(waiting, sum_place, SUMS_AT_ONCE)
                                waiting += SUMS_AT_ONCE * VECTOR_BYTES
                                sum_place += 4 * SUMS_AT_ONCE
                        if block < blocks - 1:
                            store_tile(total, scratch + (r - r_begin) * tile_bytes, row_bytes, a, b)
                        elif job.dx != 0:
                            if dense == 0:
                                store_tile(
                                    total, dx + r * dx_channel + tile * row_bytes, dx_plane, a, b
                                )
                            else:
                                place = dx + r * dx_channel + before
                                leave_tile(total, place, dx_plane, lanes, depth - plane, a, b)
            part = take(job)

    return masked_conv3d_backward
