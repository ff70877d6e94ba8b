"""Rice codes of masks against the reference, bit for bit."""

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsekit.errors import ArgumentError
from sparsekit.kernels.bitmap.reference import pack as pack_bits
from sparsekit.kernels.rice import cpu, reference

Bytes = npt.NDArray[np.uint8]


def read(module: ModuleType, section: Bytes, n: int, *code: int, step: int) -> Bytes:
    unpack = module.unpacker(section, n, *code)
    parts = [unpack(start, min(start + step, n)) for start in range(0, n, step)]
    return np.concatenate(parts)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4096, 70_001])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("r", [0, 1, 2, 5, 13, 31])
@pytest.mark.parametrize("complement", [False, True])
def test_masks_come_back(n: int, density: float, r: int, complement: bool) -> None:
    mask = np.random.default_rng(n).random(n) < density
    mask[n // 2] = not complement
    packed = pack_bits(mask)
    count = int(np.count_nonzero(mask ^ complement))
    section = cpu.pack(packed, n, count, r, complement)
    assert section.tobytes() == reference.pack(packed, n, count, r, complement).tobytes()
    for step in (64, 1024, -(-n // 64) * 64):
        found = read(cpu, section, n, count, r, complement, step=step)
        assert found.tobytes() == packed.tobytes()
    found = read(reference, section, n, count, r, complement, step=-(-n // 64) * 64)
    assert found.tobytes() == packed.tobytes()


@settings(max_examples=300, deadline=None)
@given(
    st.binary(min_size=1, max_size=60), st.integers(1, 600), st.integers(1, 60),
    st.integers(0, 31), st.booleans(), st.sampled_from([64, 128, 640]),
)  # fmt: skip
def test_any_bytes_are_read_or_refused_alike(
    data: bytes, n: int, count: int, r: int, complement: bool, step: int
) -> None:
    if (r + 1) * count > 8 * len(data):
        return
    section = np.frombuffer(data, np.uint8)
    results = []
    for module in (cpu, reference):
        try:
            results.append(read(module, section, n, count, r, complement, step=step).tobytes())
        except ValueError:
            results.append(b"refused")
    assert results[0] == results[1]


def test_too_many_entries_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"fewer than 2\*\*32"):
        cpu.unpacker(np.zeros(9, np.uint8), 2**32, 5, 3, False)
    with pytest.raises(ArgumentError, match="expected 2 bytes"):
        cpu.pack(np.zeros(1, np.uint8), 9, 1, 0, False)
