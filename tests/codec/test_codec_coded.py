"""Rice-coded masks and split values: round trips, sizes near the entropy, and hostile sections."""

import itertools
import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit import codec
from sparsekit.codec import frames, rice, split
from sparsekit.codec.codes import RiceCode, choose_rice, parse_rice, parse_split
from sparsekit.codec.positions import CHUNK
from sparsekit.codec.records import DTYPE_BY_NAME
from sparsekit.errors import FormatError
from tests.codec import page_decoder, page_values
from tests.codec.test_codec_hostile import FLOAT32, Forged, Payload, refused

RICE, SPLIT = 3, 1


def random_mask(n: int, k: int, seed: int = 0) -> np.ndarray:
    keep = np.zeros(n, np.bool_)
    keep[np.random.default_rng(seed).permutation(n)[:k]] = True
    return keep


def read(section: memoryview, code: RiceCode, n: int, k: int) -> np.ndarray:
    keep = np.zeros(n, np.bool_)
    for start, found in rice.positions(section, code, n, k):
        assert not keep[start:][found].any()
        keep[start:][found] = True
    return keep


@given(st.lists(st.booleans(), min_size=2, max_size=400), st.integers(0, 31), st.booleans())
def test_any_mask_comes_back(bits: list[bool], r: int, complement: bool) -> None:
    keep = np.array(bits)
    code = RiceCode(r, complement)
    n, k = keep.size, int(keep.sum())
    if not code.coded(n, k):
        return
    section = rice.pack(keep, code)
    least, most = code.length_range(n, k)
    assert least <= len(section) <= most
    assert np.array_equal(read(section, code, n, k), keep)
    assert parse_rice(code.parameter) == code


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK + 1, 5 * CHUNK + 77])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.5, 0.7, 0.999])
def test_masks_of_several_chunks_come_back(n: int, share: float) -> None:
    k = min(n - 1, max(1, round(share * n)))
    keep = random_mask(n, k)
    code, _ = choose_rice(n, k)
    assert code.complement == (k > n - k)
    assert np.array_equal(read(rice.pack(keep, code), code, n, k), keep)
    clustered = np.sort(keep)
    assert np.array_equal(read(rice.pack(clustered, code), code, n, k), clustered)


@pytest.mark.parametrize("pruned", [0.5, 0.6, 0.62, 0.65, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_masks_take_little_more_than_their_entropy(pruned: float) -> None:
    n = 60_000
    k = round((1 - pruned) * n)
    keep = torch.from_numpy(random_mask(n, k))
    state = {"w": keep.to(torch.int8)}
    record = codec.inspect(codec.encode(state, masks={"w": keep})).records[0]
    p = k / n
    entropy = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert entropy <= record.mask_bytes <= 1.035 * entropy
    between = "bitmap-zstd" if 0.59 <= pruned <= 0.65 else "rice"
    assert record.mask_encoding == ("bitmap" if pruned == 0.5 else between)


@pytest.mark.parametrize("mostly", [0, 1])
def test_pruned_filters_are_seen(mostly: int) -> None:
    keep = torch.from_numpy(random_mask(64 * 288, 64 * 288 // 5)).view(64, 288)
    keep[::2] = mostly
    state = {"w": keep.to(torch.int8).view(64, 32, 3, 3)}
    payload = codec.encode(state, masks={"w": state["w"].bool()})
    record = codec.inspect(payload).records[0]
    assert record.mask_encoding == "bitmap-zstd"
    assert record.mask_bytes < 0.92 * choose_rice(keep.numel(), int(keep.sum()))[1]
    assert torch.equal(codec.decode(payload)["w"], state["w"])


def test_the_expected_size_is_that_of_a_random_mask() -> None:
    for n, k in itertools.product((2_000, 100_000), (7, 300, 900, 1_500)):
        code, expected = choose_rice(n, k)
        found = np.mean([len(rice.pack(random_mask(n, k, s), code)) for s in range(20)])
        assert abs(found - expected) <= 0.02 * expected + 2
        others = [
            len(rice.pack(random_mask(n, k), RiceCode(r, code.complement)))
            for r in (code.r - 1, code.r + 1)
            if r >= 0
        ]
        assert len(rice.pack(random_mask(n, k), code)) <= 1.01 * min(others) + 2


KINDS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@settings(max_examples=60)
@given(st.data(), st.sampled_from(sorted(KINDS)), st.integers(split.LEAST_VALUES, 700))
def test_any_bit_patterns_come_back(data: st.DataObject, name: str, k: int) -> None:
    dtype = DTYPE_BY_NAME[name]
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2 ** (8 * dtype.itemsize), k, dtype=np.uint64).astype(KINDS[name])
    if data.draw(st.booleans()):
        # Few exponents.
        mantissa = {"float32": 23, "float16": 10, "bfloat16": 7}[name]
        bits &= bits.dtype.type(~(0xFF << mantissa) & (2 ** (8 * dtype.itemsize) - 1))
        bits |= (random.integers(3, 9, k) << mantissa).astype(bits.dtype)
    packed = split.pack(bits, dtype)
    if packed is None:
        return
    code, section = packed[0], memoryview(b"".join(packed[1]))
    assert parse_split(code.parameters) == code
    bounds = code.length_range(name, k)
    assert bounds is not None
    assert bounds[0] <= len(section) <= bounds[1]
    value = split.reader(section, code, dtype, k)
    cuts = sorted({0, k, *data.draw(st.lists(st.integers(0, k), max_size=4))})
    found = [value(a, b) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(np.concatenate(found), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.6, 1.0])
def test_states_come_back_from_both_codes(dtype: torch.dtype, density: float) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(120, 1000, generator=random)
    keep = torch.rand(120, 1000, generator=random) < density
    weight = torch.where(keep, weight, 0.0).to(dtype)
    state = {"w": weight, "b": torch.randn(300, generator=random).to(dtype)}
    payload = codec.encode(state, masks={"w": keep})
    found = codec.decode(payload)
    assert torch.equal(found["w"], weight)
    assert torch.equal(found["b"], state["b"])
    assert torch.equal(codec.decode_masks(payload)["w"], keep)
    records = codec.inspect(payload).records
    assert {r.value_encoding for r in records} == {"split"}
    fast = codec.encode(state, masks={"w": keep}, level="fast")
    assert {r.value_encoding for r in codec.inspect(fast).records} == {"raw"}
    assert {r.mask_encoding for r in codec.inspect(fast).records} <= {"bitmap", "csr", "dense"}
    assert len(payload) < len(fast)


def test_weights_take_less_than_the_bound_of_raw_values() -> None:
    random = torch.Generator().manual_seed(2)
    n, pruned = 400_000, 0.9
    weight = torch.randn(n, generator=random) * torch.rand(n, generator=random) ** 2
    threshold = weight.abs().kthvalue(round(pruned * n)).values
    weight = torch.where(weight.abs() > threshold, weight, 0.0).view(400, 1000)
    k = int(weight.count_nonzero())
    p = k / n
    entropy = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    assert 8 * len(codec.encode({"w": weight})) <= 0.82 * (entropy + 32 * k)


def rice_record(n: int, section: bytes, k: int, parameter: int) -> Forged:
    return Forged(
        section, struct.pack(f"<{k}f", *range(1, k + 1)), k=k, shape=(n,), mask_code=RICE,
        params=bytes([parameter]),
    )  # fmt: skip


@settings(max_examples=400)
@given(st.integers(1, 40), st.data(), st.integers(0, 255), st.binary(min_size=1, max_size=8))
def test_rice_sections_are_taken_exactly_where_the_page_takes_them(
    n: int, data: st.DataObject, parameter: int, section: bytes
) -> None:
    k = data.draw(st.integers(0, n))
    payload = Payload((rice_record(n, section, k, parameter),)).bytes()
    try:
        wanted = page_decoder.read_rice(section, n, k, parameter)
    except page_values.Refused:
        wanted = None
    if wanted is None or len(wanted) != k:
        with pytest.raises(FormatError):
            codec.decode(payload)
        with pytest.raises(FormatError):
            codec.decode_masks(payload)
    else:
        assert codec.decode_masks(payload)["w"].nonzero().flatten().tolist() == wanted
        assert codec.decode(payload)["w"][wanted].tolist() == list(range(1, k + 1))


@settings(max_examples=200)
@given(
    st.sampled_from([0, 2, 3]),
    st.binary(min_size=3, max_size=3 * 4),
    st.binary(min_size=6, max_size=6),
)
def test_split_sections_are_taken_exactly_where_the_page_takes_them(
    dtype: int, section: bytes, parameters: bytes
) -> None:
    parameters = bytes([parameters[0] % 3, parameters[1], parameters[2] % 5, 0, 0, 0])
    record = Forged(b"", section, k=3, shape=(3,), value_code=SPLIT, params=parameters, dtype=dtype)
    payload = Payload((record,)).bytes()
    try:
        wanted = page_values.read_split(section, dtype, 3, parameters)
    except (page_values.Refused, zstandard.ZstdError):
        with pytest.raises(FormatError):
            codec.decode(payload)
        return
    found = codec.decode(payload)["w"]
    whole = {4: torch.int32, 2: torch.int16}[found.element_size()]
    bits = [b % 2 ** (8 * found.element_size()) for b in found.view(whole).tolist()]
    assert bits == wanted


# Positions 1 and 4 of 6 with r = 1: gaps 1 and 2, low bits 1 and 0, quotients 0 and 1.
GOOD = rice_record(6, b"\x15", 2, 1)


def test_the_forger_writes_what_the_page_says() -> None:
    found = codec.decode(Payload((GOOD,)).bytes())["w"]
    assert found.tolist() == [0, 1, 0, 0, 2, 0]
    other = rice_record(6, b"\x15", 4, 0x81)
    assert codec.decode(Payload((other,)).bytes())["w"].tolist() == [1, 0, 2, 3, 0, 4]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        pytest.param(rice_record(6, b"\x15", 2, 32), "Rice parameter", id="r-32"),
        pytest.param(rice_record(6, b"", 6, 0x81), "Rice parameter", id="nothing-coded"),
        pytest.param(rice_record(6, b"", 2, 1), "mask section", id="too-short"),
        pytest.param(rice_record(6, b"\x15\x01", 2, 1), "mask section", id="too-long"),
        pytest.param(rice_record(6, b"\x1d", 2, 1), "more than the 2", id="three-ones"),
        pytest.param(rice_record(6, b"\x05", 2, 1), "has 1 gaps", id="one-one"),
        pytest.param(rice_record(6, b"\x85", 2, 1), "beyond the 6", id="beyond"),
        pytest.param(
            rice_record(40, b"\x03\x00", 2, 0), "does not end with the last gap", id="empty-byte"
        ),
    ],
)
def test_bad_rice_sections_are_refused(record: Forged, match: str) -> None:
    refused(Payload((record,)), FormatError, match)


def split_record(**changes: Any) -> Forged:
    bits = (np.arange(600) * 7919 % 4096 << 12 | 0x3F000000).astype(np.uint32)
    packed = split.pack(bits, DTYPE_BY_NAME["float32"])
    assert packed is not None
    code, section = packed[0], b"".join(packed[1])
    given: dict[str, Any] = {
        "values": section, "k": 600, "shape": (600,), "value_code": SPLIT,
        "params": code.parameters,
    }  # fmt: skip
    return Forged(**{**given, **changes})


def planes(first: bytes, second: bytes, low: bytes = bytes(1200), mode: int = 1) -> Forged:
    """A record whose planes stand in the section as given."""
    return split_record(
        values=first + second + low, params=struct.pack("<BBI", mode, 0, len(first))
    )


def frame(data: bytes, **options: Any) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=17, **options)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


PLAIN = bytes(600)


@pytest.mark.parametrize(
    ("record", "match"),
    [
        pytest.param(split_record(params=bytes(5)), "take 6 bytes", id="five-parameters"),
        pytest.param(split_record(params=struct.pack("<BBI", 2, 0, 9)), "not possible", id="mode"),
        pytest.param(
            split_record(params=struct.pack("<BBI", 0, 3, 9)), "not possible", id="smallest"
        ),
        pytest.param(
            split_record(params=struct.pack("<BBI", 1, 0, 601)), "not possible", id="first-too-long"
        ),
        pytest.param(split_record(dtype=6), "not possible", id="int32"),
        pytest.param(split_record(values=bytes(1200)), "value section", id="no-planes"),
        pytest.param(planes(PLAIN, b"\x40" * 600), "no value has", id="second-plane-bits"),
        pytest.param(planes(frame(PLAIN)[:-1], frame(PLAIN)), "frame", id="cut-frame"),
        pytest.param(planes(frame(PLAIN) + b"\0", frame(PLAIN)), "where its section", id="extra"),
        pytest.param(planes(frame(PLAIN) * 2, frame(PLAIN)), "where its section", id="two-frames"),
        pytest.param(planes(frame(bytes(601)), frame(PLAIN)), "600 bytes", id="other-size"),
        pytest.param(
            planes(frame(PLAIN, write_checksum=True), frame(PLAIN)), "checksum", id="checksum"
        ),
        pytest.param(
            planes(frame(PLAIN, write_content_size=False), frame(PLAIN)), "600 bytes", id="no-size"
        ),
        pytest.param(planes(b"\0" * 20, frame(PLAIN)), "no zstd frame", id="no-frame"),
    ],
)
def test_bad_split_sections_are_refused(record: Forged, match: str) -> None:
    data = Payload((record,)).bytes()
    with pytest.raises(FormatError, match=match):
        codec.decode(data)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        pytest.param(frame(b"\x01" + bytes(511))[:-1], "frame", id="cut"),
        pytest.param(frame(b"\x01" + bytes(510)), "512 bytes", id="short"),
        pytest.param(frame(b"\x01" + bytes(510) + b"\x80"), "unused bits", id="tail"),
        pytest.param(frame(b"\x03" + bytes(511)), "more than the 1", id="two-kept"),
        pytest.param(b"", "mask section", id="empty"),
        pytest.param(bytes(512), "mask section", id="as-long"),
    ],
)
def test_bad_compressed_bitmaps_are_refused(section: bytes, match: str) -> None:
    record = Forged(section, bytes(4), k=1, shape=(4095,), mask_code=4)
    refused(Payload((record,)), FormatError, match)


def test_a_wide_window_is_refused() -> None:
    data = np.random.default_rng(0).integers(0, 4, 1 << 19, dtype=np.uint8).tobytes()
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=20, write_content_size=True
        )
    ).compress(data)
    with pytest.raises(FormatError, match="memory"):
        frames.reader(memoryview(wide), len(data))


def test_exponents_that_no_value_has_are_refused() -> None:
    record = split_record(
        values=b"\xf8" * 600 + bytes(600) + bytes(1200), params=struct.pack("<BBI", 1, 255, 600)
    )
    with pytest.raises(FormatError, match="exponents that no value has"):
        codec.decode(Payload((record,)).bytes())


def test_damage_in_a_frame_is_refused_or_found_by_the_checksum() -> None:
    record = split_record()
    good = codec.decode(Payload((record,)).bytes())["w"]
    for at in range(0, len(record.values), 7):
        damaged = bytearray(record.values)
        damaged[at] ^= 0x55
        try:
            found = codec.decode(Payload((split_record(values=bytes(damaged)),)).bytes())["w"]
        except FormatError:
            continue
        assert isinstance(found, Tensor)
        assert found.dtype == good.dtype
    assert record.dtype == FLOAT32
