"""Every convolution of the network, masked, beside torch's dense layer in both memory formats.

Run with ``pytest bench/bench_cpu_conv.py``. `sparsekit.bench.convolutions` has the sides and the
tolerances of the comparison that comes first.
"""

import pytest

from sparsekit.bench.conftest import Compare
from sparsekit.bench.convolutions import Mode, conv_case
from sparsekit.bench.network import LAYERS, SPARSITIES

# Of each, an odd number.
ROUNDS = {"conv1": 7, "conv2": 15}


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("name", LAYERS)
def test_conv(compare: Compare, name: str, mode: Mode, sparsity: float) -> None:
    compare(conv_case(name, sparsity, mode), ROUNDS.get(name, 21))
