"""Planes of float32 numbers on the CPU: the functions of `reference` by compiled passes."""

import numpy as np
import numpy.typing as npt

from sparsekit.errors import ArgumentError
from sparsekit.kernels import parallel
from sparsekit.kernels.compiled import Kernel
from sparsekit.kernels.split_planes import passes
from sparsekit.kernels.split_planes.reference import Bytes, Halves, Words


def split(values: Words, smallest: int, top_bits: int) -> tuple[Bytes, Bytes, Halves]:
    """Planes of bit patterns; 8 bits have room for the exponents' distances and the top bits."""
    source = np.ascontiguousarray(values, np.uint32)
    first, second = np.empty(source.size, np.uint8), np.empty(source.size, np.uint8)
    low = np.empty(source.size, np.uint16)
    _run(passes.split, source, first, second, low, smallest, top_bits)
    return first, second, low


def join(first: Bytes, second: Bytes, low: Halves, smallest: int, top_bits: int) -> Words:
    """Bit patterns of planes.

    Raises
    ------
    ValueError
        If the planes hold what no number has.
    """
    if not first.size == second.size == low.size:
        raise ArgumentError(
            f"second, low: expected {first.size} numbers each, got {second.size} and {low.size}"
        )
    values = np.empty(first.size, np.uint32)
    a, b, c = (np.ascontiguousarray(plane) for plane in (first, second, low))
    if _run(passes.join, values, a, b, c, smallest, top_bits):
        raise ValueError("its planes hold what no number has")
    return values


def _run(
    kernel: Kernel,
    values: Words,
    first: npt.NDArray[np.generic],
    second: npt.NDArray[np.generic],
    low: npt.NDArray[np.generic],
    smallest: int,
    top_bits: int,
) -> int:
    state = np.zeros(1, np.uint64)
    arrays = {"values": values, "first": first, "second": second, "low": low, "state": state}
    addresses = {name: array.__array_interface__["data"][0] for name, array in arrays.items()}
    job = kernel.job(count=values.size, smallest=smallest, top_bits=top_bits, **addresses)
    parallel.run(kernel.address, job, 1)
    return int(state[0])
