"""The passes of the selection over parts of tensors, for Triton: README.md has the algorithm.

A row of the table describes a part of one tensor: where its values, its allowed entries, its bits
and its mask begin, as distances from the tensors that the launch is given; its number of entries;
its place among all parts; its tensor's; and whether values and allowed entries are at multiples of
16 bytes. KIND says how keys are read: 0 for float32, 1 for bfloat16, 2 for float16.
"""

import triton
import triton.language as tl

from sparsekit.kernels.bitmap.triton_passes import lanes_of, pack_lanes

COLUMNS: tl.constexpr = tl.constexpr(8)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)

# The state: the threshold so far, how many keys with it are wanted, which tensor holds NaN.
NAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def _keys(bits, KIND: tl.constexpr):
    """Bits of ``|w|`` as float32, from the bits of float32, bfloat16 or float16."""
    if KIND == 0:
        keys = bits & 0x7FFFFFFF
    elif KIND == 1:
        keys = (bits & 0x7FFF).to(tl.int32) << 16
    else:
        size = (bits & 0x7FFF).to(tl.int32)
        # The exponent's bias is 15 instead of 127; that of infinity and NaN is all ones.
        normal = (size << 13) + tl.where(size >= 0x7C00, 224 << 23, 112 << 23)
        # Below 2**-14 it is a multiple of 2**-24, which float32 holds with an exponent of its own.
        counted = size.to(tl.float32).to(tl.int32, bitcast=True) - (24 << 23)
        keys = tl.where(size >= 0x0400, normal, tl.where(size == 0, 0, counted))
    return keys


@triton.jit
def _read(
    values, within, start, length,
    KIND: tl.constexpr, WITHIN: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys of a block of a part, and whether each may be selected."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        keys = _keys(tl.load(values + start + lanes), KIND)
        allowed = tl.full([BLOCK], True, tl.int1)
        if WITHIN:
            allowed = tl.load(within + start + lanes) != 0
    else:
        allowed = start + lanes < length
        keys = _keys(tl.load(values + start + lanes, mask=allowed, other=0), KIND)
        if WITHIN:
            allowed = tl.load(within + start + lanes, mask=allowed, other=0) != 0
    return keys, allowed


@triton.jit
def _at(base, offset, ALIGN: tl.constexpr):
    """Address of a row's tensor; with `ALIGN` the compiler sees that it divides the offset."""
    return base + offset // ALIGN * ALIGN


@triton.jit
def _whole(entry, length, BLOCK: tl.constexpr):
    """Entries in whole blocks, if all is at multiples of 16 bytes, as the wide loads need."""
    return tl.where(tl.load(entry + 7) != 0, length // BLOCK * BLOCK, 0)


@triton.jit
def _counted(found, keys, allowed, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Add a block to a histogram. Few blocks have a key that reaches the last digit."""
    digits = (keys >> SHIFT) & ((1 << BITS) - 1)
    if SHIFT == 0:
        if tl.max(allowed.to(tl.int32)) != 0:
            found += tl.histogram(digits, 1 << BITS, mask=allowed)
    else:
        found += tl.histogram(digits, 1 << BITS, mask=allowed)
    return found


@triton.jit(do_not_specialize=["row", "rows", "tensors"])
def histogram_kernel(
    values, within, table, state, counts, row, rows, tensors,
    KIND: tl.constexpr, WITHIN: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the keys by one digit, of those that have the digits found so far."""
    FIRST: tl.constexpr = SHIFT + BITS == 31
    ALIGN: tl.constexpr = 4 if KIND == 0 else 8
    found = tl.zeros([1 << BITS], tl.int32)
    prefix = tl.load(state).to(tl.int32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * COLUMNS
        offset, allowed_offset = tl.load(entry), tl.load(entry + 1)
        length = tl.load(entry + 4).to(tl.int32)
        whole = _whole(entry, length, BLOCK)
        highest = tl.zeros([BLOCK], tl.int32)
        at, allowed_at = _at(values, offset, ALIGN), _at(within, allowed_offset, 16)
        for start in range(0, whole, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, True)
            if FIRST:
                highest = tl.maximum(highest, keys)
            else:
                allowed = allowed & (keys >> (SHIFT + BITS) == prefix)
            found = _counted(found, keys, allowed, SHIFT, BITS)
        at, allowed_at = values + offset, within + allowed_offset
        for start in range(whole, length, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            if FIRST:
                highest = tl.maximum(highest, keys)
            else:
                allowed = allowed & (keys >> (SHIFT + BITS) == prefix)
            found = _counted(found, keys, allowed, SHIFT, BITS)
        if FIRST:
            if tl.max(highest) > _INFINITY:
                # The first tensor has the largest number; 0 stands for none.
                tl.atomic_max(state + NAN, tensors - tl.load(entry + 6), sem="relaxed")
    bins = tl.arange(0, 1 << BITS)
    tl.atomic_add(counts + bins, found.to(tl.int64), mask=found != 0, sem="relaxed")


@triton.jit(do_not_specialize=["keep"])
def digit_kernel(state, counts, keep, BITS: tl.constexpr, FIRST: tl.constexpr):
    """Append the threshold's next digit, and see how many are wanted of the keys that have it."""
    bins = tl.arange(0, 1 << BITS)
    count = tl.load(counts + bins)
    if FIRST:
        wanted = keep.to(tl.int64)
        prefix = wanted * 0
    else:
        wanted = tl.load(state + 1)
        prefix = tl.load(state)
    at_least = tl.cumsum(count, 0, reverse=True)
    digit = tl.max(tl.where(at_least >= wanted, bins, 0))
    tl.store(state, (prefix << BITS) | digit)
    tl.store(state + 1, wanted - tl.sum(tl.where(bins > digit, count, 0)))


@triton.jit(do_not_specialize=["row", "rows"])
def classify_kernel(
    values, within, table, state, bits, ties, row, rows,
    KIND: tl.constexpr, WITHIN: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of the keys above the threshold, and count each part's keys equal to it."""
    ALIGN: tl.constexpr = 4 if KIND == 0 else 8
    threshold = tl.load(state).to(tl.int32) << LOW
    octets = tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * COLUMNS
        offset, allowed_offset = tl.load(entry), tl.load(entry + 1)
        length = tl.load(entry + 4).to(tl.int32)
        whole = _whole(entry, length, BLOCK)
        bits_at = bits + tl.load(entry + 2)
        equal = tl.zeros([BLOCK], tl.int32)
        at, allowed_at = _at(values, offset, ALIGN), _at(within, allowed_offset, 16)
        for start in range(0, whole, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, True)
            equal += (allowed & (keys == threshold)).to(tl.int32)
            tl.store(bits_at + start // 8 + octets, pack_lanes(allowed & (keys > threshold), BLOCK))
        at, allowed_at = values + offset, within + allowed_offset
        for start in range(whole, length, BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            equal += (allowed & (keys == threshold)).to(tl.int32)
            packed = pack_lanes(allowed & (keys > threshold), BLOCK)
            tl.store(bits_at + start // 8 + octets, packed, mask=start + octets * 8 < length)
        tl.store(ties + tl.load(entry + 5), tl.sum(equal).to(tl.int64))


@triton.jit(do_not_specialize=["parts"])
def quota_kernel(state, ties, parts, BLOCK: tl.constexpr):
    """Replace each part's number of ties by how many of them are selected: the first ones."""
    left = tl.load(state + 1)
    for start in range(0, parts, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        count = tl.load(ties + lanes, mask=lanes < parts, other=0)
        before = tl.cumsum(count, 0) - count
        quota = tl.minimum(tl.maximum(left - before, 0), count)
        tl.store(ties + lanes, quota, mask=lanes < parts)
        left -= tl.sum(count)


@triton.jit(do_not_specialize=["row", "rows"])
def ties_kernel(
    values, within, table, state, bits, quotas, row, rows,
    KIND: tl.constexpr, WITHIN: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of the ties that are selected; parts without any are not looked at."""
    threshold = tl.load(state).to(tl.int32) << LOW
    octets = tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + (row + i) * COLUMNS
        quota = tl.load(quotas + tl.load(entry + 5)).to(tl.int32)
        length = tl.load(entry + 4).to(tl.int32)
        at, allowed_at = values + tl.load(entry), within + tl.load(entry + 1)
        bits_at = bits + tl.load(entry + 2)
        for start in range(0, tl.where(quota > 0, length, 0), BLOCK):
            keys, allowed = _read(at, allowed_at, start, length, KIND, WITHIN, BLOCK, False)
            equal = (allowed & (keys == threshold)).to(tl.int32)
            chosen = tl.where(tl.cumsum(equal, 0) <= quota, equal, 0)
            quota -= tl.sum(chosen)
            inside = start + octets * 8 < length
            packed = tl.load(bits_at + start // 8 + octets, mask=inside, other=0)
            packed = packed | pack_lanes(chosen, BLOCK)
            tl.store(bits_at + start // 8 + octets, packed, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def masks_kernel(bits, table, masks, rows, BLOCK: tl.constexpr):
    """Write the bits of all parts as the bytes of bools."""
    lanes, octets = tl.arange(0, BLOCK), tl.arange(0, BLOCK // 8)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        entry = table + i * COLUMNS
        # Both start at multiples of 16 bytes: the bits were laid out so, masks are torch's own.
        bits_at = bits + tl.load(entry + 2) // 16 * 16
        masks_at = masks + tl.load(entry + 3) // 16 * 16
        length = tl.load(entry + 4).to(tl.int32)
        whole = length // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            flags = lanes_of(tl.load(bits_at + start // 8 + octets), BLOCK)
            tl.store(masks_at + start + lanes, flags.to(tl.int8))
        for start in range(whole, length, BLOCK):
            inside = start + octets * 8 < length
            flags = lanes_of(tl.load(bits_at + start // 8 + octets, mask=inside, other=0), BLOCK)
            tl.store(masks_at + start + lanes, flags.to(tl.int8), mask=start + lanes < length)
