"""Large float32 tensors through the compiled kernels: masks as bits, values a chunk at a time."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from sparsekit.codec import flags, frames, rice
from sparsekit.codec.codes import RiceCode, SplitCode
from sparsekit.codec.elements import Bits, Elements
from sparsekit.codec.flags import Bytes, Flags
from sparsekit.codec.positions import check_tail
from sparsekit.codec.records import MaskCode, Record, ValueCode
from sparsekit.errors import FormatError
from sparsekit.kernels.loading import at_first_use

_bitmap = at_first_use("bitmap.cpu")
_rice = at_first_use("rice.cpu")
_planes = at_first_use("split_planes.cpu")

_Packed: TypeAlias = Callable[[int, int], Bytes]
_Values: TypeAlias = Callable[[int, int], Bits]

# Elements at a time: what is decoded of them stays in the cache, and below a MiB.
_CHUNK = 2**16
_MASKS = (MaskCode.BITMAP, MaskCode.RICE, MaskCode.SAME)
_TOP_BITS = 3
_MOST_ELEMENTS = 2**32


def takes(record: Record) -> bool:
    """Whether a record is for this module."""
    assert record.dtype is not None
    return (
        record.mask_code in _MASKS
        and record.value_code in (ValueCode.RAW, ValueCode.SPLIT)
        and record.dtype.name == "float32"
        # A bitmap and raw values are expanded in one go: nothing has to be decoded before.
        and (record.mask_code, record.value_code) != (MaskCode.BITMAP, ValueCode.RAW)
        and flags.kernels_pay_off(record.n)
        and record.n < _MOST_ELEMENTS
    )


def pack_rice(keep: Flags, code: RiceCode) -> memoryview:
    """Section of a mask with at least one coded position."""
    if not (flags.kernels_pay_off(keep.n) and keep.n < _MOST_ELEMENTS):
        return rice.pack(keep.bools, code)
    coded = code.coded(keep.n, keep.count)
    section: Bytes = _rice().pack(keep.packed, keep.n, coded, code.r, code.complement)
    return section.data


def split(bits: Bits, joined: bool, smallest: int) -> tuple[Bytes, Bytes] | None:
    """The two upper planes of float32 values; None where the kernels do not pay off."""
    if bits.dtype.itemsize != 4 or not flags.kernels_pay_off(bits.size):
        return None
    first, second, _ = _planes().split(bits, smallest, _TOP_BITS if joined else 0)
    return first, second


def decode(
    mask_section: memoryview, value_section: memoryview, record: Record, base: Elements | None
) -> Bits:
    """All elements of a record that `takes` accepts; `base` is the tensor of its name there."""
    cpu = _bitmap()
    n, k = record.n, record.k
    packed_of = _flags(mask_section, record, base)
    bits = np.empty(n, "<u4")
    # Elements are written in order, and so many are left that what is still to be read stays.
    values_of = _values(value_section, record, bits.view(np.uint8)[4 * n - k :])
    done = 0
    step = _CHUNK if 8 * k > n else 8 * _CHUNK
    for start in range(0, n, step):
        stop = min(start + step, n)
        packed = packed_of(start, stop)
        # Of the many elements of a sparse mask's chunk a hostile one keeps all.
        piece = stop - start if cpu.count(packed, stop - start) <= _CHUNK else _CHUNK
        for first in range(0, stop - start, piece):
            size = min(piece, stop - start - first)
            some = packed[first // 8 : -(-(first + size) // 8)]
            counts = cpu.counts(some, size)
            if done + counts.total > k:
                raise FormatError(f"its mask keeps more than the {k} elements of its record")
            out = bits[start + first : start + first + size]
            cpu.expand(values_of(done, done + counts.total), some, size, out=out, counts=counts)
            done += counts.total
    if done != k:
        raise FormatError(f"its mask keeps {done} elements, its record says {k}")
    return bits


def _flags(section: memoryview, record: Record, base: Elements | None) -> _Packed:
    """Return a function that gives a mask's bits from one multiple of 64 to another, in order."""
    n = record.n
    if record.mask_code == MaskCode.BITMAP:
        check_tail(section, n)
        packed = np.frombuffer(section, np.uint8)
        return lambda start, stop: packed[start // 8 : -(-stop // 8)]
    if record.mask_code == MaskCode.SAME:
        assert base is not None
        dtype, held = base.dtype, base.bits
        return lambda start, stop: Flags.of_nonzero(held[start:stop], dtype).packed
    code = record.rice
    source = np.frombuffer(section, np.uint8)
    coded = code.coded(n, record.k)
    unpack = _rice().unpacker(source, n, coded, code.r, code.complement)

    def read(start: int, stop: int) -> Bytes:
        try:
            packed: Bytes = unpack(start, stop)
        except ValueError as error:
            raise FormatError(str(error)) from None
        return packed

    return read


def _values(section: memoryview, record: Record, scratch: Bytes) -> _Values:
    """Return a function that gives the kept values from one index to another, in order."""
    k = record.k
    if record.value_code == ValueCode.RAW:
        values = np.frombuffer(section, "<u4")
        return lambda start, stop: values[start:stop]
    return join(section, record.split, k, scratch)


def joins(k: int) -> bool:
    """Whether so many split float32 values are for `join`."""
    return flags.kernels_pay_off(k)


def join(section: memoryview, code: SplitCode, k: int, scratch: Bytes | None) -> _Values:
    """Return a function that gives split float32 values from one index to another, in order.

    `scratch` is as for `frames.plane_reader`.
    """
    join_planes = _planes().join
    low_at = len(section) - 2 * k
    first = frames.plane_reader(section[: code.first_len], k, scratch)
    second = frames.plane_reader(section[code.first_len : low_at], k)
    low = np.frombuffer(section[low_at:], "<u2")
    top_bits = _TOP_BITS if code.joined else 0

    def read(start: int, stop: int) -> Bits:
        a, b = first(stop - start, stop == k), second(stop - start, stop == k)
        try:
            values: Bits = join_planes(a, b, low[start:stop], code.smallest, top_bits)
        except ValueError as error:
            raise FormatError(str(error)) from None
        return values

    return read
