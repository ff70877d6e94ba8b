"""Masks of a payload as rows: what a CSR section holds, for plans that need no dense mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.codec.positions import csr_positions
from sparsekit.codec.records import MaskCode, csr_grid, csr_width, quote
from sparsekit.codec.wire import Buffer, as_bytes_view, parse
from sparsekit.errors import FormatError


@dataclass(frozen=True, slots=True)
class MaskRows:
    """Kept elements of a tensor, row by row.

    Attributes
    ----------
    shape : tuple of int
        Of the tensor. Its rows are those of the first dimension; a vector is one row.
    counts : ndarray of uint16 or uint32, (rows,)
        How many elements each row keeps.
    columns : ndarray of the same type
        Flat positions of the kept elements in their rows, row by row, increasing in each.
    """

    shape: tuple[int, ...]
    counts: npt.NDArray[Any]
    columns: npt.NDArray[Any]


def decode_rows(payload: Buffer) -> dict[str, MaskRows]:
    """Read the masks that a payload, which may be hostile, holds as CSR, without expanding them.

    ``sparsekit.kernels.masked_conv3d.run.plan_of_rows`` makes the plan of a CPU convolution from
    them. No base is needed.

    Parameters
    ----------
    payload : bytes, bytearray or memoryview
        What `encode` returned, with ``mask_encoding="csr"`` for all masks that are to be rows.

    Returns
    -------
    dict of str to MaskRows
        For each tensor whose mask is in CSR; the arrays lie in the payload's memory.

    Raises
    ------
    CodecError
        As `decode`.
    """
    view = as_bytes_view(payload)
    found = {}
    for placed in parse(view).records:
        record = placed.record
        if record.dtype is None or record.mask_code != MaskCode.CSR:
            continue
        section = view[placed.mask_at : placed.mask_at + record.mask_len]
        try:
            for _ in csr_positions(section, record.shape, record.k):
                pass
        except FormatError as error:
            raise FormatError(f"tensor {quote(record.name)}: {error}") from None
        rows, columns = csr_grid(record.shape)
        numbers = np.frombuffer(section, f"<u{csr_width(columns)}")
        found[record.name] = MaskRows(record.shape, numbers[:rows], numbers[rows:])
    return found
