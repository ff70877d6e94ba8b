"""Memory by address, and 64 elements at a time, in compiled kernels.

Addresses and all other integers here are uint64: Numba makes a float of a signed and an unsigned
64-bit number. Vectors have no type in Numba, so each helper loads what it needs and hands on bits,
one per element, lowest first. LLVM maps 64 lanes to the vectors that the processor has.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsekit.kernels.vector_ir import LANES as VECTOR_LANES
from sparsekit.kernels.vector_ir import splat

LANES = 64
"""Elements of a block: their bits fill one integer."""

_I1 = ir.IntType(1)
_I8 = ir.IntType(8)
_I64 = ir.IntType(64)


def vector_at(builder: Any, address: Any, element: Any, lanes: int) -> Any:
    """Emit the load of a vector that need not be aligned."""
    pointer = builder.inttoptr(address, ir.VectorType(element, lanes).as_pointer())
    return builder.load(pointer, align=1)


def constant(element: Any, value: int, lanes: int) -> Any:
    """Vector of a number that is known now."""
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _make_load(bits: int) -> Any:
    def load(_typing_context: Any, address: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            pointer = builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())
            value = builder.load(pointer, align=1)
            return value if bits == 64 else builder.zext(value, _I64)

        assert address == types.uint64
        return types.uint64(types.uint64), codegen

    return intrinsic(load)


def _make_store(bits: int) -> Any:
    def store(_typing_context: Any, address: Any, value: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
            kind = ir.IntType(bits)
            pointer = builder.inttoptr(arguments[0], kind.as_pointer())
            value = arguments[1] if bits == 64 else builder.trunc(arguments[1], kind)
            builder.store(value, pointer, align=1)

        assert (address, value) == (types.uint64, types.uint64)
        return types.void(types.uint64, types.uint64), codegen

    return intrinsic(store)


load_u8, load_u16, load_u32, load_u64 = (_make_load(bits) for bits in (8, 16, 32, 64))
store_u8, store_u16, store_u32, store_u64 = (_make_store(bits) for bits in (8, 16, 32, 64))


def _count_ones(_typing_context: Any, word: Any) -> Any:
    """Number of bits that are set."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    assert word == types.uint64
    return types.uint64(word), codegen


def _lowest_one(_typing_context: Any, word: Any) -> Any:
    """Position of the lowest bit that is set; 64 if none is."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(_I1, 0))

    assert word == types.uint64
    return types.uint64(word), codegen


def _fetch_add(_typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to a counter that threads share, and return what it was."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    assert (address, amount) == (types.uint64, types.uint64)
    return types.uint64(address, amount), codegen


def _prefetch_block(_typing_context: Any, address: Any) -> Any:
    """Ask for the block of 32-bit elements at an address, which need not be mapped."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        i32, pointer = ir.IntType(32), _I8.as_pointer()
        name = "llvm.prefetch.p0"
        signature = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, signature, name)
        # For reading, into all levels, as data.
        hints = [ir.Constant(i32, n) for n in (0, 3, 1)]
        for line in range(4 * LANES // 64):
            place = builder.add(arguments[0], ir.Constant(_I64, 64 * line))
            builder.call(function, [builder.inttoptr(place, pointer), *hints])

    assert address == types.uint64
    return types.void(address), codegen


def _stack_bytes(_typing_context: Any, size: Any) -> Any:
    """Address of so many bytes of this thread's stack, 64-byte aligned; a global constant."""

    def codegen(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        # Numba's own helper would also clear it, byte by byte: a minute of compilation.
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(_I8, size.literal_value))
        memory.align = 64
        return builder.ptrtoint(memory, _I64)

    return types.uint64(size), codegen


def _bits_of_bools(_typing_context: Any, address: Any) -> Any:
    """Bits of the block of bools at an address: set where a byte is not 0."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values = vector_at(builder, arguments[0], _I8, LANES)
        return builder.bitcast(builder.icmp_unsigned("!=", values, constant(_I8, 0, LANES)), _I64)

    assert address == types.uint64
    return types.uint64(address), codegen


def _bools_of_bits(_typing_context: Any, word: Any, address: Any) -> Any:
    """Write the block of bools that has these bits."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        block = ir.VectorType(_I8, LANES)
        flags = builder.bitcast(arguments[0], ir.VectorType(_I1, LANES))
        pointer = builder.inttoptr(arguments[1], block.as_pointer())
        builder.store(builder.zext(flags, block), pointer, align=1)

    assert (word, address) == (types.uint64, types.uint64)
    return types.void(word, address), codegen


def _bits_of_nonzero(_typing_context: Any, address: Any, wanted: Any, item_bytes: Any) -> Any:
    """Bits of the block of integers at an address: set where one of the wanted bits is."""
    element = ir.IntType(8 * item_bytes.literal_value)

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values = vector_at(builder, arguments[0], element, LANES)
        mask = arguments[1] if element.width == 64 else builder.trunc(arguments[1], element)
        chosen = builder.and_(values, splat(builder, mask, LANES))
        flags = builder.icmp_unsigned("!=", chosen, constant(element, 0, LANES))
        return builder.bitcast(flags, _I64)

    assert (address, wanted) == (types.uint64, types.uint64)
    return types.uint64(address, wanted, item_bytes), codegen


WIDE = VECTOR_LANES == 16
"""Whether the processor packs and spreads 16 elements of 4 bytes with one instruction."""
_I32 = ir.IntType(32)
_SIXTEEN = ir.VectorType(_I32, 16)
_FLAGS = ir.VectorType(_I1, 16)


def _quarters(builder: Any, word: Any) -> Any:
    """The four 16-bit parts of a word, as flags and as counts of bits."""
    for quarter in range(4):
        part = builder.trunc(builder.lshr(word, ir.Constant(_I64, 16 * quarter)), ir.IntType(16))
        yield quarter, builder.bitcast(part, _FLAGS), builder.zext(builder.ctpop(part), _I64)


def _pack_block(_typing_context: Any, source: Any, target: Any, word: Any) -> Any:
    """Write those of a block of 4-byte elements whose bits are set, without gaps."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        source, target, word = arguments
        compress = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_SIXTEEN, [_SIXTEEN, _FLAGS, _SIXTEEN]),
            "llvm.experimental.vector.compress.v16i32",
        )
        store = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_SIXTEEN, _SIXTEEN.as_pointer(), _I32, _FLAGS]),
            "llvm.masked.store.v16i32.p0",
        )
        order = ir.Constant(_SIXTEEN, list(range(16)))
        undefined = ir.Constant(_SIXTEEN, ir.Undefined)
        for quarter, flags, count in _quarters(builder, word):
            place = builder.add(source, ir.Constant(_I64, 64 * quarter))
            values = vector_at(builder, place, _I32, 16)
            packed = builder.call(compress, [values, flags, undefined])
            # Not a whole vector: what follows may be another thread's, or nobody's.
            narrow = builder.trunc(count, _I32)
            inside = builder.icmp_unsigned("<", order, splat(builder, narrow, 16))
            pointer = builder.inttoptr(target, _SIXTEEN.as_pointer())
            builder.call(store, [packed, pointer, ir.Constant(_I32, 1), inside])
            target = builder.add(target, builder.shl(count, ir.Constant(_I64, 2)))

    assert (source, target, word) == (types.uint64,) * 3
    return types.void(source, target, word), codegen


def _spread_block(_typing_context: Any, source: Any, target: Any, word: Any) -> Any:
    """Write a block of 4-byte elements: the next ones where bits are set, 0 elsewhere."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        source, target, word = arguments
        expand = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_SIXTEEN, [_I32.as_pointer(), _FLAGS, _SIXTEEN]),
            "llvm.masked.expandload.v16i32",
        )
        for quarter, flags, count in _quarters(builder, word):
            pointer = builder.inttoptr(source, _I32.as_pointer())
            values = builder.call(expand, [pointer, flags, ir.Constant(_SIXTEEN, [0] * 16)])
            place = builder.add(target, ir.Constant(_I64, 64 * quarter))
            builder.store(values, builder.inttoptr(place, _SIXTEEN.as_pointer()), align=1)
            source = builder.add(source, builder.shl(count, ir.Constant(_I64, 2)))

    assert (source, target, word) == (types.uint64,) * 3
    return types.void(source, target, word), codegen


def _add_where(_tc: Any, address: Any, word: Any, value: Any, anew: Any) -> Any:
    """Add a number to those of a block of 32-bit integers whose bits are set, or to zeros."""
    block = ir.VectorType(_I32, LANES)

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        address, word, value, anew = arguments
        flags = builder.bitcast(word, ir.VectorType(_I1, LANES))
        chosen = splat(builder, builder.trunc(value, _I32), LANES)
        zeros = constant(_I32, 0, LANES)
        added = builder.select(flags, chosen, zeros)
        old = builder.select(anew, zeros, vector_at(builder, address, _I32, LANES))
        pointer = builder.inttoptr(address, block.as_pointer())
        builder.store(builder.or_(old, added), pointer, align=1)

    assert (address, word, value, anew) == (*(types.uint64,) * 3, types.boolean)
    return types.void(address, word, value, anew), codegen


count_ones: Any = intrinsic(_count_ones)
lowest_one: Any = intrinsic(_lowest_one)
fetch_add: Any = intrinsic(_fetch_add)
prefetch_block: Any = intrinsic(_prefetch_block)
stack_bytes: Any = intrinsic(prefer_literal=True)(_stack_bytes)
bits_of_bools: Any = intrinsic(_bits_of_bools)
bools_of_bits: Any = intrinsic(_bools_of_bits)
bits_of_nonzero: Any = intrinsic(prefer_literal=True)(_bits_of_nonzero)
add_where: Any = intrinsic(_add_where)
pack_block: Any = intrinsic(_pack_block)
spread_block: Any = intrinsic(_spread_block)
