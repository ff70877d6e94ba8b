"""`topk_mask` beside NumPy, torch.topk, torch's own pruning, and one read of the weights.

Run with ``pytest bench/bench_cpu_topk.py``; `sparsekit.bench.selection` says what each side does.
"""

from collections.abc import Callable

import pytest
from torch import Tensor

from sparsekit.bench.conftest import Compare
from sparsekit.bench.pairs import is_quick
from sparsekit.bench.selection import SIZES, SPARSITIES, topk_case, weights_of


@pytest.fixture(scope="module")
def weights() -> Callable[[int], list[Tensor]]:
    """Weights of a size, made once."""
    made: dict[int, list[Tensor]] = {}

    def make(size: int) -> list[Tensor]:
        if size not in made:
            made.clear()
            made[size] = weights_of(size)
        return made[size]

    return make


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("size", SIZES[:1] if is_quick() else SIZES)
def test_topk(
    compare: Compare, weights: Callable[[int], list[Tensor]], size: int, sparsity: float
) -> None:
    compare(topk_case(weights(size), sparsity, slow_every=7), 15)
