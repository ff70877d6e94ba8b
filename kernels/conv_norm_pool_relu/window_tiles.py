"""Vector instructions of the single-channel kernels, as intrinsics for Numba.

Two kinds: 2x2x2 windows pooled in registers and gradients put back at their winners, and the
float64 products of the Gram matrix. Tiles, addresses and alignment are those of
`sparsekit.kernels.vector`.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import register_model
from numba.np import arrayobj

from sparsekit.kernels import vector_ir
from sparsekit.kernels.intrinsics import intrinsic
from sparsekit.kernels.vector import LANES, Tile

DOUBLE_LANES = LANES // 2
"""Float64 numbers in a vector."""

_F32, _F64 = ir.FloatType(), ir.DoubleType()
_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_VECTOR = ir.VectorType(_F32, LANES)
_INDICES = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, LANES)
_DOUBLES = ir.VectorType(_F64, DOUBLE_LANES)

# Written beside the winner's number where the ReLU lets no gradient through.
DEAD = 8


class DoubleTile(types.Type):
    """Numba's type of `count` vectors of float64 in registers."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(f"DoubleTile({count} x {DOUBLE_LANES} float64)")


@register_model(DoubleTile)
class _DoubleTileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: DoubleTile) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(_DOUBLES, fe_type.count))  # type: ignore[no-untyped-call]


def _constant(numbers: Any) -> Any:
    numbers = list(numbers)
    return ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)


def _everywhere(number: int) -> Any:
    return _constant([number] * LANES)


def _first_lanes(builder: Any, count: Any) -> Any:
    """Mask of the lanes below ``count`` (int64; may be negative or above `LANES`)."""
    one = builder.insert_element(
        ir.Constant(_INDICES, ir.Undefined), builder.trunc(count, _I32), _I32(0)
    )
    counts = builder.shuffle_vector(one, ir.Constant(_INDICES, ir.Undefined), _everywhere(0))
    return builder.icmp_signed("<", _constant(range(LANES)), counts)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def _array_at(name: str, dtype: Any) -> Any:
    def array_at(typing_context: Any, address: Any) -> Any:
        result = types.Array(dtype, 1, "C")

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            array = arrayobj.make_array(result)(context, builder)
            size = context.get_abi_sizeof(context.get_data_type(dtype))
            arrayobj.populate_array(
                array,
                data=builder.inttoptr(args[0], array.data.type),
                shape=[_I64(1 << 48)],
                strides=[_I64(size)],
                itemsize=_I64(size),
                meminfo=None,
            )
            return array._getvalue()

        return result(types.int64), generate

    array_at.__name__ = name
    array_at.__doc__ = (
        f"View memory at an address as an array of {dtype}, far longer than it is.\n\n"
        "`numba.carray` does the same, but LLVM does not always inline it; then it could raise."
    )
    return intrinsic(array_at)


float32_at = _array_at("float32_at", types.float32)
float64_at = _array_at("float64_at", types.float64)
int64_at = _array_at("int64_at", types.int64)


@intrinsic
def stack_bytes(typing_context: Any, count: Any) -> Any:
    """Address of ``count`` bytes on this thread's stack, aligned to 64; they are not cleared."""
    count_ = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature, args
        place = cgutils.alloca_once(builder, ir.ArrayType(_I8, count_))
        place.align = 64
        return builder.ptrtoint(place, _I64)

    return types.int64(count), generate


@intrinsic
def store_window_maxima(
    typing_context: Any,
    upper: Any,
    lower: Any,
    mean: Any,
    rstd: Any,
    y: Any,
    winner: Any,
    count: Any,
) -> Any:
    """Pool, normalise and cut off below 0; store ``count`` results, at most one vector.

    ``upper`` and ``lower`` are tiles of 2 x 2 vectors: two rows of a plane and of the next one. The
    result is ``max(0, (maximum - mean) * rstd)``. The winner's number (0 to 7 in C
    order, plus `DEAD` where the result is 0) is stored as a byte for every lane unless ``winner``
    is 0.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        rows = [
            builder.extract_value(args[i // 2], i % 2 * 2 + j) for j in (0, 1) for i in range(4)
        ]
        columns = [_maximum_of_rows(builder, rows[:4]), _maximum_of_rows(builder, rows[4:])]
        even, odd = (
            [
                builder.shuffle_vector(
                    columns[0][part], columns[1][part], _constant(range(first, 2 * LANES, 2))
                )
                for part in (0, 1)
            ]
            for first in (0, 1)
        )
        # Of equal values the first in C order: the odd column's only if its row comes first.
        odd_first = builder.icmp_signed("<", odd[1], even[1])
        odd_wins = builder.or_(
            builder.fcmp_ordered(">", odd[0], even[0]),
            builder.and_(builder.fcmp_ordered("==", odd[0], even[0]), odd_first),
        )
        best = builder.select(odd_wins, odd[0], even[0])
        number = builder.select(odd_wins, builder.or_(odd[1], _everywhere(1)), even[1])
        best = builder.fsub(best, vector_ir.splat(builder, args[2]))
        best = builder.fmul(best, vector_ir.splat(builder, args[3]))
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        alive = builder.fcmp_ordered(">", best, zero)
        best = builder.select(alive, best, zero)
        address = builder.inttoptr(args[4], _VECTOR.as_pointer())
        mask = _first_lanes(builder, args[6])
        _call(
            builder,
            f"llvm.masked.store.v{LANES}f32.p0",
            ir.VoidType(),
            [best, address, _I32(4), mask],
        )
        with builder.if_then(builder.icmp_signed("!=", args[5], _I64(0))):
            number = builder.select(alive, number, builder.or_(number, _everywhere(DEAD)))
            place = builder.inttoptr(args[5], _BYTES.as_pointer())
            builder.store(builder.trunc(number, _BYTES), place).align = 1
        return context.get_dummy_value()

    f32, i64 = types.float32, types.int64
    return types.void(upper, lower, f32, f32, i64, i64, i64), generate


def _maximum_of_rows(builder: Any, rows: list[Any]) -> tuple[Any, Any]:
    best, number = rows[0], _everywhere(0)
    for i, row in enumerate(rows[1:], 1):
        larger = builder.fcmp_ordered(">", row, best)
        best = builder.select(larger, row, best)
        number = builder.select(larger, _everywhere(2 * i), number)
    return best, number


_AT_WINNERS = types.Tuple((Tile(4), Tile(4), Tile(1)))


@intrinsic
def gradient_at_winners(typing_context: Any, grad_y: Any, winner: Any, count: Any) -> Any:
    """Spread ``count`` gradients, at most one vector, over the voxels of their windows.

    The inverse of `store_window_maxima`: returns the upper and the lower tile, 0 at voxels that are
    no winner or whose result was cut off, and one vector with the gradients that were not cut off.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        mask = _first_lanes(builder, args[2])
        address = builder.inttoptr(args[0], _VECTOR.as_pointer())
        grad = _call(
            builder,
            f"llvm.masked.load.v{LANES}f32.p0",
            _VECTOR,
            [address, _I32(4), mask, zero],
        )
        loaded = builder.load(builder.inttoptr(args[1], _BYTES.as_pointer()))
        loaded.align = 1
        number = builder.zext(loaded, _INDICES)
        alive = builder.icmp_signed("<", number, _everywhere(DEAD))
        total = builder.select(alive, grad, zero)
        rows: list[list[Any]] = [[], [], [], []]
        for half in (0, 1):
            twice = _constant(half * LANES // 2 + i // 2 for i in range(LANES))
            spread = builder.shuffle_vector(grad, grad, twice)
            of_column = builder.shuffle_vector(number, number, twice)
            row_number = builder.sub(of_column, _constant(i % 2 for i in range(LANES)))
            for i in range(4):
                here = builder.icmp_signed("==", row_number, _everywhere(2 * i))
                rows[i].append(builder.select(here, spread, zero))
        tiles = [
            vector_ir.pack(builder, rows[0] + rows[1]),
            vector_ir.pack(builder, rows[2] + rows[3]),
            vector_ir.pack(builder, [total]),
        ]
        return context.make_tuple(builder, signature.return_type, tiles)

    return _AT_WINNERS(types.int64, types.int64, types.int64), generate


@intrinsic
def dot(typing_context: Any, tile: Any, address: Any, row: Any, a: Any, b: Any) -> Any:
    """Products of a tile and the tile in memory, summed over vectors (not lanes): one vector."""
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        where = vector_ir.addresses(builder, args[1], args[2], a_, b_)
        total = None
        for address, value in zip(where, vector_ir.unpack(builder, args[0]), strict=True):
            read = vector_ir.load(builder, address)
            total = (
                builder.fmul(read, value)
                if total is None
                else vector_ir.fma(builder, read, value, total)
            )
        return vector_ir.pack(builder, [total])

    return Tile(1)(tile, types.int64, types.int64, a, b), generate


@intrinsic
def add_to_memory(typing_context: Any, address: Any, x: Any, y: Any) -> Any:
    """Add two tiles of one vector to the vector in memory, which is aligned to its size."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        x_, y_ = (builder.extract_value(tile, 0) for tile in args[1:])
        pointer = builder.inttoptr(args[0], _VECTOR.as_pointer())
        before = builder.load(pointer)
        before.align = 4 * LANES
        builder.store(builder.fadd(before, builder.fadd(x_, y_)), pointer).align = 4 * LANES
        return context.get_dummy_value()

    return types.void(types.int64, x, y), generate


@intrinsic
def double_zeros(typing_context: Any, count: Any) -> Any:
    """Return a tile of ``count`` vectors of float64 zeros."""
    kind = DoubleTile(count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, builder, signature, args
        return ir.Constant(ir.ArrayType(_DOUBLES, kind.count), None)

    return kind(count), generate


@intrinsic
def add_lag_products(
    typing_context: Any, tile: Any, base: Any, partner: Any, row: Any, rows: Any
) -> Any:
    """Add products of one vector of float32 with vectors near it, exactly, in float64.

    ``tile`` has 5 vectors for each of ``rows`` rows, ``row`` bytes apart from ``partner`` on.
    Vector ``5 * i + s`` gains ``(base moved back by s - 2 floats) * (partner of row i)``: a sum
    over all positions of a line then holds ``sum over w of base[w] * partner[w + s - 2]``.
    """
    rows_ = rows.literal_value
    singles = ir.VectorType(_F32, DOUBLE_LANES)

    def load(builder: Any, address: Any) -> Any:
        return builder.fpext(vector_ir.load(builder, address, singles), _DOUBLES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        sums = [builder.extract_value(args[0], i) for i in range(5 * rows_)]
        near = [load(builder, builder.add(args[1], _I64(-4 * (s - 2)))) for s in range(5)]
        address = args[2]
        for i in range(rows_):
            address = builder.add(address, args[3]) if i else address
            other = load(builder, address)
            for s in range(5):
                sums[5 * i + s] = _call(
                    builder,
                    f"llvm.fma.v{DOUBLE_LANES}f64",
                    _DOUBLES,
                    [near[s], other, sums[5 * i + s]],
                )
        result = ir.Constant(ir.ArrayType(_DOUBLES, len(sums)), ir.Undefined)
        for i, total in enumerate(sums):
            result = builder.insert_value(result, total, i)
        return result

    return tile(tile, types.int64, types.int64, types.int64, rows), generate


@intrinsic
def store_doubles(typing_context: Any, tile: Any, address: Any) -> Any:
    """Write a tile of float64 vectors, one after another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        for i in range(tile.count):
            place = builder.add(args[1], _I64(i * 8 * DOUBLE_LANES))
            pointer = builder.inttoptr(place, _DOUBLES.as_pointer())
            builder.store(builder.extract_value(args[0], i), pointer).align = 8
        return context.get_dummy_value()

    return types.void(tile, types.int64), generate
