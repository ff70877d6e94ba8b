"""Parameters of the coded sections, and the lengths that follow from them, in plain integers."""

import math
import struct
from dataclasses import dataclass

MAX_R = 31
_COMPLEMENT = 0x80


@dataclass(frozen=True, slots=True)
class RiceCode:
    """Parameters of a section."""

    r: int
    """Low bits of a gap that are stored as they are."""
    complement: bool
    """Whether the positions that are not kept are coded, because they are fewer."""

    @property
    def parameter(self) -> int:
        """The byte that stands in a record."""
        return self.r | (_COMPLEMENT if self.complement else 0)

    def coded(self, n: int, k: int) -> int:
        """Number of coded positions of a mask that keeps `k` of `n`."""
        return n - k if self.complement else k

    def length_range(self, n: int, k: int) -> tuple[int, int]:
        """Fewest and most bytes of a section."""
        c = self.coded(n, k)
        least = (1 + self.r) * c
        return -(-least // 8), -(-(least + ((n - c) >> self.r)) // 8)


def parse_rice(parameter: int) -> RiceCode | None:
    """Read the byte of a record; None for one that no writer makes."""
    r = parameter & ~_COMPLEMENT
    return RiceCode(r, bool(parameter & _COMPLEMENT)) if r <= MAX_R else None


def choose_rice(n: int, k: int) -> tuple[RiceCode, int]:
    """Parameters for a mask that keeps `k` of `n`, and the bytes to be expected.

    The expectation is that of a random mask. It takes products and quotients only, which are the
    same on every machine, so that every machine chooses alike.
    """
    c = min(k, n - k)
    best, least = 0, float("inf")
    # Probability that a gap reaches 2**r.
    beyond = 1.0 - c / n
    for r in range(MAX_R + 1):
        bits = c * (1 + r) + c * (beyond / (1.0 - beyond))
        if bits < least:
            best, least = r, bits
        beyond *= beyond
    return RiceCode(best, k > n - k), -(-math.ceil(least) // 8)


MOST_SPLIT = 2**32
"""So many values are not split: the first plane's length has 32 bits."""
SPLIT_PARAMETERS = struct.Struct("<BBI")
HALF_BYTES = 1 + SPLIT_PARAMETERS.size
"""Parameters of 16-bit values: which kind, and those of a split section."""
HALVES = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Layout:
    """Widths of a float type's fields, and of its planes."""

    exponent_bits: int
    mantissa_bits: int
    low_bytes: int
    """Bytes of a value that are stored raw."""


LAYOUTS = {
    "float32": Layout(8, 23, 2),
    "float16": Layout(5, 10, 0),
    "bfloat16": Layout(8, 7, 0),
}


@dataclass(frozen=True, slots=True)
class SplitCode:
    """Parameters of a section."""

    joined: bool
    """Whether the first plane holds 3 bits of the mantissa beside the exponent's distance."""
    smallest: int
    """Exponent that the distances are counted from; 0 unless `joined`."""
    first_len: int
    """Bytes of the first plane as it stands in the section."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        return SPLIT_PARAMETERS.pack(int(self.joined), self.smallest, self.first_len)

    def length_range(self, dtype: str, k: int) -> tuple[int, int] | None:
        """Fewest and most bytes of a section of `k` values; None if there is none."""
        layout = LAYOUTS.get(dtype)
        if layout is None or not 1 <= self.first_len <= k < MOST_SPLIT:
            return None
        # What is left of the mantissa has to fit into a byte beside the sign.
        if not self.joined and layout.mantissa_bits - 8 * layout.low_bytes > 7:
            return None
        fixed = self.first_len + k * layout.low_bytes
        return fixed + 1, fixed + k


def parse_split(parameters: bytes) -> SplitCode | None:
    """Read the bytes of a record; None for some that no writer makes."""
    joined, smallest, first_len = SPLIT_PARAMETERS.unpack(parameters)
    if joined > 1 or (smallest and not joined):
        return None
    return SplitCode(bool(joined), smallest, first_len)


@dataclass(frozen=True, slots=True)
class HalfCode:
    """Parameters of float32 values that travel as 16-bit floats."""

    kind: str
    """One of `HALVES`."""
    split: SplitCode | None
    """Of a split section; None of a raw one."""

    @property
    def parameters(self) -> bytes:
        """The bytes that stand in a record."""
        inner = bytes(SPLIT_PARAMETERS.size) if self.split is None else self.split.parameters
        return bytes([HALVES.index(self.kind)]) + inner

    def length_range(self, dtype: str, k: int) -> tuple[int, int] | None:
        """Fewest and most bytes of a section of `k` values; None if there is none."""
        if dtype != "float32":
            return None
        return (2 * k, 2 * k) if self.split is None else self.split.length_range(self.kind, k)


def parse_half(parameters: bytes) -> HalfCode | None:
    """Read the bytes of a record; None for some that no writer makes."""
    if parameters[0] >= len(HALVES):
        return None
    kind, inner = HALVES[parameters[0]], parameters[1:]
    if not any(inner):
        return HalfCode(kind, None)
    split = parse_split(inner)
    return None if split is None else HalfCode(kind, split)
