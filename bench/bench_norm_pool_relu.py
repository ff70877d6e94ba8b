"""Instance norm, max pooling and ReLU, forward and gradient: the fused op beside torch's layers.

Run with ``pytest bench/bench_norm_pool_relu.py``. Float32, contiguous, the map behind the first
convolution of `BrainAgeCNN((46, 55, 46), width=0.25)` for a batch of 4.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from sparsekit.kernels import implementations
from sparsekit.ops import norm_pool_relu

SHAPE = (4, 8, 46, 55, 46)
BACKENDS = [row.backend for row in implementations.available("norm_pool_relu", "cpu")]


class _Op(nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return norm_pool_relu(x, backend=self.backend)


def _layers() -> nn.Module:
    return nn.Sequential(nn.InstanceNorm3d(SHAPE[1]), nn.MaxPool3d(2), nn.ReLU())


def _make() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=random).requires_grad_()
    return x, torch.randn(*SHAPE[:2], *(size // 2 for size in SHAPE[2:]), generator=random)


def _step(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x.grad = None
    y: Tensor = module(x)
    y.backward(g)
    return y


@pytest.mark.parametrize("name", ["torch.nn", *BACKENDS])
def test_norm_pool_relu(benchmark: BenchmarkFixture, name: str) -> None:
    module = _layers() if name == "torch.nn" else _Op(name)
    x, g = _make()
    benchmark.group = "norm_pool_relu, forward and backward"
    benchmark.extra_info.update(
        shape=SHAPE, device="cpu", threads=torch.get_num_threads(), torch=torch.__version__
    )
    y = benchmark.pedantic(  # type: ignore[no-untyped-call]
        _step, args=(module, x, g), rounds=7, iterations=1, warmup_rounds=2
    )

    exact_x = x.detach().double().requires_grad_()
    exact = _step(_layers(), exact_x, g.double())
    assert x.grad is not None
    assert exact_x.grad is not None
    for got, want in ((y.detach(), exact.detach()), (x.grad, exact_x.grad)):
        assert float((got - want).abs().max() / want.abs().max()) < 2e-6
