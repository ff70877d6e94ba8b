"""Building blocks of vector code in LLVM's language, for Numba intrinsics.

The vector width is that of the machine (512, 256 or 128 bits), as is the number of registers.
Addresses are int64 numbers of bytes; nothing but the alignment of one number is asked for.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils


def _lanes_and_registers() -> tuple[int, int]:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx"):
        return 8, 16
    # 128 bits: SSE2 has 16 registers, NEON 32; the smaller number fits both.
    return 4, 16


LANES, REGISTERS = _lanes_and_registers()
"""Float32 numbers in a vector, and vectors that registers can hold."""
VECTOR_BYTES = 4 * LANES

F32 = ir.FloatType()
VECTOR = ir.VectorType(F32, LANES)
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
UNDEFINED = ir.Constant(VECTOR, ir.Undefined)


def pointer(builder: Any, address: Any, kind: Any = VECTOR) -> Any:
    """Address as a pointer to ``kind``."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Any, address: Any, kind: Any = VECTOR) -> Any:
    """Value of type ``kind`` at an address."""
    value = builder.load(pointer(builder, address, kind))
    value.align = 4
    return value


def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` rounded once."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    name = f"llvm.fma.v{LANES}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [x, y, z])


def splat(builder: Any, scalar: Any, lanes: int = LANES) -> Any:
    """Vector with a number of any type in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def shuffle(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    """Lanes of x and y by number, those of y counted on from x's."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def masked_store(builder: Any, value: Any, address: Any, inside: Any, kind: str) -> None:
    """Write the lanes of ``value`` that ``inside`` (bits) names; ``kind`` is LLVM's, as v16f32."""
    place = pointer(builder, address, value.type)
    signature = ir.FunctionType(ir.VoidType(), [value.type, place.type, I32, inside.type])
    function = cgutils.get_or_insert_function(
        builder.module, signature, f"llvm.masked.store.{kind}.p0"
    )
    builder.call(function, [value, place, I32(1), inside])


def masked_load(builder: Any, address: Any, inside: Any) -> Any:
    """Read the lanes that ``inside`` (bits) names, as float32; the others are 0 and not touched."""
    place = pointer(builder, address)
    signature = ir.FunctionType(VECTOR, [place.type, I32, inside.type, VECTOR])
    function = cgutils.get_or_insert_function(
        builder.module, signature, f"llvm.masked.load.v{LANES}f32.p0"
    )
    zero = ir.Constant(VECTOR, [0.0] * LANES)
    return builder.call(function, [place, I32(4), inside, zero])


def addresses(builder: Any, first: Any, row: Any, a: int, b: int) -> list[Any]:
    """Addresses of the vectors of ``a`` rows of ``b`` each, ``row`` bytes apart."""
    found = []
    start = first
    for i in range(a):
        start = builder.add(start, row) if i else start
        found += [builder.add(start, I64(j * VECTOR_BYTES)) for j in range(b)]
    return found


def pack(builder: Any, vectors: list[Any]) -> Any:
    """Vectors as a tile, which is an array to LLVM."""
    tile = ir.Constant(ir.ArrayType(VECTOR, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        tile = builder.insert_value(tile, vector, i)
    return tile


def unpack(builder: Any, tile: Any) -> list[Any]:
    """Vectors of a tile."""
    return [builder.extract_value(tile, i) for i in range(tile.type.count)]
