"""Payloads as NumPy arrays: no torch is imported, on a machine that has none.

from sparsekit.codec.records import quote
from sparsekit.codec.arrays import decode_arrays
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sparsekit.codec import decoding
from sparsekit.codec.elements import Elements
from sparsekit.codec.half import widen
from sparsekit.codec.positions import CHUNK
from sparsekit.codec.records import BOOL, DTYPE_BY_NAME, quote
from sparsekit.codec.wire import as_bytes_view, described_bytes, parse
from sparsekit.errors import ArgumentTypeError, BudgetError

Array = npt.NDArray[Any]

_MOST_BYTES = 4 * 2**30


def decode_arrays(
    payload: bytes | bytearray | memoryview,
    *,
    base: Mapping[str, Array] | None = None,
    max_bytes: int = _MOST_BYTES,
) -> dict[str, Array]:
    """Read the state out of a payload, which may be hostile, without torch.

    Parameters
    ----------
    payload : bytes, bytearray or memoryview
        What `sparsekit.encode` returned.
    base : mapping of str to ndarray, optional
        The state that was the sender's base, as this function returned it; a base with bfloat16
        tensors needs `sparsekit.decode`.
    max_bytes : int
        Most bytes that the decoded arrays may take, 4 GiB by default; a bfloat16 number counts as
        6, which it takes for a moment, and a large header as for `sparsekit.decode`.

    Returns
    -------
    dict of str to ndarray
        In the payload's order; bfloat16, which NumPy lacks, as float32 of the same values.

    Raises
    ------
    CodecError
        As `sparsekit.decode`.
    ArgumentTypeError
        For a base of other than NumPy arrays of the listed dtypes.
    """
    view = as_bytes_view(payload)
    header = parse(view, room=max_bytes)
    placed = [p for p in header.records if p.record.dtype is not None]
    needed = sum(
        p.record.n * (p.record.dtype.itemsize + 4 * (p.record.dtype.name == "bfloat16"))
        for p in placed
        if p.record.dtype is not None
    )
    needed += described_bytes(len(header.records), header.header_len)
    if needed > max_bytes:
        raise BudgetError(
            f"payload: it decodes to {needed} bytes, the limit is {max_bytes}; "
            "pass a larger max_bytes if the sender is to be trusted with them"
        )
    given = None
    if base is not None and any(header.base_digest):
        given = {name: _elements(array, name) for name, array in base.items()}
    held = decoding.checked_base(header, given)
    return {p.record.name: _array(decoding.decode_record(view, p, held)) for p in placed}


def _array(elements: Elements) -> Array:
    dtype, bits = elements.dtype, elements.bits
    if dtype.name == "bfloat16":
        wide = np.empty(bits.size, "<u4")
        for start in range(0, bits.size, CHUNK):
            wide[start : start + CHUNK] = widen(bits[start : start + CHUNK], "bfloat16")
        return wide.view("<f4").reshape(elements.shape)
    return bits.view("?" if dtype is BOOL else dtype.name).reshape(elements.shape)


def _elements(array: Array, name: str) -> Elements:
    given: object = array
    known = DTYPE_BY_NAME.get(array.dtype.name) if isinstance(given, np.ndarray) else None
    if known is None:
        raise ArgumentTypeError(
            f"base: expected {quote(name)} as an array of one of {', '.join(DTYPE_BY_NAME)}, "
            f"got {getattr(array, 'dtype', type(array).__name__)}"
        )
    flat = np.ascontiguousarray(array).reshape(-1)
    return Elements(known, array.shape, flat.view(f"u{known.itemsize}"))
