"""Planes of float32 numbers against the reference, bit for bit."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sparsekit.errors import ArgumentError
from sparsekit.kernels.split_planes import cpu, reference


def patterns(n: int, low: int, high: int) -> npt.NDArray[np.uint32]:
    random = np.random.default_rng(n)
    exponents = random.integers(low, high, n, np.uint32, endpoint=True) << 23
    signs = random.integers(0, 2, n, np.uint32) << 31
    made: Any = exponents | random.integers(0, 2**23, n, np.uint32) | signs
    return np.asarray(made, np.uint32)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129, 10_007])
@pytest.mark.parametrize(("low", "high", "top"), [(100, 131, 3), (0, 255, 0), (255, 255, 3)])
def test_planes_come_back(n: int, low: int, high: int, top: int) -> None:
    values = patterns(n, low, high)
    smallest = low if top else 0
    planes = cpu.split(values, smallest, top)
    wanted = reference.split(values, smallest, top)
    for i in range(3):
        assert planes[i].dtype == wanted[i].dtype
        assert planes[i].tobytes() == wanted[i].tobytes()
    assert np.array_equal(cpu.join(*planes, smallest, top), values)
    assert np.array_equal(reference.join(*planes, smallest, top), values)


@pytest.mark.parametrize("at", [0, 63, 64, 99])
def test_what_no_number_has_is_refused(at: int) -> None:
    values = patterns(100, 100, 110)
    for smallest, top, plane, byte in ((100, 3, 1, 0x20), (240, 3, 0, 0xF8), (0, 0, 1, 0xFF)):
        planes = cpu.split(values, 100 if top else 0, top)
        planes[plane][at] = byte
        results = []
        for module in (cpu, reference):
            try:
                results.append(module.join(*planes, smallest, top).tolist())
            except ValueError as error:
                results.append(str(error))
        assert results[0] == results[1]
        assert isinstance(results[0], str) == (byte != 0xFF)


def test_planes_of_different_lengths_are_refused() -> None:
    first, second, low = cpu.split(patterns(10, 1, 5), 1, 3)
    with pytest.raises(ArgumentError, match="expected 10 numbers each, got 9 and 10"):
        cpu.join(first, second[1:], low, 1, 3)
