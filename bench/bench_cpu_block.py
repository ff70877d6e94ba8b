"""Blocks of the network: what follows their convolutions, and all four layers together.

Run with ``pytest bench/bench_cpu_block.py``.
"""

import pytest

from sparsekit.bench.blocks import block_case, norm_pool_relu_case, within_block_case
from sparsekit.bench.conftest import Compare
from sparsekit.bench.network import SPARSITIES


@pytest.mark.parametrize("numbers", [(2, 3, 4), (2,), (3,), (4,)], ids=str)
def test_norm_pool_relu(compare: Compare, numbers: tuple[int, ...]) -> None:
    compare(norm_pool_relu_case(numbers), 31)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_first_block(compare: Compare, sparsity: float) -> None:
    compare(block_case(1, sparsity), 9)


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_other_block(compare: Compare, number: int) -> None:
    compare(block_case(number, 0.95), 11)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_within_block(compare: Compare, number: int) -> None:
    compare(within_block_case(number, 0.95), 15)
