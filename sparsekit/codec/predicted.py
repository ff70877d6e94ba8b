"""Masks guessed from the base: its large magnitudes stay, and what differs is coded.

Pruning by magnitude from one round to the next makes the guess right for most elements, and the
more surely the further a magnitude is from the threshold. The elements are therefore sorted into
classes by that distance, and each class has Rice-coded exceptions of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sparsekit.codec import compiled, rice, varints
from sparsekit.codec.based_codes import CLASSES, PredictedCode
from sparsekit.codec.codes import choose_rice
from sparsekit.codec.elements import Bits, Elements, magnitudes
from sparsekit.codec.flags import Flags
from sparsekit.codec.pattern import pattern_positions
from sparsekit.codec.positions import CHUNK, Bools, Positions, taking
from sparsekit.codec.records import DType
from sparsekit.errors import FormatError

_Take: TypeAlias = Callable[[int], Positions]
Members: TypeAlias = Callable[[], Iterator[tuple[Bits, Bools]]]
"""Gives magnitudes of the base's non-zero elements, and whether they are kept, chunk by chunk."""

# Of each class, so that all together need little memory.
_CHUNK = CHUNK // 16
# Of a magnitude, counted at a time.
_DIGIT = 16
_LARGEST = CLASSES // 2 - 1
# An eighth of an octave: the unit of distance.
_UNIT_BITS = 3


@dataclass(frozen=True, slots=True)
class Prediction:
    """A threshold, and by class how many elements there are, and how many it gets wrong."""

    code: PredictedCode
    totals: npt.NDArray[np.int64]
    wrong: npt.NDArray[np.int64]
    expected_bytes: int


def predict(
    members: Members, dtype: DType, held: int, k: int, *, ranked: bool = False
) -> Prediction | None:
    """Guess which `k` of `held` elements of some magnitudes are kept; None for integers."""
    if not dtype.mantissa_bits:
        return None
    # The k-th largest: as many are kept wrongly as are dropped wrongly, ties aside.
    threshold = _ranked(members, 8 * dtype.itemsize - 1, held, held - k)
    totals, wrong = np.zeros(CLASSES, np.int64), np.zeros(CLASSES, np.int64)
    for sizes, kept in members():
        classes = _classes(sizes, threshold, dtype)
        totals += np.bincount(classes, minlength=CLASSES)
        wrong += np.bincount(classes[kept != (sizes >= threshold)], minlength=CLASSES)
    expected = 0
    for total, count in zip(totals.tolist(), wrong.tolist(), strict=True):
        expected += len(varints.pack(count))
        if 0 < count < total:
            size = choose_rice(total, count)[1]
            expected += size + len(varints.pack(size))
    return Prediction(PredictedCode(held, threshold, ranked), totals, wrong, expected)


def _ranked(members: Members, width: int, held: int, rank: int) -> int:
    """Magnitude, of `width` bits, that `rank` of `held` come before, found from high bits down."""
    sizes, _ = next(members())
    if sizes.size == held:
        return int(np.partition(sizes, rank)[rank])
    found = 0
    while width:
        low = max(width - _DIGIT, 0)
        counts = np.zeros(1 << width - low, np.int64)
        for sizes, _ in members():
            kind = sizes.dtype.type
            inside = sizes[sizes >> kind(width) == kind(found)]
            digits = inside >> kind(low) & kind(counts.size - 1)
            counts += np.bincount(digits.astype(np.intp), minlength=counts.size)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit - 1]) if digit else 0
        found, width = found << width - low | digit, low
    return found


def pack(prediction: Prediction, members: Members, dtype: DType) -> memoryview:
    """Section: for each class a count and a length, then the gaps of each class."""
    threshold = prediction.code.threshold
    totals, counts = prediction.totals.tolist(), prediction.wrong.tolist()
    streams = [np.empty(total if count else 0, np.bool_)
               for total, count in zip(totals, counts, strict=True)]  # fmt: skip
    done = [0] * CLASSES
    for sizes, kept in members():
        classes = _classes(sizes, threshold, dtype)
        wrong = kept != (sizes >= threshold)
        for number, stream in enumerate(streams):
            if stream.size:
                mine = wrong[classes == number]
                first = done[number]
                done[number] += mine.size
                stream[first : done[number]] = mine
    head: list[bytes] = []
    body: list[bytes | memoryview] = []
    for stream, total, count in zip(streams, totals, counts, strict=True):
        head.append(varints.pack(count))
        if 0 < count < total:
            code = choose_rice(total, count)[0]
            gaps = compiled.pack_rice(Flags(total, bools=stream), code)
            head.append(varints.pack(len(gaps)))
            body.append(gaps)
    return memoryview(b"".join([*head, *body]))


def positions(
    section: memoryview, code: PredictedCode, base: Elements
) -> Iterator[tuple[int, Positions]]:
    """Kept positions chunk by chunk, checked, in the form of `positions.bitmap_positions`."""
    if not base.dtype.mantissa_bits:
        raise FormatError("its mask is predicted from a base tensor of integers")
    if code.threshold >= base.dtype.sign_bit:
        raise FormatError("its threshold is no number of the base")
    totals = np.zeros(CLASSES, np.int64)
    for _, _, _, classes in _chunks(base, code):
        totals += np.bincount(classes, minlength=CLASSES)
    if totals.sum() != code.held:
        raise FormatError(f"its mask needs a base tensor of {code.held} non-zero elements")
    takes = _read_streams(section, totals.tolist())
    done = [0] * CLASSES
    for start, places, sizes, classes in _chunks(base, code):
        chosen = sizes >= code.threshold
        for number, take in enumerate(takes):
            members = np.flatnonzero(classes == number)
            first = done[number]
            done[number] += members.size
            if take is not None:
                chosen[members[take(done[number]) - first]] ^= True
        yield start, places[chosen]


def _chunks(
    base: Elements, code: PredictedCode
) -> Iterator[tuple[int, Positions, Bits, npt.NDArray[np.int8]]]:
    for start, places in _candidates(base, code):
        sizes = magnitudes(base.bits[start : start + _CHUNK][places], base.dtype)
        yield start, places, sizes, _classes(sizes, code.threshold, base.dtype)


def _candidates(base: Elements, code: PredictedCode) -> Iterator[tuple[int, Positions]]:
    if not code.ranked:
        return pattern_positions(base, chunk=_CHUNK)
    n = base.bits.size
    return ((start, np.arange(min(_CHUNK, n - start))) for start in range(0, n, _CHUNK))


def _classes(sizes: Bits, threshold: int, dtype: DType) -> npt.NDArray[np.int8]:
    """Twice the bit length of the distance to the threshold, at most 4, plus the side."""
    large = sizes >= threshold
    limit = sizes.dtype.type(threshold)
    distance = np.where(large, sizes - limit, limit - sizes)
    distance = distance >> sizes.dtype.type(dtype.mantissa_bits - _UNIT_BITS)
    length = np.zeros(sizes.size, np.int8)
    for bits in range(_LARGEST):
        length += distance >= 1 << bits
    return length * np.int8(2) + large.view(np.int8)


def _read_streams(section: memoryview, totals: list[int]) -> list[_Take | None]:
    """For each class a function that takes the exceptions below an index; None without any."""
    at = 0
    streams: list[tuple[int, int]] = []
    for total in totals:
        count, at = varints.read(section, at, "its mask section")
        length = 0
        if count > total:
            raise FormatError("a class has more exceptions than elements")
        if 0 < count < total:
            length, at = varints.read(section, at, "its mask section")
            least, most = choose_rice(total, count)[0].length_range(total, count)
            if not least <= length <= most:
                raise FormatError(f"the exceptions of a class cannot take {length} bytes")
        streams.append((count, length))
    if at + sum(length for _, length in streams) != len(section):
        raise FormatError("its mask section does not end with the last class")
    takes: list[_Take | None] = []
    for (count, length), total in zip(streams, totals, strict=True):
        if not count:
            takes.append(None)
        elif count == total:
            takes.append(_every())
        else:
            code = choose_rice(total, count)[0]
            found = rice.positions(section[at : at + length], code, total, count, chunk=_CHUNK)
            takes.append(taking(start + places for start, places in found))
        at += length
    return takes


def _every() -> _Take:
    done = 0

    def take(stop: int) -> Positions:
        nonlocal done
        first, done = done, stop
        return np.arange(first, stop)

    return take
