"""The compiled passes over masks as bits. A part is up to `PART` entries."""

import numpy as np

from sparsekit.kernels.blocks import (
    LANES,
    WIDE,
    bits_of_bools,
    bits_of_nonzero,
    bools_of_bits,
    count_ones,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    lowest_one,
    pack_block,
    spread_block,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
)
from sparsekit.kernels.compiled import Kernel, kernel
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.parallel import take

PART = 1 << 15
"""Entries of a part; a multiple of 64, so that no two parts share a word."""

JOB = np.dtype(
    [
        ("next", np.int64),
        ("parts", np.int64),
        ("n", np.uint64),
        ("bits", np.uint64),  # address of the packed bits
        ("bools", np.uint64),  # address of the mask as bools
        ("whole", np.uint64),  # address of n values
        ("kept", np.uint64),  # address of the values whose bit is set
        ("wanted", np.uint64),  # bits of an element that make it count
        ("counts", np.uint64),  # per part, uint64: number of bits set, or of those before it
    ],
    align=True,
)

_LOADS = {1: load_u8, 2: load_u16, 4: load_u32, 8: load_u64}
_STORES = {1: store_u8, 2: store_u16, 4: store_u32, 8: store_u64}

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_EIGHT = np.uint64(8)
_BLOCK = np.uint64(LANES)
_ALL = np.uint64(2**64 - 1)
_PART_BLOCKS = np.uint64(PART // LANES)


@inlined()
def _word(bits, n, block):  # pragma: no cover - compiled
    """The 64 bits of a block; those of entries after the last are 0."""
    if (block + _ONE) * _BLOCK <= n:
        return load_u64(bits + block * _EIGHT)
    rest = n - block * _BLOCK
    word = _ZERO
    for byte in range((rest + _EIGHT - _ONE) // _EIGHT):
        word |= load_u8(bits + block * _EIGHT + byte) << byte * _EIGHT
    return word & ((_ONE << rest) - _ONE)


@inlined()
def _range(part, n):  # pragma: no cover - compiled
    """First block of a part, and the first after it."""
    first = np.uint64(part) * _PART_BLOCKS
    return first, min(first + _PART_BLOCKS, (n + _BLOCK - _ONE) // _BLOCK)


@kernel(JOB)
def pack(job):  # pragma: no cover - compiled
    """Bits of bools."""
    parts, n, bits, bools = job.parts, job.n, job.bits, job.bools
    part = take(job)
    while part < parts:
        first, last = _range(part, n)
        for block in range(first, min(last, n // _BLOCK)):
            store_u64(bits + block * _EIGHT, bits_of_bools(bools + block * _BLOCK))
        if last * _BLOCK > n:
            begin = (last - _ONE) * _BLOCK
            for byte in range(begin // _EIGHT, (n + _EIGHT - _ONE) // _EIGHT):
                value = _ZERO
                for i in range(byte * _EIGHT, min(byte * _EIGHT + _EIGHT, n)):
                    value |= np.uint64(load_u8(bools + i) != _ZERO) << (i % _EIGHT)
                store_u8(bits + byte, value)
        part = take(job)


@kernel(JOB)
def unpack(job):  # pragma: no cover - compiled
    """Bools of bits."""
    parts, n, bits, bools = job.parts, job.n, job.bits, job.bools
    part = take(job)
    while part < parts:
        first, last = _range(part, n)
        for block in range(first, min(last, n // _BLOCK)):
            bools_of_bits(load_u64(bits + block * _EIGHT), bools + block * _BLOCK)
        if last * _BLOCK > n:
            word = _word(bits, n, last - _ONE)
            for i in range((last - _ONE) * _BLOCK, n):
                store_u8(bools + i, word & _ONE)
                word >>= _ONE
        part = take(job)


@kernel(JOB)
def count(job):  # pragma: no cover - compiled
    """Number of bits that are set, by part."""
    parts, n, bits, counts = job.parts, job.n, job.bits, job.counts
    part = take(job)
    while part < parts:
        first, last = _range(part, n)
        ones = _ZERO
        for block in range(first, last):
            ones += count_ones(_word(bits, n, block))
        store_u64(counts + np.uint64(part) * _EIGHT, ones)
        part = take(job)


def _make_nonzero(item_bytes: int) -> Kernel:
    load = _LOADS[item_bytes]
    size = np.uint64(item_bytes)

    @kernel(JOB)
    def nonzero(job):  # pragma: no cover - compiled
        parts, n, bits, whole, wanted = job.parts, job.n, job.bits, job.whole, job.wanted
        part = take(job)
        while part < parts:
            first, last = _range(part, n)
            for block in range(first, min(last, n // _BLOCK)):
                word = bits_of_nonzero(whole + block * _BLOCK * size, wanted, item_bytes)
                store_u64(bits + block * _EIGHT, word)
            if last * _BLOCK > n:
                begin = (last - _ONE) * _BLOCK
                for byte in range(begin // _EIGHT, (n + _EIGHT - _ONE) // _EIGHT):
                    value = _ZERO
                    for i in range(byte * _EIGHT, min(byte * _EIGHT + _EIGHT, n)):
                        chosen = load(whole + i * size) & wanted
                        value |= np.uint64(chosen != _ZERO) << (i % _EIGHT)
                    store_u8(bits + byte, value)
            part = take(job)

    return nonzero


def _make_compact(item_bytes: int) -> Kernel:
    wide = WIDE and item_bytes == 4
    load, store = _LOADS[item_bytes], _STORES[item_bytes]
    size = np.uint64(item_bytes)

    @kernel(JOB)
    def compact(job):  # pragma: no cover - compiled
        parts, n, bits, counts = job.parts, job.n, job.bits, job.counts
        whole, kept = job.whole, job.kept
        part = take(job)
        while part < parts:
            first, last = _range(part, n)
            target = kept + load_u64(counts + np.uint64(part) * _EIGHT) * size
            for block in range(first, last):
                word = _word(bits, n, block)
                source = whole + block * _BLOCK * size
                if word == _ALL:
                    for i in range(_BLOCK):
                        store(target + i * size, load(source + i * size))
                    target += _BLOCK * size
                elif wide and (block + _ONE) * _BLOCK <= n:
                    pack_block(source, target, word)
                    target += count_ones(word) * size
                else:
                    for _ in range(count_ones(word)):
                        store(target, load(source + lowest_one(word) * size))
                        word &= word - _ONE
                        target += size
            part = take(job)

    return compact


def _make_expand(item_bytes: int) -> Kernel:
    wide = WIDE and item_bytes == 4
    load, store = _LOADS[item_bytes], _STORES[item_bytes]
    size = np.uint64(item_bytes)

    @kernel(JOB)
    def expand(job):  # pragma: no cover - compiled
        parts, n, bits, counts = job.parts, job.n, job.bits, job.counts
        whole, kept = job.whole, job.kept
        part = take(job)
        while part < parts:
            first, last = _range(part, n)
            source = kept + load_u64(counts + np.uint64(part) * _EIGHT) * size
            for block in range(first, last):
                word = _word(bits, n, block)
                target = whole + block * _BLOCK * size
                if word == _ALL:
                    for i in range(_BLOCK):
                        store(target + i * size, load(source + i * size))
                    source += _BLOCK * size
                elif wide and (block + _ONE) * _BLOCK <= n:
                    spread_block(source, target, word)
                    source += count_ones(word) * size
                else:
                    if (block + _ONE) * _BLOCK <= n:
                        # Of known length, so that it becomes a few vector stores.
                        for i in range(_BLOCK):
                            store(target + i * size, _ZERO)
                    else:
                        for i in range(n - block * _BLOCK):
                            store(target + i * size, _ZERO)
                    for _ in range(count_ones(word)):
                        store(target + lowest_one(word) * size, load(source))
                        word &= word - _ONE
                        source += size
            part = take(job)

    return expand


NONZERO = {size: _make_nonzero(size) for size in (1, 2, 4, 8)}
"""By bytes of an element: bits of the elements of which a wanted bit is set."""

COMPACT = {size: _make_compact(size) for size in (1, 2, 4, 8)}
"""By bytes of an element: collect the values whose bit is set."""

EXPAND = {size: _make_expand(size) for size in (1, 2, 4, 8)}
"""By bytes of an element: put values at the bits that are set, 0 elsewhere."""
