"""Vectors of float32 numbers beside as many bytes of a mask."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from sparsekit.kernels.intrinsics import intrinsic
from sparsekit.kernels.vector_ir import (
    I8,
    I32,
    I64,
    LANES,
    VECTOR_BYTES,
    load,
    masked_load,
    pointer,
)


def _kept(builder: Any, address: Any) -> Any:
    """Which of the mask's bytes at an address are not 0."""
    octets = ir.VectorType(I8, LANES)
    keep = builder.load(pointer(builder, address, octets))
    keep.align = 1
    return builder.icmp_unsigned("!=", keep, ir.Constant(octets, [0] * LANES))


@intrinsic
def any_bits_outside(typing_context: Any, values: Any, mask: Any, vectors: Any) -> Any:
    """Tell whether float32 numbers at ``values`` have any bit set where the mask's byte is 0.

    Looks at ``vectors`` * `LANES` numbers and as many bytes at ``mask``; 1 if so, else 0.
    """
    vectors_ = vectors.literal_value

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        integers = ir.VectorType(I32, LANES)
        none = ir.Constant(integers, [0] * LANES)
        found = none
        for i in range(vectors_):
            bits = load(builder, builder.add(args[0], I64(i * VECTOR_BYTES)), integers)
            kept = _kept(builder, builder.add(args[1], I64(i * LANES)))
            found = builder.or_(found, builder.select(kept, none, bits))
        kind = ir.FunctionType(I32, [integers])
        name = f"llvm.vector.reduce.or.v{LANES}i32"
        total = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [found])
        return builder.zext(builder.icmp_unsigned("!=", total, I32(0)), I64)

    return types.int64(types.int64, types.int64, vectors), generate


@intrinsic
def copy_kept(typing_context: Any, target: Any, source: Any, mask: Any) -> Any:
    """Copy a vector, with 0 where the mask's byte is 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        value = masked_load(builder, args[1], _kept(builder, args[2]))
        builder.store(value, pointer(builder, args[0])).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate
