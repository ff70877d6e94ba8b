"""Reading and writing memory at an address inside Numba kernels.

Addresses are int64 numbers of bytes, as job records hold them.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from sparsekit.kernels.intrinsics import intrinsic

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(kind: Any, widened: Any, number: Any) -> Callable[..., Any]:
    """Intrinsic that reads ``kind`` and, if need be, widens it with one of LLVM's instructions."""

    def load(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            value = builder.load(_pointer(builder, args[0], kind))
            return getattr(builder, widened)(value, _I64) if widened else value

        return number(types.int64), generate

    return intrinsic(load)


def _store(kind: Any, number: Any) -> Callable[..., Any]:
    """Intrinsic that writes ``kind``, cutting off the bits that it lacks."""

    def store(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del signature
            narrow = args[1] if args[1].type == kind else builder.trunc(args[1], kind)
            builder.store(narrow, _pointer(builder, args[0], kind))
            return context.get_dummy_value()

        return types.void(types.int64, number), generate

    return intrinsic(store)


def _as_pointer(kind: Any, number: Any) -> Callable[..., Any]:
    """Intrinsic that makes a pointer of an address, for `numba.carray`."""

    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            del context, signature
            return _pointer(builder, args[0], kind)

        return types.CPointer(number)(types.int64), generate

    return intrinsic(pointer)


load_float = _load(_F32, "", types.float32)
"""The float32 number at an address."""
load_int = _load(_I32, "sext", types.int64)
"""The int32 number at an address, as int64."""
load_byte = _load(_I8, "zext", types.int64)
"""The byte at an address as int64, 0 to 255."""
store_float = _store(_F32, types.float32)
"""Write a float32 number to an address."""
store_int = _store(_I32, types.int64)
"""Write a number as int32 to an address."""
floats = _as_pointer(_F32, types.float32)
octets = _as_pointer(_I8, types.uint8)


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
