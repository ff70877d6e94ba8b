"""Reading and writing memory at an address inside Numba kernels.

Addresses are int64 numbers of bytes, as job records hold them.
"""

from typing import Any

from llvmlite import ir
from numba.core import types

from sparsekit.kernels.intrinsics import intrinsic

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load_float(typing_context: Any, address: Any) -> Any:
    """Return the float32 number at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.load(_pointer(builder, args[0], _F32))

    return types.float32(types.int64), generate


@intrinsic
def store_float(typing_context: Any, address: Any, value: Any) -> Any:
    """Write ``value`` as float32 to ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        builder.store(args[1], _pointer(builder, args[0], _F32))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def load_int(typing_context: Any, address: Any) -> Any:
    """Return the int32 number at ``address`` as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.sext(builder.load(_pointer(builder, args[0], _I32)), _I64)

    return types.int64(types.int64), generate


@intrinsic
def store_int(typing_context: Any, address: Any, value: Any) -> Any:
    """Write ``value`` as int32 to ``address``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        builder.store(builder.trunc(args[1], _I32), _pointer(builder, args[0], _I32))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def load_byte(typing_context: Any, address: Any) -> Any:
    """Return the byte at ``address`` as int64, 0 to 255."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return builder.zext(builder.load(_pointer(builder, args[0], _I8)), _I64)

    return types.int64(types.int64), generate


@intrinsic
def copy_bytes(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` bytes between places that do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, pointer, _I64, ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memcpy", [pointer, pointer, _I64], kind)
        builder.call(
            function,
            [
                _pointer(builder, args[0], _I8),
                _pointer(builder, args[1], _I8),
                args[2],
                ir.IntType(1)(0),
            ],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def clear_bytes(typing_context: Any, target: Any, count: Any) -> Any:
    """Set ``count`` bytes to 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del signature
        pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I8, _I64, ir.IntType(1)])
        function = builder.module.declare_intrinsic("llvm.memset", [pointer, _I64], kind)
        builder.call(function, [_pointer(builder, args[0], _I8), _I8(0), args[1], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def floats(typing_context: Any, address: Any) -> Any:
    """Return ``address`` as a pointer to float32, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _pointer(builder, args[0], _F32)

    return types.CPointer(types.float32)(types.int64), generate


@intrinsic
def octets(typing_context: Any, address: Any) -> Any:
    """Return ``address`` as a pointer to uint8, for `numba.carray`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        del context, signature
        return _pointer(builder, args[0], _I8)

    return types.CPointer(types.uint8)(types.int64), generate
