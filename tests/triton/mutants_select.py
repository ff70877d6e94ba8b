"""Mistakes in the kernels that select and that handle bits, which a named check has to notice.

Rows as in `mutants_masked_conv3d`.
"""

_TOPK = "kernels/topk_mask/triton_passes.py"
_BITS = "kernels/bitmap/triton_passes.py"
_TEST_TOPK = "tests/triton/test_triton_topk_mask.py::"
_TEST_BITS = "tests/triton/test_triton_bitmap.py::"
_REFERENCE = _TEST_TOPK + "test_masks_are_those_of_the_reference[dtypes3-continuous-False]"
_TIES = _TEST_TOPK + "test_ties_go_to_the_first_over_tensors_and_dtypes"

MUTANTS = [
    (
        "the last ties are taken first", _TOPK,
        "before = tl.cumsum(count, 0) - count",
        "before = tl.cumsum(count, 0, reverse=True) - count",
        "interpreter", _TIES,
    ),
    (
        "all ties of a part are taken", _TOPK,
        "quota = tl.minimum(tl.maximum(left - before, 0), count)",
        "quota = tl.where(left > before, count, 0)",
        "interpreter", _TIES,
    ),
    (
        "a digit is read one bit too high", _TOPK,
        "digits = (keys >> SHIFT) & ((1 << BITS) - 1)",
        "digits = (keys >> (SHIFT + 1)) & ((1 << BITS) - 1)",
        "interpreter", _REFERENCE,
    ),
    (
        "keys at the threshold count as above it", _TOPK,
        "packed = pack_lanes(allowed & (keys > threshold), BLOCK)",
        "packed = pack_lanes(allowed & (keys >= threshold), BLOCK)",
        "interpreter", _TIES,
    ),
    (
        "the sign is part of a key", _TOPK,
        "keys = bits & 0x7FFFFFFF", "keys = bits",
        "interpreter", _REFERENCE,
    ),
    (
        "small float16 have keys one exponent too low", _TOPK,
        "counted = size.to(tl.float32).to(tl.int32, bitcast=True) - (24 << 23)",
        "counted = size.to(tl.float32).to(tl.int32, bitcast=True) - (25 << 23)",
        "interpreter",
        _TEST_TOPK + "test_keys_of_all_numbers_of_16_bits_are_those_of_float32[dtype0]",
    ),
    (
        "values are read beyond the end of a tensor", _TOPK,
        "keys = _keys(tl.load(values + start + lanes, mask=allowed, other=0), KIND)",
        "keys = _keys(tl.load(values + start + lanes), KIND)",
        "interpreter", _REFERENCE,
    ),
    (
        "bits are stored beyond the end of the last tensor", _TOPK,
        "tl.store(bits_at + start // 8 + octets, packed, mask=start + octets * 8 < length)",
        "tl.store(bits_at + start // 8 + octets, packed)",
        "ttsem", _TEST_TOPK + "test_tiles_do_not_matter[tiles2]",
    ),
    (
        "masks are stored beyond the end of a tensor", _TOPK,
        "tl.store(masks_at + start + lanes, flags.to(tl.int8), mask=start + lanes < length)",
        "tl.store(masks_at + start + lanes, flags.to(tl.int8))",
        "interpreter", _REFERENCE,
    ),
    (
        "programs add up the histogram without atomics", _TOPK,
        'tl.atomic_add(counts + bins, found.to(tl.int64), mask=found != 0, sem="relaxed")',
        "tl.store(counts + bins, tl.load(counts + bins) + found.to(tl.int64))",
        "ttsem", _REFERENCE,
    ),
    (
        "NaN is blamed on the last tensor", _TOPK,
        "tl.atomic_max(state + NAN, tensors - tl.load(entry + 6), sem=\"relaxed\")",
        "tl.atomic_max(state + NAN, 1 + tl.load(entry + 6), sem=\"relaxed\")",
        "interpreter", _TEST_TOPK + "test_nan_is_refused_by_the_first_name[5-dtype0]",
    ),
    (
        "bits stand in the wrong order", _BITS,
        "return tl.sum(octets << tl.arange(0, 8)[None, :], axis=1).to(tl.uint8)",
        "return tl.sum(octets << (7 - tl.arange(0, 8))[None, :], axis=1).to(tl.uint8)",
        "interpreter", _TEST_BITS + "test_bits_and_bools_are_those_of_numpy[33]",
    ),
    (
        "bits beyond the last entry are counted", _BITS,
        "found = _ones(packed & ((1 << left) - 1))", "found = _ones(packed)",
        "interpreter", _TEST_BITS + "test_bits_after_the_last_entry_are_ignored",
    ),
    (
        "bools are stored beyond the end", _BITS,
        "tl.store(bools + lanes, lanes_of(packed, BLOCK).to(tl.int8), mask=lanes < n)",
        "tl.store(bools + lanes, lanes_of(packed, BLOCK).to(tl.int8))",
        "ttsem", _TEST_BITS + "test_bits_and_bools_are_those_of_numpy[33]",
    ),
    (
        "kept values are stored one place further on", _BITS,
        "tl.store(kept + done + places, items, mask=flags != 0)",
        "tl.store(kept + done + places + 1, items, mask=flags != 0)",
        "ttsem", _TEST_BITS + "test_values_move_as_bits[dtype3-129]",
    ),
    (
        "pruned entries take the next kept value", _BITS,
        "items = tl.load(kept + done + places, mask=flags != 0, other=0)",
        "items = tl.load(kept + done + tl.maximum(places, 0))",
        "ttsem", _TEST_BITS + "test_values_move_as_bits[dtype3-129]",
    ),
]  # fmt: skip
