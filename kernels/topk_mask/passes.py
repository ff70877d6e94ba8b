"""The compiled passes of the selection over parts of tensors: README.md has the algorithm.

A part is up to `PART` entries of one tensor. Keys are the bits of ``|w|``.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsekit.kernels.blocks import (
    LANES,
    bits_of_bools,
    bools_of_bits,
    constant,
    count_ones,
    fetch_add,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    lowest_one,
    prefetch_block,
    stack_bytes,
    store_u8,
    store_u16,
    store_u32,
    store_u64,
    vector_at,
)
from sparsekit.kernels.compiled import kernel
from sparsekit.kernels.intrinsics import inlined
from sparsekit.kernels.parallel import take
from sparsekit.kernels.vector_ir import splat

PART = 1 << 14
"""Entries of a part: its values and bits stay in the level-2 cache between two looks."""

SAMPLED = 16
"""Neighbouring entries that are sampled together: one cache line."""

INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF

# Positions of a part's candidates, and what the unconditional writes of `_positions` add.
_POSITION_BYTES = 2 * (PART + LANES)

_FIELDS = [
    ("next", np.int64),
    ("parts", np.int64),
    ("values", np.uint64),  # addresses, one uint64 per part, as all tables here
    ("within", np.uint64),  # addresses of bools, 0 where everything is allowed
    ("lengths", np.uint64),
    ("words", np.uint64),  # per part the address of its bits
]

BRACKET_JOB = np.dtype(
    [
        *_FIELDS,
        ("lowest", np.uint64),  # the bracket, both ends included
        ("highest", np.uint64),
        ("above", np.uint64),  # per part: keys above the bracket, inside it, NaN
        ("inside", np.uint64),
        ("nan", np.uint64),
        ("starts", np.uint64),  # per part: where its candidates begin
        ("cursor", np.uint64),  # address of the number of candidates so far
        ("capacity", np.uint64),
        ("keys", np.uint64),  # candidates: keys as uint32, positions in the part as uint16
        ("positions", np.uint64),
    ],
    align=True,
)

FINISH_JOB = np.dtype(
    [
        *_FIELDS,
        ("masks", np.uint64),
        ("threshold", np.uint64),
        ("quotas", np.uint64),  # per part: how many keys equal to the threshold are kept
        ("stored", np.uint64),  # 1 if the candidates are at hand, 0 if all equal the threshold
        ("inside", np.uint64),
        ("starts", np.uint64),
        ("keys", np.uint64),
        ("positions", np.uint64),
    ],
    align=True,
)

SAMPLE_JOB = np.dtype(
    [
        *_FIELDS,
        ("ends", np.uint64),  # per part: clusters up to and including it
        ("sample", np.uint64),  # int32 keys, -1 where not allowed
    ],
    align=True,
)


def _classify(_typing_context: Any, values: Any, lowest: Any, highest: Any) -> Any:
    """Bits of the keys in a block that are inside the bracket, above it, and NaN."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        magnitude = constant(i32, _MAGNITUDE, LANES)
        keys = builder.and_(vector_at(builder, arguments[0], i32, LANES), magnitude)
        low, high = (splat(builder, builder.trunc(end, i32), LANES) for end in arguments[1:])
        above = builder.icmp_unsigned(">", keys, high)
        from_low = builder.icmp_unsigned(">=", keys, low)
        nan = builder.icmp_unsigned(">", keys, constant(i32, INFINITY, LANES))
        inside = builder.and_(from_low, builder.not_(above))
        bits = [builder.bitcast(flags, i64) for flags in (inside, above, nan)]
        return context.make_tuple(builder, signature.return_type, bits)

    assert (values, lowest, highest) == (types.uint64,) * 3
    return types.UniTuple(types.uint64, 3)(values, lowest, highest), codegen


_classify_block: Any = intrinsic(_classify)

_ONE = np.uint64(1)
_TWO = np.uint64(2)
_FOUR = np.uint64(4)
_EIGHT = np.uint64(8)
_BLOCK = np.uint64(LANES)
_ALL = np.uint64(2**64 - 1)
_MAGNITUDE_U64 = np.uint64(_MAGNITUDE)
_EXCLUDED = np.uint64(2**32 - 1)
_SAMPLED = np.uint64(SAMPLED)
_WORD_BYTES = PART // LANES * 8
_SPARE_BYTES = 4 * LANES
# Of the golden ratio: spreads consecutive numbers over all 64-bit numbers.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
# Memory is asked for one page ahead: the processor's own look-ahead stops at the page's end.
_AHEAD = np.uint64(4096)
_HALF = np.uint64(32)


@inlined()
def _whole_block(values, within, first, lowest, highest):  # pragma: no cover - compiled
    """Bits of the block of 64 entries from entry `first` of a part."""
    inside, above, nan = _classify_block(values + first * _FOUR, lowest, highest)
    if within != 0:
        allowed = bits_of_bools(within + first)
        inside &= allowed
        above &= allowed
    return inside, above, nan


@inlined()
def _last_block(values, within, first, rest, lowest, highest, spare):  # pragma: no cover - compiled
    """Bits of the fewer than 64 entries from entry `first` on, by way of 256 spare bytes."""
    for i in range(_BLOCK // _TWO):
        store_u64(spare + i * _EIGHT, np.uint64(0))
    for i in range(rest):
        store_u32(spare + i * _FOUR, load_u32(values + (first + i) * _FOUR))
    inside, above, nan = _classify_block(spare, lowest, highest)
    allowed = (_ONE << rest) - _ONE
    if within != 0:
        for i in range(rest):
            if load_u8(within + first + i) == 0:
                allowed &= ~(_ONE << i)
    return inside & allowed, above & allowed, nan


@inlined()
def _positions(words, blocks, spots):  # pragma: no cover - compiled
    """Write the positions of the bits that are set as uint16."""
    for i in range(blocks):
        word = load_u64(words + i * _EIGHT)
        end = spots + _TWO * count_ones(word)
        # Most words have few bits. Writing two positions, needed or not, saves the branches that
        # no processor could predict; what is written in vain is overwritten.
        for _ in range(2):
            store_u16(spots, i * _BLOCK + lowest_one(word))
            spots += _TWO
            word &= word - _ONE
        while word != 0:
            store_u16(spots, i * _BLOCK + lowest_one(word))
            spots += _TWO
            word &= word - _ONE
        spots = end


@kernel(BRACKET_JOB)
def bracket(job):  # pragma: no cover - compiled
    """Compare all keys with the bracket, and collect those inside it as candidates."""
    parts, values_of, within_of, lengths = job.parts, job.values, job.within, job.lengths
    words_of, lowest, highest = job.words, job.lowest, job.highest
    above_of, inside_of, nan_of, starts = job.above, job.inside, job.nan, job.starts
    cursor, capacity, keys_at, positions_at = job.cursor, job.capacity, job.keys, job.positions
    inside_words = stack_bytes(_WORD_BYTES)
    spots = stack_bytes(_POSITION_BYTES)
    spare = stack_bytes(_SPARE_BYTES)
    part = take(job)
    while part < parts:
        entry = np.uint64(part) * _EIGHT
        values = load_u64(values_of + entry)
        within = load_u64(within_of + entry)
        length = load_u64(lengths + entry)
        words = load_u64(words_of + entry)
        blocks = length // _BLOCK
        rest = length % _BLOCK
        n_inside = np.uint64(0)
        n_above = np.uint64(0)
        any_nan = np.uint64(0)
        for i in range(blocks):
            prefetch_block(values + i * _BLOCK * _FOUR + _AHEAD)
            inside, above, nan = _whole_block(values, within, i * _BLOCK, lowest, highest)
            store_u64(inside_words + i * _EIGHT, inside)
            store_u64(words + i * _EIGHT, above)
            n_inside += count_ones(inside)
            n_above += count_ones(above)
            any_nan |= nan
        if rest != 0:
            inside, above, nan = _last_block(
                values, within, blocks * _BLOCK, rest, lowest, highest, spare
            )
            store_u64(inside_words + blocks * _EIGHT, inside)
            store_u64(words + blocks * _EIGHT, above)
            n_inside += count_ones(inside)
            n_above += count_ones(above)
            any_nan |= nan
            blocks += _ONE
        start = fetch_add(cursor, n_inside)
        store_u64(above_of + entry, n_above)
        store_u64(inside_of + entry, n_inside)
        store_u64(nan_of + entry, any_nan)
        store_u64(starts + entry, start)
        if start + n_inside <= capacity and n_inside != 0:
            _positions(inside_words, blocks, spots)
            keys = keys_at + start * _FOUR
            positions = positions_at + start * _TWO
            for i in range(n_inside):
                position = load_u16(spots + i * _TWO)
                key = load_u32(values + position * _FOUR) & _MAGNITUDE_U64
                store_u32(keys + i * _FOUR, key)
                store_u16(positions + i * _TWO, position)
        part = take(job)


@inlined()
def _lowest_bits(word, count):  # pragma: no cover - compiled
    """Keep the `count` lowest of the bits that are set."""
    kept = np.uint64(0)
    for _ in range(count):
        bit = word & (~word + _ONE)
        kept |= bit
        word &= ~bit
    return kept


@kernel(FINISH_JOB)
def finish(job):  # pragma: no cover - compiled
    """Decide on the candidates, and write the masks."""
    parts, values_of, within_of, lengths = job.parts, job.values, job.within, job.lengths
    words_of, masks, threshold, quotas = job.words, job.masks, job.threshold, job.quotas
    stored, inside_of, starts = job.stored, job.inside, job.starts
    keys_at, positions_at = job.keys, job.positions
    spare = stack_bytes(_SPARE_BYTES)
    part = take(job)
    while part < parts:
        entry = np.uint64(part) * _EIGHT
        length = load_u64(lengths + entry)
        words = load_u64(words_of + entry)
        mask = load_u64(masks + entry)
        quota = load_u64(quotas + entry)
        blocks = length // _BLOCK
        rest = length % _BLOCK
        if stored != 0:
            start = load_u64(starts + entry)
            keys = keys_at + start * _FOUR
            positions = positions_at + start * _TWO
            for i in range(load_u64(inside_of + entry)):
                key = load_u32(keys + i * _FOUR)
                position = load_u16(positions + i * _TWO)
                tie = np.uint64(key == threshold) & np.uint64(quota != 0)
                quota -= tie
                keep = np.uint64(key > threshold) | tie
                word = words + position // _BLOCK * _EIGHT
                store_u64(word, load_u64(word) | keep << position % _BLOCK)
        elif quota != 0:
            values = load_u64(values_of + entry)
            within = load_u64(within_of + entry)
            for i in range(blocks + np.uint64(rest != 0)):
                if i < blocks:
                    ties, _, _ = _whole_block(values, within, i * _BLOCK, threshold, threshold)
                else:
                    ties, _, _ = _last_block(
                        values, within, i * _BLOCK, rest, threshold, threshold, spare
                    )
                if count_ones(ties) > quota:
                    ties = _lowest_bits(ties, quota)
                quota -= count_ones(ties)
                word = words + i * _EIGHT
                store_u64(word, load_u64(word) | ties)
        # From the end, because the bits stand in the first eighth of the mask that they become.
        word = load_u64(words + blocks * _EIGHT) if rest != 0 else np.uint64(0)
        for i in range(rest):
            store_u8(mask + blocks * _BLOCK + i, word >> i & _ONE)
        for i in range(blocks):
            block = blocks - _ONE - i
            bools_of_bits(load_u64(words + block * _EIGHT), mask + block * _BLOCK)
        part = take(job)


@kernel(SAMPLE_JOB)
def sample(job):  # pragma: no cover - compiled
    """Keys of clusters of 16 neighbours, one at a spread place in each stretch of a part."""
    parts, values_of, within_of, lengths = job.parts, job.values, job.within, job.lengths
    ends, sample_at = job.ends, job.sample
    part = take(job)
    while part < parts:
        entry = np.uint64(part) * _EIGHT
        values = load_u64(values_of + entry)
        within = load_u64(within_of + entry)
        first = load_u64(ends + entry - _EIGHT) if part > 0 else np.uint64(0)
        clusters = load_u64(ends + entry) - first
        # Parts without 16 entries have no clusters.
        places = load_u64(lengths + entry) - _SAMPLED + _ONE
        for c in range(clusters):
            low, high = places * c // clusters, places * (c + _ONE) // clusters
            spread = (first + c + _ONE) * _SPREAD >> _HALF
            place = low + (spread * (high - low) >> _HALF)
            for i in range(_SAMPLED):
                key = load_u32(values + (place + i) * _FOUR) & _MAGNITUDE_U64
                if within != 0 and load_u8(within + place + i) == 0:
                    key = _EXCLUDED
                store_u32(sample_at + ((first + c) * _SAMPLED + i) * _FOUR, key)
        part = take(job)
