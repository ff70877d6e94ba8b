"""What a payload may hold: element types, codes and the sizes they need, in plain integers."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekit.codec.based_codes import (
    DELTA_PARAMETERS,
    LEVEL_PARAMETERS,
    PREDICTED_PARAMETERS,
    RANKED_PARAMETERS,
    SUBSET_PARAMETERS,
    DeltaCode,
    LevelCode,
    PredictedCode,
    SubsetCode,
    parse_delta,
    parse_levels,
    parse_predicted,
    parse_ranked,
    parse_subset,
)
from sparsekit.codec.codes import (
    HALF_BYTES,
    SPLIT_PARAMETERS,
    HalfCode,
    RiceCode,
    SplitCode,
    choose_rice,
    parse_half,
    parse_rice,
    parse_split,
)


class MaskCode(enum.IntEnum):
    """How a record says which elements are kept."""

    DENSE = 0
    ALL_ZERO = 1
    BITMAP = 2
    RICE = 3
    BITMAP_ZSTD = 4
    SAME = 5
    SUBSET = 6
    PREDICTED = 7
    CSR = 9
    RANKED = 10


class ValueCode(enum.IntEnum):
    """How a record stores the kept elements."""

    RAW = 0
    SPLIT = 1
    HALF = 2
    LEVELS = 3
    DELTA = 4


MINOR_0_MASKS = (MaskCode.DENSE, MaskCode.ALL_ZERO, MaskCode.BITMAP, MaskCode.SAME, MaskCode.CSR)
"""Mask codes that format 1.0 has."""
RELATED_MASKS = (MaskCode.SAME, MaskCode.SUBSET, MaskCode.PREDICTED, MaskCode.RANKED)
"""Mask codes that lean on the base."""

_MASK_PARAMETERS = {
    MaskCode.RICE: 1,
    MaskCode.SUBSET: SUBSET_PARAMETERS.size,
    MaskCode.PREDICTED: PREDICTED_PARAMETERS.size,
    MaskCode.RANKED: RANKED_PARAMETERS.size,
}
_VALUE_PARAMETERS = {
    ValueCode.SPLIT: SPLIT_PARAMETERS.size,
    ValueCode.HALF: HALF_BYTES,
    ValueCode.LEVELS: LEVEL_PARAMETERS.size,
    ValueCode.DELTA: DELTA_PARAMETERS.size,
}


def parameter_bytes(mask: int, value: int) -> int:
    """Length of the parameters of a mask code and a value code together."""
    of_values = _VALUE_PARAMETERS.get(ValueCode(value), 0)
    return _MASK_PARAMETERS.get(MaskCode(mask), 0) + of_values


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: code, name, bytes per element; of a float the sign bit and the mantissa."""

    code: int
    name: str
    itemsize: int
    sign_bit: int = 0
    mantissa_bits: int = 0


DTYPES = (
    DType(0, "float32", 4, 1 << 31, 23),
    DType(1, "float64", 8, 1 << 63, 52),
    DType(2, "float16", 2, 1 << 15, 10),
    DType(3, "bfloat16", 2, 1 << 15, 7),
    DType(4, "int8", 1),
    DType(5, "int16", 2),
    DType(6, "int32", 4),
    DType(7, "int64", 8),
    DType(8, "uint8", 1),
    DType(9, "bool", 1),
)
BOOL = DTYPES[9]
DTYPE_BY_NAME = {dtype.name: dtype for dtype in DTYPES}


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor of a payload, as its header describes it.

    ``dtype`` is None where an ancillary code is unknown: the record is then skipped.
    """

    name: str
    dtype: DType | None
    shape: tuple[int, ...]
    mask_code: int
    value_code: int
    k: int
    mask_len: int
    value_len: int
    checksum: int
    parameters: bytes = b""
    """First those of the mask code, then those of the value code."""

    @property
    def rice(self) -> RiceCode:
        """Parameters of a Rice-coded mask; those of a parsed record were checked."""
        code = parse_rice(self.parameters[0])
        assert code is not None
        return code

    @property
    def split(self) -> SplitCode:
        """Parameters of split values; those of a parsed record were checked."""
        code = parse_split(self.parameters[-SPLIT_PARAMETERS.size :])
        assert code is not None
        return code

    @property
    def half(self) -> HalfCode:
        """Parameters of 16-bit values; those of a parsed record were checked."""
        code = parse_half(self.parameters[-HALF_BYTES:])
        assert code is not None
        return code

    @property
    def subset(self) -> SubsetCode:
        """Parameters of a part of the base's mask; those of a parsed record were checked."""
        code = parse_subset(self.parameters[: SUBSET_PARAMETERS.size])
        assert code is not None
        return code

    @property
    def predicted(self) -> PredictedCode:
        """Parameters of a predicted or a ranked mask."""
        if self.mask_code == MaskCode.RANKED:
            return parse_ranked(self.parameters[: RANKED_PARAMETERS.size], self.n)
        return parse_predicted(self.parameters[: PREDICTED_PARAMETERS.size])

    @property
    def levels(self) -> LevelCode:
        """Parameters of quantised values; those of a parsed record were checked."""
        code = parse_levels(self.parameters[-LEVEL_PARAMETERS.size :])
        assert code is not None
        return code

    @property
    def delta(self) -> DeltaCode:
        """Parameters of differences; those of a parsed record were checked."""
        code = parse_delta(self.parameters[-DELTA_PARAMETERS.size :])
        assert code is not None
        return code

    @property
    def mask_needs_base(self) -> bool:
        """Whether the mask cannot be read without the base."""
        return self.mask_code in RELATED_MASKS

    @property
    def values_need_base(self) -> bool:
        """Whether the values cannot be read without the base."""
        levels = self.value_code == ValueCode.LEVELS
        return self.value_code == ValueCode.DELTA or (levels and self.levels.based)

    @property
    def minor(self) -> int:
        """Minor version of the format that its codes need."""
        if self.mask_code == MaskCode.RANKED:
            return 2
        return int(self.mask_code not in MINOR_0_MASKS or self.value_code != ValueCode.RAW)

    @property
    def n(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)


def quote(name: str) -> str:
    """A name fit for an error message: escaped, and cut where a hostile one is endless."""
    return repr(name) if len(name) <= 80 else repr(name[:80]) + "..."


def csr_grid(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the CSR view: dim 0 against the rest; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def csr_width(columns: int) -> int | None:
    """Bytes of a CSR number, or None where 32 bits are too few."""
    if columns < 2**16:
        return 2
    return 4 if columns < 2**32 else None


def mask_bytes(code: MaskCode, shape: Sequence[int], k: int) -> int | None:
    """Length of a mask section in bytes, or None where the code cannot hold such a tensor.

    Of a coded section the bytes to be expected, and None if it has nothing to code.
    """
    match code:
        case MaskCode.BITMAP:
            return -(-math.prod(shape) // 8)
        case MaskCode.CSR:
            rows, columns = csr_grid(shape)
            width = csr_width(columns)
            return None if width is None else width * (rows + k)
        case MaskCode.RICE:
            n = math.prod(shape)
            return choose_rice(n, k)[1] if 0 < k < n else None
        case MaskCode.BITMAP_ZSTD:
            return -(-math.prod(shape) // 8) - 1
        case MaskCode.DENSE | MaskCode.ALL_ZERO | MaskCode.SAME:
            return 0
        case MaskCode.SUBSET | MaskCode.PREDICTED | MaskCode.RANKED:
            raise AssertionError("their size depends on the base")


def value_bytes(dtype: DType, k: int) -> int:
    """Length of a raw value section of `k` elements in bytes; bools are packed 8 to a byte."""
    return -(-k // 8) if dtype is BOOL else k * dtype.itemsize
