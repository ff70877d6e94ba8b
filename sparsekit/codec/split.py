"""Float values as planes: exponents with the mantissa's first bits, which compress, and the rest.

Trained weights have few exponents, and pruning cuts off the small ones: the first plane takes
some 5 of its 8 bits, and the second, the sign with the next bits, has nothing to spare but what
its byte does not use. Both go through zstd, whose Huffman coder does the work. The lowest bits
are noise and stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsekit.codec import compiled, frames
from sparsekit.codec.codes import LAYOUTS, MOST_SPLIT, Layout, SplitCode
from sparsekit.codec.records import DType
from sparsekit.codec.wire import Buffer
from sparsekit.errors import FormatError

Bits = npt.NDArray[np.unsignedinteger]
Bytes = npt.NDArray[np.uint8]

LEAST_VALUES = 256
"""Fewer values are stored raw: the frames would cost more than they save."""
# Values at a time.
_CHUNK = 2**17
_MOST_SPAN = 31
_TOP_BITS = 3


@dataclass(frozen=True, slots=True)
class _Fields:
    joined: bool
    smallest: int
    """Exponent, 0 unless `joined`."""

    @classmethod
    def of(cls, bits: Bits, layout: Layout) -> "_Fields":
        """Choose for all values."""
        smallest, largest = 1 << layout.exponent_bits, 0
        mask = bits.dtype.type((1 << layout.mantissa_bits + layout.exponent_bits) - 1)
        for start in range(0, bits.size, _CHUNK):
            sizes = bits[start : start + _CHUNK] & mask
            smallest = min(smallest, int(sizes.min()) >> layout.mantissa_bits)
            largest = max(largest, int(sizes.max()) >> layout.mantissa_bits)
        joined = largest - smallest <= _MOST_SPAN
        return cls(joined, smallest if joined else 0)


def _planes(bits: Bits, layout: Layout, fields: _Fields) -> tuple[Bytes, Bytes]:
    """The two upper planes of some values."""
    planes = compiled.split(bits, fields.joined, fields.smallest)
    if planes is not None:
        return planes
    exponents = (bits >> layout.mantissa_bits & (1 << layout.exponent_bits) - 1).astype(np.uint8)
    rest_bits = layout.mantissa_bits - 8 * layout.low_bytes
    sign = (bits >> layout.mantissa_bits + layout.exponent_bits).astype(np.uint8)
    rest = bits >> 8 * layout.low_bytes
    first = exponents
    if fields.joined:
        rest_bits -= _TOP_BITS
        top = (rest >> rest_bits & (1 << _TOP_BITS) - 1).astype(np.uint8)
        first = exponents - np.uint8(fields.smallest) << np.uint8(_TOP_BITS) | top
    return first, sign << np.uint8(rest_bits) | (rest & (1 << rest_bits) - 1).astype(np.uint8)


def expected_bits(bits: Bits, dtype: DType) -> int:
    """Bits to be expected of a section."""
    if bits.size < LEAST_VALUES:
        return 8 * bits.nbytes
    layout = LAYOUTS[dtype.name]
    fields = _Fields.of(bits, layout)
    counts = np.zeros((2, 256), np.int64)
    for start in range(0, bits.size, _CHUNK):
        first, second = _planes(bits[start : start + _CHUNK], layout, fields)
        counts[0] += frames.byte_counts(first)
        counts[1] += frames.byte_counts(second)
    plain = 8 * layout.low_bytes * bits.size
    return plain + frames.expected_bits(counts[0]) + frames.expected_bits(counts[1])


def pack(bits: Bits, dtype: DType) -> tuple[SplitCode, list[Buffer]] | None:
    """Parameters and section of values, in pieces; None where raw values are not larger."""
    layout = LAYOUTS.get(dtype.name)
    if layout is None or not LEAST_VALUES <= bits.size < MOST_SPLIT:
        return None
    fields = _Fields.of(bits, layout)
    first, second = np.empty(bits.size, np.uint8), np.empty(bits.size, np.uint8)
    for start in range(0, bits.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        first[part], second[part] = _planes(bits[part], layout, fields)
    planes: list[Buffer] = [frames.compress(first)]
    del first
    planes.append(frames.compress(second))
    del second
    code = SplitCode(fields.joined, fields.smallest, len(planes[0]))
    if layout.low_bytes:
        # The lower half of each number, as it lies there.
        low = np.ascontiguousarray(bits, f"<u{dtype.itemsize}").view("<u2")[::2].copy()
        planes.append(low.view(np.uint8).data)
    return None if sum(map(len, planes)) >= bits.nbytes else (code, planes)


def reader(
    section: memoryview, code: SplitCode, dtype: DType, k: int, scratch: Bytes | None = None
) -> Callable[[int, int], Bits]:
    """Return a function that gives the values from one index to another, each once, in order.

    `scratch` is as for `frames.plane_reader`.
    """
    if dtype.name == "float32" and compiled.joins(k):
        return compiled.join(section, code, k, scratch)
    layout = LAYOUTS[dtype.name]
    low_at = len(section) - k * layout.low_bytes
    first = frames.plane_reader(section[: code.first_len], k, scratch)
    second = frames.plane_reader(section[code.first_len : low_at], k)
    low = np.frombuffer(section[low_at:], "<u2") if layout.low_bytes else None
    rest_bits = layout.mantissa_bits - 8 * layout.low_bytes - (_TOP_BITS if code.joined else 0)
    kind = np.dtype(f"<u{dtype.itemsize}")
    largest = (1 << layout.exponent_bits) - 1

    def read(start: int, stop: int) -> Bits:
        a, b = first(stop - start, stop == k), second(stop - start, stop == k)
        if (b >> rest_bits + 1).any():
            raise FormatError("its second plane has bits that no value has")
        exponents, top = a.astype(kind), b & np.uint8((1 << rest_bits) - 1)
        bits = top.astype(kind)
        if code.joined:
            bits |= (exponents & kind.type(7)) << kind.type(rest_bits)
            exponents = (exponents >> kind.type(_TOP_BITS)) + kind.type(code.smallest)
        if exponents.size and int(exponents.max()) > largest:
            raise FormatError("its first plane has exponents that no value has")
        bits <<= kind.type(8 * layout.low_bytes)
        bits |= exponents << kind.type(layout.mantissa_bits)
        sign = (b >> np.uint8(rest_bits)).astype(kind)
        bits |= sign << kind.type(layout.mantissa_bits + layout.exponent_bits)
        if low is not None:
            bits |= low[start:stop]
        return bits

    return read
