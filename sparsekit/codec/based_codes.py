"""Parameters of sections that lean on a base, and of quantised values, in plain integers."""

import math
import struct
from dataclasses import dataclass

from sparsekit.codec.codes import RiceCode, parse_rice

SUBSET_PARAMETERS = struct.Struct("<BQ")
PREDICTED_PARAMETERS = struct.Struct("<QQ")
RANKED_PARAMETERS = struct.Struct("<Q")
LEVEL_PARAMETERS = struct.Struct("<BBf")
DELTA_PARAMETERS = struct.Struct("<BhI")
KINDS = ("float32", "float16", "bfloat16")
"""What numbers differences are taken between."""

CLASSES = 10
"""Of a prediction, by how sure it is."""
BLOCK = 2**13
"""Differences keep the low bits of so many elements together."""
LEVELS = {4: 7, 8: 127}
"""Largest level by the number of bits that a level nominally has."""
LEAST_STEP = 2.0**-100
"""Of steps that are not 0: no sum of a multiple and a base value is then subnormal."""
PAIRED = 15
"""Levels of 4 bits travel in pairs: a digit of 15 each."""
_MOST_DELTA = 2**32
_EXPONENTS = 255
_MOST_LENGTH = 33


@dataclass(frozen=True, slots=True)
class SubsetCode:
    """Parameters of a mask that keeps some of the base's non-zero elements."""

    rice: RiceCode
    held: int
    """Non-zero elements of the base."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        return SUBSET_PARAMETERS.pack(self.rice.parameter, self.held)

    def length_range(self, n: int, k: int) -> tuple[int, int] | None:
        """Fewest and most bytes of a section; None if there is none."""
        if not k <= self.held <= n or not self.rice.coded(self.held, k):
            return None
        return self.rice.length_range(self.held, k)


def parse_subset(parameters: bytes) -> SubsetCode | None:
    """Read the bytes of a record; None for some that no writer makes."""
    parameter, held = SUBSET_PARAMETERS.unpack(parameters)
    rice = parse_rice(parameter)
    return None if rice is None else SubsetCode(rice, held)


@dataclass(frozen=True, slots=True)
class PredictedCode:
    """Parameters of a mask that keeps the base's large elements, with exceptions."""

    held: int
    """Non-zero elements of the base; of a ranked mask all."""
    threshold: int
    """Bit pattern, without the sign, from which on the prediction keeps an element."""
    ranked: bool = False
    """Whether elements that are zero in the base may be kept."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        if self.ranked:
            return RANKED_PARAMETERS.pack(self.threshold)
        return PREDICTED_PARAMETERS.pack(self.held, self.threshold)

    def length_range(self, n: int, k: int) -> tuple[int, int] | None:
        """Fewest bytes of a section, and more than the most; None if there is none."""
        if not k <= self.held <= n:
            return None
        return CLASSES, 32 * CLASSES + self.held // 4


def parse_predicted(parameters: bytes) -> PredictedCode:
    """Read the bytes of a record."""
    return PredictedCode(*PREDICTED_PARAMETERS.unpack(parameters))


def parse_ranked(parameters: bytes, n: int) -> PredictedCode:
    """Read the bytes of a record of a tensor of `n` elements."""
    (threshold,) = RANKED_PARAMETERS.unpack(parameters)
    return PredictedCode(n, threshold, ranked=True)


@dataclass(frozen=True, slots=True)
class LevelCode:
    """Parameters of values that are a number of steps away from the base, or from 0."""

    bits: int
    """One of `LEVELS`."""
    based: bool
    step: float
    """A float32."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        return LEVEL_PARAMETERS.pack(self.bits, int(self.based), self.step)

    def plane_bytes(self, k: int) -> int:
        """Bytes of the levels of `k` values before they are compressed."""
        return k if self.bits == 8 else -(-k // 2)

    def length_range(self, dtype: str, k: int) -> tuple[int, int] | None:
        """Fewest and most bytes of a section of `k` values; None if there is none."""
        return (1, self.plane_bytes(k)) if dtype == "float32" and k else None


def parse_levels(parameters: bytes) -> LevelCode | None:
    """Read the bytes of a record; None for some that no writer makes."""
    bits, based, step = LEVEL_PARAMETERS.unpack(parameters)
    if bits not in LEVELS or based > 1 or not math.isfinite(step) or math.copysign(1, step) < 0:
        return None
    if 0 < step < LEAST_STEP:
        return None
    return LevelCode(bits, bool(based), step)


@dataclass(frozen=True, slots=True)
class DeltaCode:
    """Parameters of values that are stored as differences to the base's."""

    kind: str
    """One of `KINDS`."""
    smallest: int
    """What the class of a difference is counted from."""
    first_len: int
    """Bytes of the plane of classes as it stands in the section."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        return DELTA_PARAMETERS.pack(KINDS.index(self.kind), self.smallest, self.first_len)

    def length_range(self, dtype: str, n: int, k: int) -> tuple[int, int] | None:
        """Fewest and most bytes of a section of `k` of `n` values; None if there is none."""
        if dtype != "float32" or not 1 <= self.first_len <= k < _MOST_DELTA:
            return None
        return self.first_len, self.first_len + 4 * k + -(-n // BLOCK)


def parse_delta(parameters: bytes) -> DeltaCode | None:
    """Read the bytes of a record; None for some that no writer makes."""
    kind, smallest, first_len = DELTA_PARAMETERS.unpack(parameters)
    if kind >= len(KINDS) or not -31 <= smallest <= _EXPONENTS + _MOST_LENGTH:
        return None
    return DeltaCode(KINDS[kind], smallest, first_len)
