"""The passes over masks as bits, for Triton: README.md says what each reads and writes."""

import triton
import triton.language as tl


@triton.jit
def pack_lanes(flags, LANES: tl.constexpr):
    """Bytes of flags that are 0 or 1: flag i is bit i % 8, from the lowest, of byte i // 8."""
    octets = tl.reshape(flags.to(tl.int32), [LANES // 8, 8])
    return tl.sum(octets << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)


@triton.jit
def lanes_of(octets, LANES: tl.constexpr):
    """Flags, 0 or 1 as int32, of the bits of bytes."""
    bits = (octets.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1
    return tl.reshape(bits, [LANES])


@triton.jit
def nonzero_kernel(values, bits, n, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of the entries that have one of the bits of `WANTED`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = start + tl.arange(0, BLOCK)
    octets = start // 8 + tl.arange(0, BLOCK // 8)
    # Without a mask, loads and stores are 16 bytes wide.
    if start + BLOCK <= n:
        tl.store(bits + octets, pack_lanes((tl.load(values + lanes) & WANTED) != 0, BLOCK))
    else:
        items = tl.load(values + lanes, mask=lanes < n, other=0)
        packed = pack_lanes((items & WANTED) != 0, BLOCK)
        tl.store(bits + octets, packed, mask=octets < (n + 7) // 8)


@triton.jit
def unpack_kernel(bits, bools, n, BLOCK: tl.constexpr):
    """Write the first `n` bits as bytes 0 and 1."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lanes = start + tl.arange(0, BLOCK)
    octets = start // 8 + tl.arange(0, BLOCK // 8)
    if start + BLOCK <= n:
        tl.store(bools + lanes, lanes_of(tl.load(bits + octets), BLOCK).to(tl.int8))
    else:
        packed = tl.load(bits + octets, mask=octets < (n + 7) // 8, other=0)
        tl.store(bools + lanes, lanes_of(packed, BLOCK).to(tl.int8), mask=lanes < n)


@triton.jit
def _ones(octets):
    """Bits that are set in bytes held as int32."""
    pairs = octets - ((octets >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return tl.sum((fours & 0x0F) + (fours >> 4))


@triton.jit
def count_kernel(bits, counts, n, PART: tl.constexpr):
    """Count the bits of each part that are set, leaving out those beyond `n`."""
    part = tl.program_id(0).to(tl.int64)
    octets = tl.arange(0, PART // 8)
    bits += part * (PART // 8)
    if (part + 1) * PART <= n:
        found = _ones(tl.load(bits + octets).to(tl.int32))
    else:
        # Entries of each byte, fewer than 8 in the last one.
        left = tl.minimum(tl.maximum((n - part * PART).to(tl.int32) - octets * 8, 0), 8)
        packed = tl.load(bits + octets, mask=left > 0, other=0).to(tl.int32)
        found = _ones(packed & ((1 << left) - 1))
    tl.store(counts + part, found.to(tl.int64))


@triton.jit
def _flags(bits, start, n, BLOCK: tl.constexpr):
    """Flags of a block of entries, 0 for those beyond `n`, and how many entries it has."""
    size = tl.minimum(n - start, BLOCK).to(tl.int32)
    octets = tl.arange(0, BLOCK // 8)
    packed = tl.load(bits + start // 8 + octets, mask=octets * 8 < size, other=0)
    return tl.where(tl.arange(0, BLOCK) < size, lanes_of(packed, BLOCK), 0), size


@triton.jit
def compact_kernel(values, bits, ends, kept, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Move the entries whose bits are set to the front; `ends` counts up to the end of a part."""
    part = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    done = tl.load(ends + part - 1, mask=part > 0, other=0)
    for start in range(part * PART, tl.minimum((part + 1) * PART, n), BLOCK):
        flags, _ = _flags(bits, start, n, BLOCK)
        places = tl.cumsum(flags, 0) - 1
        items = tl.load(values + start + lanes, mask=flags != 0)
        tl.store(kept + done + places, items, mask=flags != 0)
        done += tl.sum(flags)


@triton.jit
def expand_kernel(kept, bits, ends, values, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Undo `compact_kernel`; entries whose bits are not set are 0."""
    part = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    done = tl.load(ends + part - 1, mask=part > 0, other=0)
    for start in range(part * PART, tl.minimum((part + 1) * PART, n), BLOCK):
        flags, size = _flags(bits, start, n, BLOCK)
        places = tl.cumsum(flags, 0) - 1
        items = tl.load(kept + done + places, mask=flags != 0, other=0)
        if size == BLOCK:
            tl.store(values + start + lanes, items)
        else:
            tl.store(values + start + lanes, items, mask=lanes < size)
        done += tl.sum(flags)
