"""Register tiles for Numba kernels: vector instructions that its own compiler would not choose.

A tile is ``a`` x ``b`` vectors of `LANES` float32 numbers that live in registers. Kernels hold sums
in a tile while they walk a list, so that memory is read once per multiply-add and nothing is
written until the end. Addresses are int64 numbers of bytes; a tile's rows lie ``row`` bytes apart
and the vectors of a row follow one another. Loads and stores need the alignment of one float
only. ``a``, ``b`` and the like must be constants of the kernel's module or closure: they decide
the machine code.

The vector width is that of the machine (512, 256 or 128 bits), as is the number of registers.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.extending import register_model

from sparsekit.kernels.intrinsics import intrinsic
from sparsekit.kernels.vector_ir import (
    F32,
    I8,
    I32,
    I64,
    LANES,
    REGISTERS,
    UNDEFINED,
    VECTOR,
    VECTOR_BYTES,
    addresses,
    fma,
    load,
    masked_store,
    pack,
    pointer,
    shuffle,
    splat,
    unpack,
)

__all__ = [
    "LANES",
    "REGISTERS",
    "VECTOR_BYTES",
    "Tile",
    "add_lane_sums",
    "add_product",
    "add_product_and_dot",
    "add_products",
    "biased",
    "copy_first",
    "filled",
    "leave_tile",
    "load_tile",
    "prefetch",
    "store_tile",
    "stream_tile",
    "stream_vector",
]


class Tile(types.Type):
    """Numba's type of `count` vectors in registers."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(f"Tile({count} x {LANES} float32)")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Tile) -> None:
        super().__init__(dmm, fe_type, ir.ArrayType(VECTOR, fe_type.count))  # type: ignore[no-untyped-call]


@intrinsic
def filled(typing_context: Any, count: Any, scalar: Any) -> Any:
    """Return a tile of ``count`` vectors with ``scalar`` (float32) in every lane."""
    kind = Tile(count.literal_value)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return pack(builder, [splat(builder, args[1])] * kind.count)

    return kind(count, types.float32), generate


@intrinsic
def load_tile(typing_context: Any, address: Any, row: Any, a: Any, b: Any) -> Any:
    """Return the tile that stands in memory at ``address``."""
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        where = addresses(builder, args[0], args[1], a_, b_)
        return pack(builder, [load(builder, address) for address in where])

    return Tile(a_ * b_)(types.int64, types.int64, a, b), generate


@intrinsic
def store_tile(typing_context: Any, tile: Any, address: Any, row: Any, a: Any, b: Any) -> Any:
    """Write a tile to memory at ``address``."""
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        where = addresses(builder, args[1], args[2], a_, b_)
        for address, vector in zip(where, unpack(builder, args[0]), strict=True):
            builder.store(vector, pointer(builder, address)).align = 4
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, a, b), generate


@intrinsic
def stream_tile(typing_context: Any, tile: Any, address: Any, row: Any, a: Any, b: Any) -> Any:
    """Write a tile past the caches; address and row must be multiples of `VECTOR_BYTES`.

    For results larger than the caches: the lines are not read from memory first.
    """
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        where = addresses(builder, args[1], args[2], a_, b_)
        for address, vector in zip(where, unpack(builder, args[0]), strict=True):
            store = builder.store(vector, pointer(builder, address))
            store.align = VECTOR_BYTES
            store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64, a, b), generate


@intrinsic
def add_product(
    typing_context: Any, tile: Any, scalar: Any, address: Any, row: Any, a: Any, b: Any
) -> Any:
    """Return ``tile + scalar * memory``, the memory's tile standing at ``address``."""
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        factor = splat(builder, args[1])
        where = addresses(builder, args[2], args[3], a_, b_)
        sums = unpack(builder, args[0])
        return pack(
            builder,
            [
                fma(builder, load(builder, address), factor, total)
                for address, total in zip(where, sums, strict=True)
            ],
        )

    return tile(tile, types.float32, types.int64, types.int64, a, b), generate


@intrinsic
def add_products(
    typing_context: Any,
    tile: Any,
    scalars: Any,
    address: Any,
    row: Any,
    a: Any,
    b: Any,
) -> Any:
    """Return several tiles in one, ``tile[q] + scalars[q] * memory``, reading the memory once.

    ``scalars`` is the address of as many float32 numbers as ``tile`` is larger than ``a`` x ``b``.
    """
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        sums = unpack(builder, args[0])
        count = a_ * b_
        values = [
            load(builder, address) for address in addresses(builder, args[2], args[3], a_, b_)
        ]
        for q in range(len(sums) // count):
            factor = splat(builder, load(builder, builder.add(args[1], I64(4 * q)), F32))
            for i, value in enumerate(values):
                sums[q * count + i] = fma(builder, value, factor, sums[q * count + i])
        return pack(builder, sums)

    return tile(tile, types.int64, types.int64, types.int64, a, b), generate


@intrinsic
def biased(typing_context: Any, address: Any, channels: Any, count: Any) -> Any:
    """Return ``channels`` tiles of ``count`` vectors in one, each full of its float32 number."""
    channels_, count_ = channels.literal_value, count.literal_value
    kind = Tile(channels_ * count_)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        vectors = []
        for q in range(channels_):
            number = load(builder, builder.add(args[0], I64(4 * q)), F32)
            vectors += [splat(builder, number)] * count_
        return pack(builder, vectors)

    return kind(types.int64, channels, count), generate


@intrinsic
def add_product_and_dot(
    typing_context: Any,
    tile: Any,
    other: Any,
    scalar: Any,
    address: Any,
    row: Any,
    a: Any,
    b: Any,
) -> Any:
    """Read the tile ``m`` at ``address`` once for two uses.

    Returns ``tile + scalar * m`` and a tile of one vector, the products ``other * m`` summed over
    the vectors (not over the lanes).
    """
    a_, b_ = a.literal_value, b.literal_value
    result = types.Tuple((tile, Tile(1)))

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        factor = splat(builder, args[2])
        sums, others = unpack(builder, args[0]), unpack(builder, args[1])
        dot = None
        for i, address in enumerate(addresses(builder, args[3], args[4], a_, b_)):
            value = load(builder, address)
            sums[i] = fma(builder, value, factor, sums[i])
            dot = (
                builder.fmul(value, others[i])
                if dot is None
                else fma(builder, value, others[i], dot)
            )
        return context.make_tuple(builder, result, [pack(builder, sums), pack(builder, [dot])])

    return result(tile, other, types.float32, types.int64, types.int64, a, b), generate


@intrinsic
def add_lane_sums(typing_context: Any, source: Any, target: Any, count: Any) -> Any:
    """Add the sum over lanes of each of ``count`` vectors to ``count`` float32 numbers.

    The vectors stand one after another at the address ``source``, the numbers at ``target``;
    ``count`` is a power of two up to `LANES`. The order of the additions is fixed.
    """
    count_ = count.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        vectors = [
            load(builder, builder.add(args[0], I64(i * VECTOR_BYTES))) for i in range(count_)
        ]
        run = 1
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_add_halves(builder, x, y, run) for x, y in pairs]
            run *= 2
        total, width = vectors[0], LANES
        while width > count_:
            width //= 2
            low, high = list(range(width)), list(range(width, 2 * width))
            total = builder.fadd(
                shuffle(builder, total, total, low), shuffle(builder, total, total, high)
            )
        kind = ir.VectorType(F32, count_)
        updated = builder.fadd(load(builder, args[1], kind), total)
        builder.store(updated, pointer(builder, args[1], kind)).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, count), generate


def _add_halves(builder: Any, x: Any, y: Any, run: int) -> Any:
    """Halve the lanes of x and y by adding neighbouring runs, and interleave the results."""
    low, high = [], []
    for start in range(0, LANES, 2 * run):
        first, second = range(start, start + run), range(start + run, start + 2 * run)
        low += [*first, *(LANES + i for i in first)]
        high += [*second, *(LANES + i for i in second)]
    return builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high))


@intrinsic
def prefetch(typing_context: Any, address: Any, lines: Any, write: Any) -> Any:
    """Ask for ``lines`` cache lines from ``address`` on; ``write`` is 1 if they will be written."""
    lines_, write_ = lines.literal_value, write.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for i in range(lines_):
            line = builder.inttoptr(builder.add(args[0], I64(64 * i)), pointer)
            builder.call(function, [line, I32(write_), I32(2), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, lines, write), generate


@intrinsic
def stream_vector(typing_context: Any, target: Any, source: Any) -> Any:
    """Copy one vector past the caches; ``target`` is a multiple of `VECTOR_BYTES`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        store = builder.store(load(builder, args[1]), pointer(builder, args[0]))
        store.align = VECTOR_BYTES
        store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy_first(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy the first ``count`` numbers of a vector, of which the whole can be read."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
        inside = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(args[2], I32)))
        masked_store(builder, load(builder, args[1]), args[0], inside, f"v{LANES}f32")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def leave_tile(
    typing_context: Any,
    tile: Any,
    target: Any,
    plane: Any,
    lanes: Any,
    planes: Any,
    a: Any,
    b: Any,
) -> Any:
    """Write those lanes of a tile that are wanted, without gaps, row by row of the tile.

    Row ``i`` begins at ``target + i * plane``; of the rows, ``planes`` are written. ``lanes`` is
    the address of ``b`` uint16 numbers whose bits name the lanes wanted of each vector of a row.
    """
    a_, b_ = a.literal_value, b.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        tile_, target_, plane_, lanes_, planes_ = args[:5]
        vectors = unpack(builder, tile_)
        bits, narrow = ir.VectorType(ir.IntType(1), LANES), ir.IntType(LANES)
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(VECTOR, [VECTOR, bits, VECTOR]),
            f"llvm.experimental.vector.compress.v{LANES}f32",
        )
        count_ones = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(I32, [I32]), "llvm.ctpop.i32"
        )
        order = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
        for i in range(a_):
            with builder.if_then(builder.icmp_signed(">", planes_, I64(i))):
                place = builder.add(target_, builder.mul(plane_, I64(i)))
                for j in range(b_):
                    number = load(builder, builder.add(lanes_, I64(2 * j)), ir.IntType(16))
                    wanted = builder.zext(number, I32)
                    chosen = builder.bitcast(
                        number if LANES == 16 else builder.trunc(number, narrow), bits
                    )
                    packed = builder.call(compress, [vectors[i * b_ + j], chosen, UNDEFINED])
                    count = builder.call(count_ones, [wanted])
                    inside = builder.icmp_signed("<", order, splat(builder, count))
                    masked_store(builder, packed, place, inside, f"v{LANES}f32")
                    place = builder.add(place, builder.zext(builder.shl(count, I32(2)), I64))
        return context.get_dummy_value()

    return types.void(tile, *[types.int64] * 4, a, b), generate
