"""Lists of unpruned weights, made from rows: how many each output channel keeps, and where.

This is what a CSR mask of the codec holds. Two passes over the entries, one that counts and one
that fills, give the lists that `lists` makes from bits; there is no dense mask in between.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.masked_conv3d.geometry import Geometry, Shape
from sparsekit.kernels.masked_conv3d.lists import Ints, count_and_fill
from sparsekit.kernels.memory import load_int, store_int
from sparsekit.kernels.parallel import take
from sparsekit.kernels.record import record

_ROWS = record(
    "ends", "columns", "starts", "offsets", "index", "block", "rows", "c_in", "c_out", "group_in",
    "group_out", "taps", "tap_offsets", "classes", "channel", "fill", "backward",
)  # fmt: skip


@kernel(_ROWS)
def _walk(job: Any) -> None:  # pragma: no cover - compiled
    """Count or fill the rows of a pass; starts move to their rows' ends."""
    taps, group_in, c_in, c_out, block = job.taps, job.group_in, job.c_in, job.c_out, job.block
    ends, columns, starts = job.ends, job.columns, job.starts
    offsets, index, rows = job.offsets, job.index, job.rows
    tap_offsets, classes, channel = job.tap_offsets, job.classes, job.channel
    group_out, fill, backward = job.group_out, job.fill, job.backward
    if take(job) == 0:
        at = 0
        for o in range(c_out):
            first = o // group_out * group_in
            for at in range(load_int(ends + 4 * o), load_int(ends + 4 * o + 4)):
                column = load_int(columns + 4 * at)
                c = column // taps
                t = column - c * taps
                row = load_int(classes + 4 * t) * c_in + first + c
                if backward != 0:
                    start = starts + 4 * (o // block * rows + row)
                    source = o
                else:
                    start = starts + 4 * (c // block * c_out + o)
                    source = row
                entry = load_int(start)
                store_int(start, entry + 1)
                if fill != 0:
                    store_int(index + 4 * entry, o * group_in * taps + column)
                    store_int(offsets + 4 * entry, source * channel + load_int(tap_offsets + 4 * t))


def check_rows(counts: npt.NDArray[Any], columns: npt.NDArray[Any], shape: Shape) -> None:
    """Raise `ArgumentError` unless rows are those of a weight: kernels write where they say."""
    width = shape.c_in // shape.groups * int(np.prod(shape.kernel))
    if counts.shape != (shape.c_out,) or columns.ndim != 1:
        raise ArgumentError(
            f"counts, columns: expected {shape.c_out} counts and flat columns, "
            f"got shapes {counts.shape} and {columns.shape}"
        )
    ends = np.cumsum(counts, dtype=np.int64)
    if (counts < 0).any() or ends[-1] != columns.size:
        raise ArgumentError(f"counts: expected {columns.size} in all, got {ends[-1]}")
    if columns.size == 0:
        return
    rows = np.repeat(np.arange(shape.c_out), counts)
    flat = rows * width + columns
    if columns.min() < 0 or columns.max() >= width or (np.diff(flat) <= 0).any():
        raise ArgumentError(f"columns: expected increasing numbers below {width} in each row")


def build_row_lists(
    counts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    geometry: Geometry,
    forward_block: int,
    backward_block: int,
) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints, Ints]]:
    """Starts, offsets and positions of both passes' entries; see `plan.build_rows`."""
    shape = geometry.shape
    check_rows(counts, columns, shape)
    ends = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int32)
    places = columns.astype(np.int32)
    classes = np.array(geometry.tap_classes, np.int32)
    found = []
    for backward, block in enumerate((forward_block, backward_block)):
        taps = np.array(geometry.gradient_taps if backward else geometry.source_taps, np.int32)
        grid = geometry.gradient if backward else geometry.source
        rows = geometry.source.channels
        blocks = -(-(shape.c_out if backward else shape.c_in // shape.groups) // block)
        job = _walk.job(
            parts=1, ends=ends.ctypes.data, columns=places.ctypes.data, block=block, rows=rows,
            c_in=shape.c_in, c_out=shape.c_out, group_in=shape.c_in // shape.groups,
            group_out=shape.c_out // shape.groups, taps=len(classes), channel=grid.channel,
            tap_offsets=taps.ctypes.data, classes=classes.ctypes.data, backward=backward,
        )  # fmt: skip
        found.append(count_and_fill(_walk, job, blocks * (rows if backward else shape.c_out), 1))
    return found[0], found[1]
