"""Lists of unpruned weights in the orders in which the CPU kernels walk them."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparsekit.errors import BackendError
from sparsekit.kernels.masked_conv3d.geometry import Geometry
from sparsekit.kernels.masked_conv3d.lists import Ints, build_lists
from sparsekit.kernels.masked_conv3d.row_lists import build_row_lists

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
    density: float
    forward: WeightList
    """Rows are output channels, blocks are ranges of input channels of a group."""
    backward: WeightList
    """Rows are channels of the padded input, blocks are ranges of output channels."""

    _mask: Tensor | None = None
    _prepared: dict[Any, Any] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """The mask, contiguous; of a plan that was made from rows it is made when first asked."""
        return self.once("mask", self._dense) if self._mask is None else self._mask

    def _dense(self) -> Tensor:
        shape = self.geometry.shape
        mask = torch.zeros(
            (shape.c_out, shape.c_in // shape.groups, *shape.kernel), dtype=torch.bool
        )
        mask.view(-1).numpy()[self.forward.index] = True
        return mask

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key before; drivers keep their jobs here."""
        found: T | None = self._prepared.get(key)
        if found is None:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = make()
        return found


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
    _check_offsets(geometry)
    lists = build_lists(mask, geometry, forward_block, backward_block)
    return _plan(geometry, *lists, mask)


def build_rows(
    counts: npt.NDArray[Any],
    columns: npt.NDArray[Any],
    geometry: Geometry,
    forward_block: int,
    backward_block: int,
) -> Plan:
    """Build the lists of a mask that is given as rows, without the mask.

    Parameters
    ----------
    counts : ndarray of integers, (c_out,)
        How many weights each output channel keeps.
    columns : ndarray of integers
        Where, row by row: flat positions in ``weight[o]``, increasing inside a row.
    geometry, forward_block, backward_block
        As for `build`.

    Raises
    ------
    BackendError
        As `build`.
    ArgumentError
        For rows that no weight of these sizes has.
    """
    _check_offsets(geometry)
    return _plan(
        geometry, *build_row_lists(counts, columns, geometry, forward_block, backward_block)
    )


def _check_offsets(geometry: Geometry) -> None:
    shape = geometry.shape
    if not geometry.fits_offsets:
        raise BackendError(
            f"x: {shape.c_in} channels of a {shape.size} grid (or {shape.c_out} of the output's) "
            "are too large for the CPU kernels; use backend='reference'"
        )


def _plan(
    geometry: Geometry,
    forward: tuple[Ints, Ints, Ints],
    backward: tuple[Ints, Ints, Ints],
    mask: Tensor | None = None,
) -> Plan:
    shape = geometry.shape
    rows = geometry.source.channels
    weights = shape.c_out * (shape.c_in // shape.groups) * math.prod(shape.kernel)
    return Plan(
        geometry,
        len(forward[2]) / weights,
        WeightList((len(forward[0]) - 1) // shape.c_out, shape.c_out, *forward),
        WeightList((len(backward[0]) - 1) // rows, rows, *backward),
        mask,
    )
