"""Masks as bits against the reference, bit for bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import ArgumentError
from sparsekit.kernels import dispatch
from sparsekit.kernels.bitmap import cpu, passes, reference

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 1000, passes.PART - 1, passes.PART, 3 * passes.PART + 17]
DENSITIES = [0.0, 0.01, 0.5, 0.97, 1.0]
DTYPES = ["u1", "u2", "u4", "u8", "f4", "c8"]


def make(n: int, density: float, seed: int = 1) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(n) < density


def numbers(n: int, dtype: str) -> npt.NDArray[Any]:
    return (
        np.random.default_rng(2)
        .integers(1, 256, n * np.dtype(dtype).itemsize, np.uint8)
        .view(dtype)
    )


def same(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_pack_unpack_and_count(n: int, density: float) -> None:
    mask = make(n, density)
    packed = cpu.pack(mask)
    assert same(packed, reference.pack(mask))
    assert same(cpu.unpack(packed, n), mask)
    assert cpu.count(packed, n) == reference.count(packed, n) == np.count_nonzero(mask)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compact_and_expand(n: int, density: float, dtype: str) -> None:
    mask = make(n, density)
    packed = reference.pack(mask)
    whole = numbers(n, dtype)
    kept = cpu.compact(whole, packed)
    assert same(kept, whole[mask])
    assert same(kept, reference.compact(whole, packed))
    expanded = cpu.expand(kept, packed, n)
    assert same(expanded, np.where(mask, whole, np.zeros((), dtype)))
    assert same(expanded, reference.expand(kept, packed, n))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
def test_nonzero_looks_at_the_wanted_bits(n: int, density: float, dtype: str) -> None:
    sign = 1 << (8 * np.dtype(dtype).itemsize - 1)
    values = np.where(make(n, density), numbers(n, dtype), np.zeros((), dtype))
    values[::3] |= np.array(sign, dtype)
    for wanted in (2 * sign - 1, sign - 1, sign, 1, 0):
        packed = cpu.nonzero(values, wanted)
        assert same(packed, reference.nonzero(values, wanted))
        assert same(reference.unpack(packed, n), (values & np.array(wanted, dtype)) != 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), max_size=300), st.sampled_from(DTYPES))
def test_drawn_masks(flags: list[bool], dtype: str) -> None:
    mask = np.array(flags, np.bool_)
    packed = cpu.pack(mask)
    assert same(packed, reference.pack(mask))
    whole = numbers(mask.size, dtype)
    kept = cpu.compact(whole, packed)
    assert same(kept, whole[mask])
    assert same(cpu.expand(kept, packed, mask.size), reference.expand(kept, packed, mask.size))


@pytest.mark.parametrize("n", [1, 62, 67, 1001])
def test_bits_after_the_last_entry_are_ignored(n: int) -> None:
    packed = np.full(-(-n // 8), 255, np.uint8)
    assert cpu.count(packed, n) == n
    assert cpu.unpack(packed, n).all()
    whole = numbers(n, "u4")
    assert same(cpu.compact(whole, packed), whole)
    assert same(cpu.expand(whole, packed, n), whole)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_need_not_be_aligned(offset: int) -> None:
    n = 1003
    mask = make(n, 0.3)
    whole = numbers(n, "u4")

    def moved(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        raw = np.zeros(array.nbytes + offset, np.uint8)
        raw[offset:] = array.view(np.uint8)
        return raw[offset:].view(array.dtype)

    packed = moved(reference.pack(mask))
    assert not moved(whole).flags.aligned
    assert same(cpu.pack(moved(mask)), packed)
    kept = cpu.compact(moved(whole), packed)
    assert same(kept, whole[mask])
    assert same(cpu.expand(moved(kept), packed, n), np.where(mask, whole, np.uint32(0)))


def test_strided_and_read_only_memory() -> None:
    mask, whole = make(2000, 0.4), numbers(2000, "u4")
    assert same(cpu.pack(mask[::2]), reference.pack(mask[::2]))
    packed = np.frombuffer(reference.pack(mask[::2]).tobytes(), np.uint8)
    kept = cpu.compact(whole[::-2], packed)
    assert same(kept, whole[::-2][mask[::2]])
    spread = np.repeat(packed, 2)[::2]
    assert same(cpu.expand(np.repeat(kept, 3)[::3], spread, 1000), cpu.expand(kept, packed, 1000))


Call = Callable[[Any], Any]


@pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    ("call", "text"),
    [
        pytest.param(lambda b: b.unpack(np.zeros(1, np.uint8), 9), "2 bytes", id="short"),
        pytest.param(lambda b: b.count(np.zeros(3, np.uint8), 9), "2 bytes", id="long"),
        pytest.param(lambda b: b.unpack(np.zeros(2, np.int8), 9), "got int8", id="signed"),
        pytest.param(lambda b: b.unpack(np.zeros((2, 1), np.uint8), 9), "shape", id="two axes"),
        pytest.param(
            lambda b: b.compact(np.zeros(17), np.zeros(2, np.uint8)), "3 bytes", id="compact"
        ),
        pytest.param(
            lambda b: b.compact(np.zeros((4, 4)), np.zeros(2, np.uint8)), "one axis", id="flat"
        ),
        pytest.param(
            lambda b: b.compact(np.zeros(16, "c16"), np.zeros(2, np.uint8)), "complex128", id="wide"
        ),
        pytest.param(
            lambda b: b.compact(np.zeros(16, object), np.zeros(2, np.uint8)), "object", id="object"
        ),
        pytest.param(
            lambda b: b.expand(np.zeros(3), np.full(2, 3, np.uint8), 16), "expected 4", id="few"
        ),
        pytest.param(
            lambda b: b.expand(np.zeros(5), np.full(2, 3, np.uint8), 16), "expected 4", id="many"
        ),
        pytest.param(
            lambda b: b.expand(np.zeros(4), np.full(3, 3, np.uint8), 16), "2 bytes", id="expand"
        ),
    ],
)
def test_sizes_are_checked_before_memory_is_touched(backend: Any, call: Call, text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        call(backend)


def test_pack_refuses_what_is_no_flat_mask() -> None:
    for wrong in (np.zeros(4, np.uint8), np.zeros((2, 2), np.bool_)):
        with pytest.raises(ArgumentError, match="flat bools"):
            cpu.pack(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pack", "unpack", "count", "compact", "expand"])
def test_the_table_has_both_backends(name: str) -> None:
    for backend, module in (("auto", cpu), ("cpu", cpu), ("reference", reference)):
        choice = dispatch.resolve(f"bitmap_{name}", "cpu", backend)
        assert choice.implementation.load() is getattr(module, name)
