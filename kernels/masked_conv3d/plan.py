"""Lists of unpruned weights in the orders in which the CPU kernels walk them."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsekit.errors import BackendError
from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.masked_conv3d.geometry import Geometry
from sparsekit.kernels.memory import load_byte, load_int, store_int
from sparsekit.kernels.record import record

Ints = npt.NDArray[np.int32]
T = TypeVar("T")
# Each batch size and number of threads takes a few; a loader may give many batch sizes.
_MOST_PREPARED = 64


@dataclass(frozen=True)
class WeightList:
    """Unpruned weights, sorted by block and row."""

    blocks: int
    rows: int
    starts: Ints
    """First entry of each row of each block, and the end; (blocks * rows + 1,)."""
    offsets: Ints
    """From a tile's place in the buffer that is read to what the weight is multiplied with."""
    index: Ints
    """Flat position of the weight in its tensor."""

    _edges: dict[int, Ints] = field(default_factory=dict)

    def edges(self, parts: int) -> Ints:
        """Edges of ranges of rows with about equally many entries over all blocks, (parts + 1,)."""
        if parts not in self._edges:
            per_row = np.diff(self.starts).reshape(self.blocks, self.rows).sum(axis=0) + 1
            ends = np.cumsum(per_row)
            inner = np.searchsorted(ends, ends[-1] * np.arange(1, parts) / parts)
            edges = np.concatenate([[0], np.maximum.accumulate(inner), [self.rows]])
            self._edges[parts] = edges.astype(np.int32)
        return self._edges[parts]

    @property
    def entries(self) -> int:
        """Number of weights."""
        return len(self.index)


@dataclass(frozen=True, slots=True)
class Plan:
    """Lists of one mask for one geometry."""

    geometry: Geometry
    mask: Tensor
    density: float
    forward: WeightList
    """Rows are output channels, blocks are ranges of input channels of a group."""
    backward: WeightList
    """Rows are channels of the padded input, blocks are ranges of output channels."""

    _prepared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key before; drivers keep their jobs here."""
        found: T | None = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = make()
        return found


_LISTS = record(
    "mask", "forward_starts", "forward_offsets", "forward_index", "forward_block",
    "backward_starts", "backward_offsets", "backward_index", "backward_block",
    "c_in", "c_out", "group_in", "group_out", "taps", "source_rows",
    "source_taps", "gradient_taps", "classes", "source_channel", "gradient_channel", "fill",
)  # fmt: skip


@kernel(_LISTS)
def _lists(job: Any) -> None:  # pragma: no cover - compiled
    """Count the entries of each row (``fill`` 0), or fill the rows whose starts are known.

    While filling, each start is moved to its row's end, which is the next row's start.
    """
    taps, group_in, c_in = job.taps, job.group_in, job.c_in
    part = parallel.take(job)
    while part < job.parts:
        position = 0
        for o in range(job.c_out):
            group = o // job.group_out
            b_block = o // job.backward_block * job.source_rows
            for c in range(group_in):
                f_row = job.forward_starts + 4 * (c // job.forward_block * job.c_out + o)
                channel = group * group_in + c
                for t in range(taps):
                    if load_byte(job.mask + position) != 0:
                        row = load_int(job.classes + 4 * t) * c_in + channel
                        b_row = job.backward_starts + 4 * (b_block + row)
                        f, b = load_int(f_row), load_int(b_row)
                        store_int(f_row, f + 1)
                        store_int(b_row, b + 1)
                        if job.fill != 0:
                            store_int(job.forward_index + 4 * f, position)
                            store_int(job.backward_index + 4 * b, position)
                            store_int(
                                job.forward_offsets + 4 * f,
                                row * job.source_channel + load_int(job.source_taps + 4 * t),
                            )
                            store_int(
                                job.backward_offsets + 4 * b,
                                o * job.gradient_channel + load_int(job.gradient_taps + 4 * t),
                            )
                    position += 1
        part = parallel.take(job)


def build(mask: Tensor, geometry: Geometry, forward_block: int, backward_block: int) -> Plan:
    """Build the lists of a mask.

    Parameters
    ----------
    mask : Tensor, (c_out, c_in / groups, kd, kh, kw), bool, contiguous
    geometry : Geometry
    forward_block, backward_block : int
        Channels per block that the forward and the backward pass read.

    Raises
    ------
    BackendError
        A scan is too large for the offsets of the lists.
    """
    shape = geometry.shape
    if not geometry.fits_offsets:
        raise BackendError(
            f"x: {shape.c_in} channels of a {shape.size} grid (or {shape.c_out} of the output's) "
            "are too large for the CPU kernels; use backend='reference'"
        )
    group_in = shape.c_in // shape.groups
    rows = geometry.source.channels
    f_rows = -(-group_in // forward_block) * shape.c_out
    b_rows = -(-shape.c_out // backward_block) * rows
    # One place in front: filling moves each start to the next row's.
    f_starts, b_starts = np.zeros(f_rows + 1, np.int32), np.zeros(b_rows + 1, np.int32)
    source_taps = np.array(geometry.source_taps, np.int32)
    gradient_taps = np.array(geometry.gradient_taps, np.int32)
    classes = np.array(geometry.tap_classes, np.int32)
    job = _lists.job(
        parts=1, mask=mask.data_ptr(), forward_starts=f_starts.ctypes.data + 4,
        backward_starts=b_starts.ctypes.data + 4, forward_block=forward_block,
        backward_block=backward_block, c_in=shape.c_in, c_out=shape.c_out, group_in=group_in,
        group_out=shape.c_out // shape.groups, taps=len(source_taps), source_rows=rows,
        source_taps=source_taps.ctypes.data, gradient_taps=gradient_taps.ctypes.data,
        classes=classes.ctypes.data, source_channel=geometry.source.channel,
        gradient_channel=geometry.gradient.channel,
    )  # fmt: skip
    parallel.run(_lists.address, job, 1)
    np.cumsum(f_starts, out=f_starts)
    np.cumsum(b_starts, out=b_starts)
    entries = int(f_starts[-1])
    lists = [np.empty(entries, np.int32) for _ in range(4)]
    # The starts of the rows stand one place further down than their counts did.
    f_ends, b_ends = f_starts[:-1].copy(), b_starts[:-1].copy()
    job["forward_starts"], job["backward_starts"] = f_ends.ctypes.data, b_ends.ctypes.data
    for name, values in zip(
        ("forward_offsets", "forward_index", "backward_offsets", "backward_index"),
        lists,
        strict=True,
    ):
        job[name] = values.ctypes.data
    job["fill"] = 1
    parallel.run(_lists.address, job, 1)
    return Plan(
        geometry,
        mask,
        entries / mask.numel(),
        WeightList(f_rows // shape.c_out, shape.c_out, f_starts, lists[0], lists[1]),
        WeightList(b_rows // rows, rows, b_starts, lists[2], lists[3]),
    )
