"""Vector instructions for 2x2x2 windows: maxima and their numbers, and gradients back to voxels."""

from typing import Any

from llvmlite import ir
from numba.core import types

from sparsekit.kernels.intrinsics import intrinsic
from sparsekit.kernels.vector_ir import (
    I8,
    I32,
    I64,
    LANES,
    VECTOR,
    VECTOR_BYTES,
    fma,
    load,
    masked_load,
    masked_store,
    pointer,
    shuffle,
    splat,
)


@intrinsic
def pool_windows(
    typing_context: Any,
    first: Any,
    row: Any,
    plane: Any,
    columns: Any,
    pivot: Any,
    target: Any,
    winner: Any,
    sums: Any,
) -> Any:
    """Take window maxima of the next 2 * `LANES` columns of two rows in two planes.

    Parameters (int64 addresses and bytes but for ``pivot``, float32)
    ----------
    first
        First column of the upper row in the upper plane.
    row, plane
        Bytes to the lower row and to the lower plane.
    columns
        Columns that are left, at least 1.
    pivot
        Subtracted before sums are taken.
    target, winner
        Where ``columns // 2`` maxima go (float32), and the numbers of the voxels that they came
        from (uint8, 0 to 7 in C order; of equal values the first).
    sums
        Two vectors in memory: sums of all values less the pivot, and of their squares, are added.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        first_, row_, plane_, columns_, pivot_, target_, winner_, sums_ = args
        integers = ir.VectorType(I32, LANES)
        count = builder.trunc(columns_, I32)
        tops, places = [], []
        total = load(builder, sums_)
        squares = load(builder, builder.add(sums_, I64(VECTOR_BYTES)))
        center = splat(builder, pivot_)
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        for half in range(2):
            start = builder.add(first_, I64(half * VECTOR_BYTES))
            lower = builder.add(start, plane_)
            lanes = ir.Constant(integers, [half * LANES + i for i in range(LANES)])
            inside = builder.icmp_signed("<", lanes, splat(builder, count))
            values = [
                masked_load(builder, address, inside)
                for address in (start, builder.add(start, row_), lower, builder.add(lower, row_))
            ]
            top = values[0]
            place = ir.Constant(integers, [0] * LANES)
            for number, value in zip((2, 4, 6), values[1:], strict=True):
                larger = builder.fcmp_ordered(">", value, top)
                place = builder.select(larger, ir.Constant(integers, [number] * LANES), place)
                top = builder.select(larger, value, top)
            tops.append(top)
            places.append(place)
            for value in values:
                moved = builder.select(inside, builder.fsub(value, center), zero)
                total = builder.fadd(total, moved)
                squares = fma(builder, moved, moved, squares)
        builder.store(total, pointer(builder, sums_)).align = 4
        builder.store(squares, pointer(builder, builder.add(sums_, I64(VECTOR_BYTES)))).align = 4
        even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        left, right = (shuffle(builder, tops[0], tops[1], lanes) for lanes in (even, odd))
        left_at, right_at = (shuffle(builder, places[0], places[1], lanes) for lanes in (even, odd))
        right_at = builder.add(right_at, ir.Constant(integers, [1] * LANES))
        equal_and_before = builder.and_(
            builder.fcmp_ordered("==", right, left), builder.icmp_signed("<", right_at, left_at)
        )
        take_right = builder.or_(builder.fcmp_ordered(">", right, left), equal_and_before)
        value = builder.select(take_right, right, left)
        place = builder.trunc(
            builder.select(take_right, right_at, left_at), ir.VectorType(I8, LANES)
        )
        lanes = ir.Constant(integers, list(range(LANES)))
        pooled = splat(builder, builder.ashr(count, I32(1)))
        inside = builder.icmp_signed("<", lanes, pooled)
        masked_store(builder, value, target_, inside, f"v{LANES}f32")
        masked_store(builder, place, winner_, inside, f"v{LANES}i8")
        return context.get_dummy_value()

    return (
        types.void(*[types.int64] * 4, types.float32, *[types.int64] * 3),
        generate,
    )


@intrinsic
def unpool_windows(
    typing_context: Any,
    source: Any,
    row: Any,
    plane: Any,
    target: Any,
    target_plane: Any,
    columns: Any,
    pooled: Any,
    winner: Any,
    grad: Any,
    high: Any,
    low: Any,
    slope: Any,
    offset: Any,
    rstd: Any,
) -> Any:
    """Write the gradient of the norm's input for 2 * `LANES` columns of two rows and two planes.

    Each voxel gets ``slope * ((x - high) - low) + offset``, and the winner of each window,
    where the pooled map is not <= 0, ``rstd * grad`` in addition.

    Parameters (int64 addresses and bytes but for the last five, float32)
    ----------
    source, plane
        First column of the upper row of ``x`` in the upper plane, and bytes to the lower plane.
    target, target_plane
        The same for the result; the rows of both lie ``row`` bytes apart.
    columns
        Columns that are left, at least 1.
    pooled, winner, grad
        First of the ``columns // 2`` windows in each map; of ``winner`` a whole vector is read.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        (
            source_, row_, plane_, target_, target_plane_, columns_, pooled_, winner_, grad_,
            high_, low_, slope_, offset_, rstd_,
        ) = args  # fmt: skip
        integers, octets = ir.VectorType(I32, LANES), ir.VectorType(I8, LANES)
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        count = builder.trunc(columns_, I32)
        lanes = ir.Constant(integers, list(range(LANES)))
        windows = splat(builder, builder.ashr(count, I32(1)))
        counted = builder.icmp_signed("<", lanes, windows)
        # Unordered: NaN is not <= 0. The last windows border on memory of others.
        alive = builder.fcmp_unordered(">", masked_load(builder, pooled_, counted), zero)
        arriving = builder.fmul(splat(builder, rstd_), masked_load(builder, grad_, counted))
        arriving = builder.select(alive, arriving, zero)
        numbers = builder.load(pointer(builder, winner_, octets))
        numbers.align = 1
        numbers = builder.zext(numbers, integers)
        center_high, center_low = splat(builder, high_), splat(builder, low_)
        factor, summand = splat(builder, slope_), splat(builder, offset_)
        low_half = [i // 2 + (i % 2) * LANES for i in range(LANES)]
        high_half = [LANES // 2 + i for i in low_half]
        for number in (0, 2, 4, 6):
            first = builder.add(source_, plane_) if number >= 4 else source_
            place = builder.add(target_, target_plane_) if number >= 4 else target_
            if number % 4 == 2:
                first, place = builder.add(first, row_), builder.add(place, row_)
            left, right = (
                builder.select(
                    builder.icmp_unsigned(
                        "==", numbers, ir.Constant(integers, [number + side] * LANES)
                    ),
                    arriving,
                    zero,
                )
                for side in (0, 1)
            )
            for half, order in enumerate((low_half, high_half)):
                start = I64(half * VECTOR_BYTES)
                here = ir.Constant(integers, [half * LANES + i for i in range(LANES)])
                inside = builder.icmp_signed("<", here, splat(builder, count))
                value = masked_load(builder, builder.add(first, start), inside)
                moved = builder.fsub(value, center_high)
                moved = builder.fsub(moved, center_low)
                value = fma(builder, factor, moved, summand)
                value = builder.fadd(value, shuffle(builder, left, right, order))
                masked_store(builder, value, builder.add(place, start), inside, f"v{LANES}f32")
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, *[types.float32] * 5), generate
