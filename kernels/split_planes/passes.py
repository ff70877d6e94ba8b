"""The compiled passes over the planes of float32 numbers, 64 of them at a time."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from sparsekit.kernels.blocks import (
    LANES,
    constant,
    load_u8,
    load_u16,
    load_u32,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
    vector_at,
)
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.intrinsics import intrinsic
from sparsekit.kernels.vector_ir import splat

JOB = np.dtype(
    [
        ("next", np.int64),
        ("parts", np.int64),
        ("count", np.uint64),
        ("values", np.uint64),  # address of uint32 numbers, the floats' bits
        ("first", np.uint64),  # addresses of the planes: uint8, uint8 and uint16
        ("second", np.uint64),
        ("low", np.uint64),
        ("smallest", np.uint64),
        ("top_bits", np.uint64),  # mantissa bits in the first plane
        ("state", np.uint64),  # address of a uint64: an error, where there may be one
    ],
    align=True,
)

_ZERO, _ONE, _TWO, _FOUR = np.uint64(0), np.uint64(1), np.uint64(2), np.uint64(4)
_SEVEN, _SIXTEEN, _BLOCK = np.uint64(7), np.uint64(16), np.uint64(LANES)
_EXPONENT_AT, _SIGN_AT, _MOST = np.uint64(23), np.uint64(31), np.uint64(255)

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


def _number(value: int) -> Any:
    return constant(_I32, value, LANES)


def _store(builder: Any, values: Any, kind: Any, address: Any) -> None:
    vector = ir.VectorType(kind, LANES)
    narrow = values if kind is _I32 else builder.trunc(values, vector)
    builder.store(narrow, builder.inttoptr(address, vector.as_pointer()), align=1)


def _spread(builder: Any, scalar: Any) -> Any:
    return splat(builder, builder.trunc(scalar, _I32), LANES)


def _below(builder: Any, bits: Any) -> Any:
    """Vector with so many low bits set."""
    return builder.sub(builder.shl(_number(1), bits), _number(1))


@intrinsic
def _split_block(
    _tc: Any, source: Any, first: Any, second: Any, low: Any, smallest: Any, top_bits: Any
) -> Any:
    """Planes of a block of numbers."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        source, first, second, low, smallest, top_bits = arguments
        values = vector_at(builder, source, _I32, LANES)
        top = _spread(builder, top_bits)
        rest = builder.sub(_number(7), top)
        mantissa = builder.lshr(values, _number(16))
        exponent = builder.and_(builder.lshr(values, _number(23)), _number(255))
        distance = builder.shl(builder.sub(exponent, _spread(builder, smallest)), top)
        upper = builder.and_(builder.lshr(mantissa, rest), _below(builder, top))
        _store(builder, builder.or_(distance, upper), _I8, first)
        sign = builder.shl(builder.lshr(values, _number(31)), rest)
        lower = builder.and_(mantissa, _below(builder, rest))
        _store(builder, builder.or_(sign, lower), _I8, second)
        _store(builder, values, _I16, low)

    return types.void(source, first, second, low, smallest, top_bits), codegen


@intrinsic
def _join_block(
    _tc: Any, target: Any, first: Any, second: Any, low: Any, smallest: Any, top_bits: Any
) -> Any:
    """Numbers of a block of planes; not 0 if the planes hold what no number has."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, first, second, low, smallest, top_bits = arguments
        wide = ir.VectorType(_I32, LANES)
        a = builder.zext(vector_at(builder, first, _I8, LANES), wide)
        b = builder.zext(vector_at(builder, second, _I8, LANES), wide)
        c = builder.zext(vector_at(builder, low, _I16, LANES), wide)
        top = _spread(builder, top_bits)
        rest = builder.sub(_number(7), top)
        exponent = builder.add(builder.lshr(a, top), _spread(builder, smallest))
        sign = builder.lshr(b, rest)
        upper = builder.shl(builder.and_(a, _below(builder, top)), rest)
        lower = builder.and_(b, _below(builder, rest))
        mantissa = builder.shl(builder.or_(upper, lower), _number(16))
        found = builder.or_(builder.shl(sign, _number(31)), builder.shl(exponent, _number(23)))
        _store(builder, builder.or_(builder.or_(found, mantissa), c), _I32, target)
        wrong = builder.or_(
            builder.icmp_unsigned(">", exponent, _number(255)),
            builder.icmp_unsigned(">", sign, _number(1)),
        )
        return builder.bitcast(wrong, _I64)

    result = types.uint64(target, first, second, low, smallest, top_bits)
    return result, codegen


@kernel(JOB)
def split(job):  # pragma: no cover - compiled
    """Planes of numbers."""
    count, values, first, second, low = job.count, job.values, job.first, job.second, job.low
    smallest, top = job.smallest, job.top_bits
    rest = _SEVEN - top
    whole = count // _BLOCK * _BLOCK
    for i in range(_ZERO, whole, _BLOCK):
        _split_block(values + i * _FOUR, first + i, second + i, low + i * _TWO, smallest, top)
    for i in range(whole, count):
        value = load_u32(values + i * _FOUR)
        mantissa = value >> _SIXTEEN
        distance = (value >> _EXPONENT_AT & _MOST) - smallest
        store_u8(first + i, distance << top | mantissa >> rest & (_ONE << top) - _ONE)
        store_u8(second + i, value >> _SIGN_AT << rest | mantissa & (_ONE << rest) - _ONE)
        store_u16(low + i * _TWO, value)


@kernel(JOB)
def join(job):  # pragma: no cover - compiled
    """Numbers of planes; the state says whether they hold what no number has."""
    count, values, first, second, low = job.count, job.values, job.first, job.second, job.low
    smallest, top = job.smallest, job.top_bits
    rest = _SEVEN - top
    wrong = _ZERO
    whole = count // _BLOCK * _BLOCK
    for i in range(_ZERO, whole, _BLOCK):
        wrong |= _join_block(
            values + i * _FOUR, first + i, second + i, low + i * _TWO, smallest, top
        )
    for i in range(whole, count):
        a, b = load_u8(first + i), load_u8(second + i)
        exponent, sign = (a >> top) + smallest, b >> rest
        mantissa = (a & (_ONE << top) - _ONE) << rest | b & (_ONE << rest) - _ONE
        found = sign << _SIGN_AT | exponent << _EXPONENT_AT | mantissa << _SIXTEEN
        store_u32(values + i * _FOUR, found | load_u16(low + i * _TWO))
        if exponent > _MOST or sign > _ONE:
            wrong |= _ONE
    store_u64(job.state, wrong)
