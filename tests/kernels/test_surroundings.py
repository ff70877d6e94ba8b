"""The kernels in odd surroundings: default dtypes and devices, threads, forks, modes of torch."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsekit import masked_conv3d, norm_pool_relu, prune, topk_mask
from sparsekit.errors import ArgumentTypeError, BackendError
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache

# Torch makes such views of conjugated complex numbers, and has no typed name for it.
_neg_view: Any = vars(torch)["_neg_view"]


def sample(density: float = 0.9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(1, 6, 10, 11, 9, generator=random)
    weight = torch.randn(8, 6, 3, 3, 3, generator=random)
    mask = torch.rand(weight.shape, generator=random) < density
    return x, weight, mask, torch.randn(8, generator=random)


# Nearly dense weights go in groups of output channels, sparse ones by lists.
@pytest.mark.parametrize("density", [0.1, 0.95])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(
    density: float, with_bias: bool, dtype: torch.dtype
) -> None:
    x, weight, mask, bias = sample(density)
    chosen = bias if with_bias else None
    wanted = masked_conv3d(x, weight, mask, chosen, backend="cpu")
    torch.set_default_dtype(dtype)
    try:
        found = masked_conv3d(x, weight, mask, chosen, backend="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


def in_a_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_default_device_does_not_matter() -> None:
    # A wrong address would end the process.
    code = """
    import torch
    from sparsekit import conv_norm_pool_relu, masked_conv3d, topk_mask
    torch.manual_seed(0)
    x, w = torch.randn(1, 1, 9, 10, 11), torch.randn(8, 1, 3, 3, 3)
    def run():
        mask = topk_mask([w], 120)[0]
        return (
            mask, masked_conv3d(x, w, mask, backend="cpu"),
            masked_conv3d(x, w, torch.ones_like(mask, device="cpu"), backend="cpu"),
            conv_norm_pool_relu(x, w, mask, backend="cpu"),
        )
    wanted = run()
    with torch.device("meta"):
        found = run()
    print(all(torch.equal(a, b) for a, b in zip(wanted, found)))
    """
    assert in_a_process(code) == "True"


def test_the_first_call_may_be_compiled() -> None:
    program = """
import torch
from sparsekit import masked_conv3d
x, weight = torch.randn(1, 2, 5, 5, 5), torch.randn(3, 2, 3, 3, 3)
mask = torch.rand(weight.shape) < 0.3
compiled = torch.compile(
    lambda x: masked_conv3d(x, weight, mask), backend="eager", fullgraph=True
)
right = masked_conv3d(x, weight, mask, backend="reference")
torch.testing.assert_close(compiled(x), right)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_first_calls_may_come_from_several_threads() -> None:
    code = """
    import threading
    import torch
    import sparsekit
    x, w = torch.randn(1, 6, 9, 9, 9), torch.randn(9, 6, 3, 3, 3)
    mask = w > 1
    calls = [
        lambda: sparsekit.masked_conv3d(x, w, mask),
        lambda: sparsekit.norm_pool_relu(x),
        lambda: sparsekit.topk_mask([w], 9),
        lambda: sparsekit.encode({"w": torch.ones(2**18) * (torch.arange(2**18) % 9 == 0)}),
    ]
    start, failed = threading.Barrier(len(calls)), []
    def run(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            failed.append(repr(error))
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for call in calls:
        call()
    print(failed)
    """
    assert in_a_process(code) == "[]"


def test_a_fork_waits_for_a_compilation_in_another_thread() -> None:
    code = """
    import os, signal, threading, time
    from sparsekit.kernels import compiled
    from sparsekit.kernels.bitmap import passes
    compiled._DiskCache.load_overload = lambda *_: None
    compiled._DiskCache.save_overload = lambda *_: None
    inside = threading.Event()
    compile_ = compiled.Kernel._compile
    def slowly(self):
        inside.set()
        time.sleep(0.3)
        return compile_(self)
    compiled.Kernel._compile = slowly
    thread = threading.Thread(target=lambda: passes.count.address)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        passes.pack.address
        os._exit(0)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (done := os.waitpid(child, os.WNOHANG)[0]):
        time.sleep(0.05)
    if not done:
        os.kill(child, signal.SIGKILL)
    thread.join()
    print(bool(done))
    """
    assert in_a_process(code) == "True"


@pytest.mark.parametrize("new", [40, 12])
def test_a_mask_of_another_size_is_another_mask(new: int) -> None:
    _, weight, _, _ = sample()
    mask = torch.ones_like(weight, dtype=torch.bool)
    before = PlanCache.of(mask)
    mask.data = torch.zeros(new, 6, 3, 3, 3, dtype=torch.bool)
    after = PlanCache.of(mask)
    assert after is not before
    assert after.mask.shape == mask.shape
    assert after.density == 0.0


@pytest.mark.parametrize("op", ["conv", "norm"])
def test_recorded_operations_are_those_that_ran(op: str) -> None:
    x, weight, mask, bias = sample()

    def function(x: Any) -> Any:
        return masked_conv3d(x, weight, mask, bias) if op == "conv" else norm_pool_relu(x)

    recorded = make_fx(function)(x)
    other = torch.flip(x, (0, 2)) * 2
    assert torch.allclose(recorded(other), function(other), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="traced"):
        make_fx(lambda x: masked_conv3d(x, weight, mask, backend="cpu"))(x)


def test_fake_tensors_are_not_read() -> None:
    x, weight, mask, _ = sample()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert masked_conv3d(x, weight, mask).shape == (1, 8, 8, 9, 7)
        with pytest.raises(ArgumentTypeError, match="no values that can be read now"):
            topk_mask([weight], 5)
        with pytest.raises(ArgumentTypeError, match="no values that can be read now"):
            prune.magnitude_masks({"w": torch.ones(4, 4)}, 0.5)


def test_selection_inside_of_transformed_code_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="no values that can be read now"):
        torch.func.vmap(lambda w: topk_mask([w], 2)[0])(torch.randn(3, 9))


def test_numbers_that_wait_for_their_sign_have_it() -> None:
    x, weight, mask, _ = sample()
    turned = _neg_view(-bias_like(weight))
    assert turned.is_neg()
    wanted = masked_conv3d(x, weight, mask, bias_like(weight), backend="reference")
    found = masked_conv3d(x, weight, mask, turned)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    negative = _neg_view(weight)
    assert torch.equal(topk_mask([negative], 50)[0], topk_mask([-weight], 50)[0])


def bias_like(weight: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-3, 3, weight.shape[0])
