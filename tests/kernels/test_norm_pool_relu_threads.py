"""norm_pool_relu on several threads and in forked children."""

import hashlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsekit.ops import norm_pool_relu
from tests.kernels.processes import in_forked_child

LARGE = (2, 3, 40, 41, 42)


def make(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(
    run: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output of `run` and the gradient of x, for a fixed random gradient of the output."""
    x = x.detach().requires_grad_()
    y = run(x)
    grad_y = make(tuple(y.shape), seed=2) if grad_y is None else grad_y
    (grad_x,) = torch.autograd.grad(y, x, grad_y.to(y.dtype))
    return y.detach(), grad_x


def run_cpu(x: Tensor) -> Tensor:
    return norm_pool_relu(x, backend="cpu")


def test_the_number_of_threads_changes_no_bit(torch_threads: Callable[[int], None]) -> None:
    x = make(LARGE)
    results = []
    for threads in (1, 2, 5):
        torch_threads(threads)
        results.append(with_gradient(run_cpu, x))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


def test_several_python_threads_at_once(torch_threads: Callable[[int], None]) -> None:
    inputs = [make(LARGE, seed) for seed in range(4)]
    torch_threads(1)
    expected = [with_gradient(run_cpu, x) for x in inputs]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    # Threads take torch's number of threads from the main one at their first use of torch.
    torch_threads(2)

    def work(i: int) -> None:
        torch.set_num_threads(2)
        found[i] = with_gradient(run_cpu, inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (y, grad_x) in enumerate(expected):
        assert torch.equal(found[i][0], y)
        assert torch.equal(found[i][1], grad_x)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_starts_its_own_threads(
    torch_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's own threads and its autograd do not survive a fork: forward only, ours only.
    torch_threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = make(LARGE)

    def work() -> bytes:
        return hashlib.sha256(run_cpu(x).numpy().tobytes()).digest()

    expected = work()
    assert in_forked_child(work) == expected
