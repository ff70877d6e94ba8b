"""One convolution of the default network, forward and both gradients, beside the dense layer.

Run with ``pytest bench/bench_masked_conv3d.py``. Batch 1, float32, contiguous tensors, uniform
random masks. The reference backend computes densely: it is here as the floor that other backends
are measured from.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.kernels import dispatch
from sparsekit.nn import MaskedConv3d

# (channels in, channels out, grid) of the blocks at 91 x 109 x 91; block 1 needs too long here.
LAYERS = {
    "conv3": (64, 128, (22, 27, 22)),
    "conv4": (128, 256, (11, 13, 11)),
    "conv5": (256, 256, (5, 6, 5)),
}
BACKENDS = [row.backend for row in dispatch.available("masked_conv3d", "cpu")]


def _make(layer: nn.Conv3d, name: str) -> tuple[Tensor, Tensor]:
    c_in, c_out, grid = LAYERS[name]
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    x = torch.randn(1, c_in, *grid, generator=random).requires_grad_()
    return x, torch.randn(1, c_out, *grid, generator=random)


def _step(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x.grad = None
    layer.zero_grad()
    y: Tensor = layer(x)
    y.backward(g)
    return y


def _describe(benchmark: BenchmarkFixture, name: str, density: float) -> None:
    benchmark.group = f"{name}, forward and backward"
    benchmark.extra_info.update(
        shape=LAYERS[name],
        density=density,
        device="cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_dense_conv3d(benchmark: BenchmarkFixture, name: str) -> None:
    layer = nn.Conv3d(LAYERS[name][0], LAYERS[name][1], 3, padding=1)
    x, g = _make(layer, name)
    _describe(benchmark, name, 1.0)
    y = benchmark.pedantic(  # type: ignore[no-untyped-call]
        _step, args=(layer, x, g), rounds=7, iterations=1, warmup_rounds=2
    )
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("density", [0.05, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_masked_conv3d(
    benchmark: BenchmarkFixture, name: str, backend: str, density: float
) -> None:
    layer = MaskedConv3d(LAYERS[name][0], LAYERS[name][1], 3, padding=1)
    layer.backend = backend
    x, g = _make(layer, name)
    mask = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(2)) < density
    layer.set_mask(mask)
    _describe(benchmark, name, density)
    y = benchmark.pedantic(  # type: ignore[no-untyped-call]
        _step, args=(layer, x, g), rounds=7, iterations=1, warmup_rounds=2
    )

    # The weights outside the mask are 0 by now, so the dense convolution is the answer.
    expected = functional.conv3d(x, layer.weight, layer.bias, padding=1)
    assert float((y - expected).detach().abs().max() / expected.detach().abs().max()) < 2e-5
    assert layer.weight.grad is not None
    assert not bool(layer.weight.grad[~mask].any())
