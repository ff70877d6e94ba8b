"""Values as whole numbers of steps away from the base: 8 or 4 bits each, and fewer once coded.

The base is what the receiver decoded last. Whoever encodes the next difference to *that* sends
the error of this rounding along with it: it does not add up (a closed loop, error feedback).
Reading back is one multiplication and one addition in float32, the same on every machine.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sparsekit.codec import frames
from sparsekit.codec.based_codes import LEAST_STEP, LEVELS, PAIRED, LevelCode
from sparsekit.codec.elements import Bits
from sparsekit.codec.kept import Chunk, Kept
from sparsekit.errors import FormatError

_Levels = npt.NDArray[np.int8]

# A step for fewer values would save nothing.
_LEAST_VALUES = 16
# Steps as shares of the differences' root mean square. Of 4 bits one that costs some 2.5 bits and
# leaves an error of 0.21 of it; the few values beyond 5 times the mean wait for the next round.
# Of 8 bits one that costs some 6.4 bits and leaves 0.014, unless the largest value needs more.
_STEP_OF_RMS = {4: 0.72, 8: 0.05}


def pack(kept: Kept, kind: int) -> tuple[LevelCode, list[bytes]] | None:
    """Parameters and section of float32 values; None where they are too few.

    Raises
    ------
    OverflowError
        If a difference is not finite.
    """
    k = kept.bits.size
    if k < _LEAST_VALUES:
        return None
    most = np.float32(0)
    squares = []
    for chunk in kept.chunks():
        differences = _differences(chunk)
        if differences.size:
            largest = np.abs(differences).max()
            if not np.isfinite(largest):
                raise OverflowError
            most = max(most, largest)
            squares.append(float(np.square(differences, dtype=np.float64).sum()))
    step = most / np.float32(LEVELS[kind])
    best = np.float32(_STEP_OF_RMS[kind] * math.sqrt(math.fsum(squares) / k))
    step = min(step, best) if kind == 4 else max(step, best)
    if 0 < step < LEAST_STEP:
        return None
    code = LevelCode(kind, kept.base is not None, float(step))
    levels = np.zeros(k, np.int8)
    done = 0
    for chunk in kept.chunks() if step > 0 else ():
        with np.errstate(over="ignore"):
            steps = np.rint(_differences(chunk) / step)
        first, done = done, done + steps.size
        levels[first:done] = np.clip(steps, -LEVELS[kind], LEVELS[kind])
    return code, [frames.compress(_plane_of(levels, kind))]


def _differences(chunk: Chunk) -> npt.NDArray[np.float32]:
    values = np.ascontiguousarray(chunk.bits, "<u4").view("<f4")
    if chunk.held is None:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        difference: npt.NDArray[np.float32]
        difference = values - np.ascontiguousarray(chunk.held, "<u4").view("<f4")
    return difference


def _plane_of(levels: _Levels, kind: int) -> npt.NDArray[np.uint8]:
    if kind == 8:
        return levels.view(np.uint8)
    digits = (levels + np.int8(LEVELS[kind])).view(np.uint8)
    if digits.size % 2:
        digits = np.append(digits, np.uint8(LEVELS[kind]))
    return digits[::2] * np.uint8(PAIRED) + digits[1::2]


def reader(
    section: memoryview, code: LevelCode, k: int, scratch: npt.NDArray[np.uint8] | None = None
) -> Callable[[int, int, Bits | None], Bits]:
    """Return a function that gives the values from one index to another, each once, in order.

    Its third argument is what the base holds in their places; `scratch` is as for
    `frames.plane_reader`.
    """
    size = code.plane_bytes(k)
    plane = frames.plane_reader(section, size, None if scratch is None else scratch[-size:])
    next_levels = _bytes_reader(plane, code, k) if code.bits == 8 else _pairs(plane, code, k)
    step = np.float32(code.step)

    def read(start: int, stop: int, base: Bits | None) -> Bits:
        with np.errstate(over="ignore", invalid="ignore"):
            levels = next_levels(start, stop)
            values = levels.astype("<f4") * step
            if code.based:
                assert base is not None
                values = np.ascontiguousarray(base, "<u4").view("<f4") + values
        # -0.0 is +0.0 here.
        bits: Bits = (values + np.float32(0.0)).view("<u4")
        if code.based and base is not None:
            # As it is: a processor that takes subnormal numbers for 0 would change it.
            kept = base * (base != np.uint32(1 << 31))
            bits = np.where(levels == 0, kept, bits)
        return bits

    return read


def _bytes_reader(plane: frames.Read, code: LevelCode, k: int) -> Callable[[int, int], _Levels]:
    def read(start: int, stop: int) -> _Levels:
        levels = plane(stop - start, stop == k).view(np.int8)
        if levels.size and levels.min() < -LEVELS[code.bits]:
            raise FormatError("its plane has a level that no value has")
        return levels

    return read


def _pairs(plane: frames.Read, code: LevelCode, k: int) -> Callable[[int, int], _Levels]:
    size = code.plane_bytes(k)
    waiting = np.empty(0, np.uint8)

    def read(start: int, stop: int) -> _Levels:
        nonlocal waiting
        first, last = -(-start // 2), -(-stop // 2)
        pairs = plane(last - first, last == size)
        if pairs.size and pairs.max() >= PAIRED * PAIRED:
            raise FormatError("its plane has a pair of levels that no values have")
        digits = np.concatenate([waiting, np.stack(np.divmod(pairs, np.uint8(PAIRED)), 1).ravel()])
        wanted, waiting = digits[: stop - start], digits[stop - start :]
        if stop == k and (waiting != LEVELS[code.bits]).any():
            raise FormatError("its last pair has a second level without a value")
        return wanted.view(np.int8) - np.int8(LEVELS[code.bits])

    return read
