"""Whether a record's numbers fit its codes; nothing is taken by any of them before."""

import math

from sparsekit.codec.based_codes import (
    DELTA_PARAMETERS,
    LEVEL_PARAMETERS,
    SUBSET_PARAMETERS,
    LevelCode,
    PredictedCode,
    SubsetCode,
    parse_delta,
    parse_levels,
    parse_subset,
)
from sparsekit.codec.codes import (
    HALF_BYTES,
    SPLIT_PARAMETERS,
    HalfCode,
    SplitCode,
    parse_half,
    parse_rice,
    parse_split,
)
from sparsekit.codec.records import (
    DType,
    MaskCode,
    Record,
    ValueCode,
    mask_bytes,
    parameter_bytes,
    quote,
    value_bytes,
)
from sparsekit.errors import FormatError

MAX_TENSOR_BYTES = 2**63 - 1


def check_record(record: Record, dtype: DType) -> None:
    """Raise `FormatError` unless a record that is not skipped has numbers that are possible."""
    name = quote(record.name)
    # Zero extents count as 1: the product of the others must still be a possible size.
    if math.prod(extent or 1 for extent in record.shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise FormatError(f"tensor {name}: its shape has too many elements")
    n, k = record.n, record.k
    code = MaskCode(record.mask_code)
    if k > n or (code is MaskCode.DENSE and k != n) or (code is MaskCode.ALL_ZERO and k):
        raise FormatError(f"tensor {name}: {k} kept of {n} elements contradicts its mask encoding")
    needed = parameter_bytes(code, record.value_code)
    if len(record.parameters) != needed:
        raise FormatError(
            f"tensor {name}: its codes take {needed} bytes of parameters, "
            f"got {len(record.parameters)}"
        )
    for part, found, (least, most) in (
        ("mask", record.mask_len, _mask_range(record, code)),
        ("value", record.value_len, _value_range(record, dtype)),
    ):
        if not least <= found <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            raise FormatError(
                f"tensor {name}: expected a {part} section of {expected} bytes, got {found}"
            )


def _mask_range(record: Record, code: MaskCode) -> tuple[int, int]:
    """Fewest and most bytes of a record's mask section."""
    if code is MaskCode.RICE:
        rice = parse_rice(record.parameters[0])
        if rice is None or not rice.coded(record.n, record.k):
            raise FormatError(f"tensor {quote(record.name)}: its Rice parameter is not possible")
        return rice.length_range(record.n, record.k)
    if code in (MaskCode.SUBSET, MaskCode.PREDICTED, MaskCode.RANKED):
        return _related_range(record, code)
    needed = mask_bytes(code, record.shape, record.k)
    if code is MaskCode.BITMAP_ZSTD:
        return 1, max(0, -(-record.n // 8) - 1)
    if needed is None:
        raise FormatError(f"tensor {quote(record.name)}: its mask encoding cannot hold its shape")
    return needed, needed


def _related_range(record: Record, code: MaskCode) -> tuple[int, int]:
    related: SubsetCode | PredictedCode | None
    if code is MaskCode.SUBSET:
        related = parse_subset(record.parameters[: SUBSET_PARAMETERS.size])
    else:
        related = record.predicted
    found = None if related is None else related.length_range(record.n, record.k)
    if found is None:
        raise FormatError(
            f"tensor {quote(record.name)}: the parameters of its mask are not possible"
        )
    return found


def _value_range(record: Record, dtype: DType) -> tuple[int, int]:
    """Fewest and most bytes of a record's value section."""
    parameters, name = record.parameters, dtype.name
    code: SplitCode | HalfCode | LevelCode | None
    found: tuple[int, int] | None
    match ValueCode(record.value_code):
        case ValueCode.RAW:
            needed = value_bytes(dtype, record.k)
            return needed, needed
        case ValueCode.DELTA:
            delta = parse_delta(parameters[-DELTA_PARAMETERS.size :])
            found = None if delta is None else delta.length_range(name, record.n, record.k)
        case other:
            if other is ValueCode.SPLIT:
                code = parse_split(parameters[-SPLIT_PARAMETERS.size :])
            elif other is ValueCode.HALF:
                code = parse_half(parameters[-HALF_BYTES:])
            else:
                code = parse_levels(parameters[-LEVEL_PARAMETERS.size :])
            found = None if code is None else code.length_range(name, record.k)
    if found is None:
        raise FormatError(
            f"tensor {quote(record.name)}: the parameters of its values are not possible"
        )
    return found
