"""The compiled passes of Rice codes: gaps of a mask as planes of bits, and back.

Each is one walk from the first position to the last, on one thread.
"""

import numpy as np

from sparsekit.kernels.blocks import (
    LANES,
    add_where,
    bits_of_nonzero,
    load_u8,
    load_u32,
    load_u64,
    lowest_one,
    store_u32,
    store_u64,
)
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.intrinsics import inlined

JOB = np.dtype(
    [
        ("next", np.int64),
        ("parts", np.int64),
        ("n", np.uint64),  # entries of the mask
        ("bits", np.uint64),  # address of the mask's bits, whole words of them
        ("flip", np.uint64),  # 1 if the entries whose bit is not set are coded
        ("count", np.uint64),  # coded entries
        ("r", np.uint64),
        ("gaps", np.uint64),  # address of uint32 numbers, a multiple of LANES of them
        ("section", np.uint64),  # address of the section
        ("size", np.uint64),  # its bytes
        ("start", np.uint64),  # entries to unpack: multiples of LANES
        ("stop", np.uint64),
        ("state", np.uint64),  # address of the numbers below
    ],
    align=True,
)

INDEX, UNARY, NEXT, STATUS = range(4)
"""In the state: gaps done, bit after the last quotient, entry after the last one, an error."""
ENDLESS, BEYOND = 1, 2
"""Errors: quotients that do not end in the section, and entries beyond the last."""

_ZERO, _ONE, _THREE, _FOUR = np.uint64(0), np.uint64(1), np.uint64(3), np.uint64(4)
_SIX, _SEVEN, _EIGHT = np.uint64(6), np.uint64(7), np.uint64(8)
_BLOCK, _LAST = np.uint64(LANES), np.uint64(LANES - 1)
_ALL = np.uint64(2**64 - 1)


@inlined()
def _or_bits(section, at, word):  # pragma: no cover - compiled
    """Set bits of 64 from bit `at` on."""
    place, shift = section + (at >> _THREE), at & _SEVEN
    store_u64(place, load_u64(place) | word << shift)
    if shift:
        rest = word >> (_BLOCK - shift)
        if rest:
            store_u64(place + _EIGHT, load_u64(place + _EIGHT) | rest)


@kernel(JOB)
def pack(job):  # pragma: no cover - compiled
    """Planes of a mask into a section of zeros, with 16 bytes of room behind it."""
    n, bits, count, r, gaps = job.n, job.bits, job.count, job.r, job.gaps
    section, state = job.section, job.state
    flip = _ALL if job.flip else _ZERO
    target, following = gaps, _ZERO
    for block in range((n + _LAST) // _BLOCK):
        first = block * _BLOCK
        word = load_u64(bits + block * _EIGHT) ^ flip
        if n - first < _BLOCK:
            word &= (_ONE << (n - first)) - _ONE
        while word:
            position = first + lowest_one(word)
            store_u32(target, position - following)
            following = position + _ONE
            target += _FOUR
            word &= word - _ONE
    for j in range(r):
        plane = j * count
        for i in range(_ZERO, count, _BLOCK):
            word = bits_of_nonzero(gaps + i * _FOUR, _ONE << j, 4)
            if count - i < _BLOCK:
                word &= (_ONE << (count - i)) - _ONE
            _or_bits(section, plane + i, word)
    at = r * count
    held, window = at >> _SIX, _ZERO
    for i in range(count):
        at += load_u32(gaps + i * _FOUR) >> r
        if at >> _SIX != held:
            place = section + held * _EIGHT
            store_u64(place, load_u64(place) | window)
            held, window = at >> _SIX, _ZERO
        window |= _ONE << (at & _LAST)
        at += _ONE
    place = section + held * _EIGHT
    store_u64(place, load_u64(place) | window)
    store_u64(state + np.uint64(UNARY) * _EIGHT, at)


@inlined()
def _word_at(section, size, byte):  # pragma: no cover - compiled
    """64 bits from a byte on; those behind the section are 0."""
    if byte + _EIGHT <= size:
        return load_u64(section + byte)
    word = _ZERO
    for i in range(byte, size):
        word |= load_u8(section + i) << (i - byte) * _EIGHT
    return word


@inlined()
def _bits_at(section, size, at):  # pragma: no cover - compiled
    """64 bits from a bit on."""
    byte, shift = at >> _THREE, at & _SEVEN
    word = _word_at(section, size, byte) >> shift
    if shift and byte + _EIGHT < size:
        word |= load_u8(section + byte + _EIGHT) << (_BLOCK - shift)
    return word


@kernel(JOB)
def unpack(job):  # pragma: no cover - compiled
    """Set the bits of coded entries from `start` to `stop` in zeros; go on from the state."""
    n, bits, count, r, lows = job.n, job.bits, job.count, job.r, job.gaps
    section, size, start, stop, state = job.section, job.size, job.start, job.stop, job.state
    index = load_u64(state + np.uint64(INDEX) * _EIGHT)
    unary = load_u64(state + np.uint64(UNARY) * _EIGHT)
    following = load_u64(state + np.uint64(NEXT) * _EIGHT)
    status = _ZERO
    base = unary & ~_LAST
    window = _word_at(section, size, base >> _THREE) & (_ALL << (unary & _LAST))
    filled = index & ~_LAST
    fresh = (index & _LAST) == _ZERO
    while index < count:
        if fresh:
            filled = index
            for j in range(r):
                word = _bits_at(section, size, j * count + index)
                add_where(lows, word, _ONE << j, j == _ZERO)
            fresh = False
        while window == _ZERO:
            base += _BLOCK
            if base >= size * _EIGHT:
                status = np.uint64(ENDLESS)
                break
            window = _word_at(section, size, base >> _THREE)
        if status:
            break
        end = base + lowest_one(window)
        low = load_u32(lows + (index - filled) * _FOUR) if r else _ZERO
        # A quotient is at most the bits of a section; its product fits.
        position = following + ((end - unary) << r) + low
        if position >= n:
            status = np.uint64(BEYOND)
            break
        if position >= stop:
            break
        place = bits + ((position - start) >> _SIX) * _EIGHT
        store_u64(place, load_u64(place) | _ONE << (position & _LAST))
        window &= window - _ONE
        unary = end + _ONE
        following = position + _ONE
        index += _ONE
        fresh = (index & _LAST) == _ZERO
    store_u64(state + np.uint64(INDEX) * _EIGHT, index)
    store_u64(state + np.uint64(UNARY) * _EIGHT, unary)
    store_u64(state + np.uint64(NEXT) * _EIGHT, following)
    store_u64(state + np.uint64(STATUS) * _EIGHT, status)
