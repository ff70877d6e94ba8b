"""Plans never outlive their masks, and threads and processes change no bit."""

import copy
import gc
import hashlib
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsekit import masked_conv3d, prune, sparsify
from sparsekit.kernels.masked_conv3d import plan as plans
from sparsekit.kernels.masked_conv3d import plan_cache
from sparsekit.kernels.masked_conv3d.plan_cache import PlanCache
from sparsekit.masks import masks_of
from sparsekit.nn import MaskedConv3d
from sparsekit.ops import conv_norm_pool_relu
from tests.kernels.processes import in_forked_child

# Enough work for two threads, and several tiles.
LARGE = (2, 6, 10, 30, 31)


def make(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_mask(*shape: int, seed: int = 3) -> Tensor:
    return make(*shape, seed=seed) > 0


def layer(c_in: int = 6, c_out: int = 8) -> MaskedConv3d:
    made = MaskedConv3d(c_in, c_out, 3, padding=1)
    made.backend = "cpu"
    made.set_mask(some_mask(*made.weight.shape))
    return made


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and the gradients of x and of all parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    grad = make(*y.shape, seed=2)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


def digest(tensors: list[Tensor]) -> bytes:
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).digest()


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check_layer(module: MaskedConv3d, x: Tensor) -> None:
    """The output is that of the mask that the layer has now."""
    with torch.inference_mode():
        kept = torch.where(module.mask, module.weight, 0.0).double()
        bias = None if module.bias is None else module.bias.double()
        wanted = nn.functional.conv3d(x.double(), kept, bias, padding=1).float()
        torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)


CHANGES: dict[str, Callable[[MaskedConv3d, Tensor], object]] = {
    "set_mask": lambda m, new: m.set_mask(new),
    "in-place": lambda m, new: m.mask.copy_(new),
    "one-entry": lambda m, _: m.mask[0, 0].logical_not_(),
    "a-view": lambda m, _: m.mask[:2].flatten(1).logical_not_(),
    "detached": lambda m, new: m.mask.detach().copy_(new),
    "through-data": lambda m, new: m.mask.data.copy_(new),
    "through-numpy": lambda m, new: np.copyto(m.mask.numpy(), new.numpy()),
    "new-storage": lambda m, new: setattr(m.mask, "data", new),
    "new-buffer": lambda m, new: setattr(m, "weight_mask", new),
    "load": lambda m, new: m.load_state_dict(m.state_dict() | {"weight_mask": new}),
    "assign": lambda m, new: m.load_state_dict(m.state_dict() | {"weight_mask": new}, assign=True),
    "dense-checkpoint": lambda m, _: m.load_state_dict(nn.Conv3d(6, 8, 3).state_dict()),
    "apply_masks": lambda m, new: prune.apply_masks(m, {"weight": new}),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "in-inference-mode"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_mask_is_seen_at_once(name: str, inference: bool) -> None:
    module = layer()
    x = make(1, 6, 5, 6, 7)
    check_layer(module, x)
    first = before = module.mask.clone()
    values = module.weight.detach().clone()
    for seed in (21, 22):
        # Weights where the mask was, or will be, must not hide that the plan is old.
        with torch.no_grad():
            module.weight.copy_(values)
        with torch.inference_mode(inference):
            CHANGES[name](module, some_mask(*first.shape, seed=seed))
            with torch.no_grad():
                module.weight.copy_(values)
            check_layer(module, x)
        check_layer(module, x)
        assert name == "dense-checkpoint" or not torch.equal(module.mask, before)
        before = module.mask.clone()
    with torch.inference_mode(inference):
        module.set_mask(first)
    check_layer(module, x)


def test_a_mask_made_in_inference_mode_is_looked_at() -> None:
    """Such tensors do not count their changes."""
    with torch.inference_mode():
        module = layer()
    x = make(1, 6, 5, 6, 7)
    for seed in (4, 5):
        check_layer(module, x)
        with torch.inference_mode():
            module.mask.copy_(some_mask(*module.mask.shape, seed=seed))
        check_layer(module, x)
        with torch.inference_mode():
            check_layer(module, x)


def test_plans_are_kept_until_the_mask_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Tensor] = []
    original = plans.build

    def build(mask: Tensor, *rest: Any) -> Any:
        built.append(mask)
        return original(mask, *rest)

    monkeypatch.setattr("sparsekit.kernels.masked_conv3d.run.build", build)
    module, x = layer(), make(1, 6, 5, 6, 7)
    for _ in range(3):
        step(module, x)
    assert len(built) == 1
    module.mask.fill_(True)
    step(module, x)
    step(module, x)
    assert len(built) == 2
    with torch.inference_mode():
        module(x)
        module(x)
    assert len(built) == 2


def test_a_mask_changed_before_the_backward_pass_is_refused() -> None:
    module, x = layer(), make(1, 6, 5, 6, 7)
    y = module(x)
    module.set_mask(~module.mask)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_call_that_fails_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, weight, x = some_mask(8, 6, 3, 3, 3), make(8, 6, 3, 3, 3), make(*LARGE)
    for _ in range(2):
        masked_conv3d(x, weight, mask)

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("sparsekit.kernels.masked_conv3d.autograd._MaskedConv3d.apply", fail)
        patch.setattr("sparsekit.kernels.masked_conv3d.dense.functional.conv3d", fail)
        with pytest.raises(MemoryError):
            masked_conv3d(x, weight, mask)
    mask.logical_not_()
    y = masked_conv3d(x, weight, mask, backend="cpu")
    torch.testing.assert_close(
        y, masked_conv3d(x, weight, mask, backend="reference"), rtol=1e-4, atol=1e-4
    )


def test_plans_go_with_their_mask() -> None:
    mask, weight = some_mask(4, 2, 3, 3, 3), make(4, 2, 3, 3, 3)
    gc.collect()
    before = len(plan_cache._caches)
    masked_conv3d(make(1, 2, 5, 5, 5), weight, mask, backend="cpu")
    assert len(plan_cache._caches) == before + 1
    del mask
    gc.collect()
    assert len(plan_cache._caches) == before


def test_two_masks_at_one_address_are_two() -> None:
    """A new mask may stand where a freed one stood."""
    x, weight = make(1, 2, 5, 5, 5), make(4, 2, 3, 3, 3)
    for seed in range(20):
        mask = some_mask(4, 2, 3, 3, 3, seed=seed)
        y = masked_conv3d(x, weight, mask, backend="cpu")
        torch.testing.assert_close(y, masked_conv3d(x, weight, mask, backend="reference"))
        del mask


def round_trip(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": round_trip,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_give_the_same_bits_and_have_plans_of_their_own(name: str) -> None:
    module, x = layer(), make(*LARGE)
    expected = digest(step(module, x))
    copied = COPIES[name](module)
    assert digest(step(copied, x)) == expected
    assert isinstance(copied, MaskedConv3d)
    copied.set_mask(~copied.mask)
    check_layer(copied, x)
    assert digest(step(module, x)) == expected


def test_masks_that_were_used_load_as_tensors_only() -> None:
    module = layer()
    step(module, make(1, 6, 5, 6, 7))
    buffer = io.BytesIO()
    torch.save(masks_of(module), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["weight"], module.mask)


@pytest.mark.parametrize("stride", [1, 2])
def test_repeats_and_thread_counts(stride: int, threads: Callable[[int], None]) -> None:
    module, x = layer(), make(*LARGE)
    module.stride = (stride, stride, stride)
    results = []
    for count in (1, 1, 2, 2, 3, 3):
        threads(count)
        results.append([t.clone() for t in step(module, x)])
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert digest(first) == digest(second)
    for other in results[2:]:
        assert torch.equal(other[0], results[0][0])
        assert torch.equal(other[1], results[0][1])
        torch.testing.assert_close(other[2], results[0][2], rtol=1e-4, atol=1e-4)


def test_the_backward_pass_on_another_thread() -> None:
    module, x = layer(), make(*LARGE)
    expected = step(module, x)
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    grad = make(*y.shape, seed=2)
    thread = threading.Thread(target=y.backward, args=(grad,))
    thread.start()
    thread.join()
    assert leaf.grad is not None
    found = [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]
    # The new thread may count other threads of torch than this one.
    for result, wanted in zip(found, expected, strict=True):
        assert result is not None
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def at_once(work: Callable[[int], object]) -> list[Any]:
    """Results of four Python threads that interrupt one another often."""
    found: dict[int, Any] = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        own = [threading.Thread(target=lambda i=i: found.setdefault(i, work(i))) for i in range(4)]
        for thread in own:
            thread.start()
        for thread in own:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return [found[i] for i in range(4)]


def test_four_python_threads_at_once() -> None:
    module = layer()
    inputs = [make(1 + i % 2, 6, 10, 20 + i, 31, seed=i) for i in range(4)]
    expected = [digest(step(module, x)) for x in inputs]
    module.mask.logical_not_().logical_not_()  # nobody has a plan

    def work(i: int) -> list[bytes]:
        torch.set_num_threads(2)
        return [digest(step(module, inputs[i])) for _ in range(5)]

    for i, results in enumerate(at_once(work)):
        assert results == [expected[i]] * 5


def test_threads_that_push_out_one_anothers_plans() -> None:
    module = layer(2, 3)
    inputs = [make(1, 2, 3 + i, 4, 5, seed=i) for i in range(2 * PlanCache.MOST + 1)]
    expected = [module(x).detach() for x in inputs]

    def work(i: int) -> bool:
        numbers = [(i + 1) * k % len(inputs) for k in range(200)]
        return all(torch.equal(module(inputs[n]), expected[n]) for n in numbers)

    assert at_once(work) == [True] * 4


def test_threads_with_other_grids_on_one_single_channel_mask() -> None:
    mask, weight = some_mask(4, 1, 3, 3, 3), make(4, 1, 3, 3, 3)
    inputs = [make(1, 1, 4, 5, 20 * i + 6, seed=i) for i in range(4)]
    expected = [conv_norm_pool_relu(x, weight, mask, padding=1, backend="cpu") for x in inputs]

    def work(i: int) -> bool:
        calls = (
            conv_norm_pool_relu(inputs[i], weight, mask, padding=1, backend="cpu")
            for _ in range(200)
        )
        return all(torch.equal(y, expected[i]) for y in calls)

    assert at_once(work) == [True] * 4


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer(), make(*LARGE)
    expected = digest([module(x).detach()])
    # torch's own threads do not survive a fork; ours must do without them.
    threads(1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work() -> bytes:
        with torch.no_grad():
            answer = digest([module(x)])
            module.mask.logical_not_()
            check_layer(module, x)
        return answer + b"done"

    assert in_forked_child(work) == expected + b"done"


class Convolved(torch.utils.data.Dataset[Tensor]):
    """Gives what a masked convolution makes of random scans."""

    def __init__(self) -> None:
        self.layer = layer(2, 3)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            # Above the size from which memory comes from the pool of buffers.
            y: Tensor = self.layer(make(1, 2, 40, 40, 41, seed=index))[0]
        return y


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    data = Convolved()
    expected = [data[i] for i in range(3)]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=60
    )
    for found, wanted in zip(loader, expected, strict=True):
        assert torch.equal(found, wanted)


def test_sparsified_models_share_nothing_with_their_copies() -> None:
    model: Any = sparsify(nn.Sequential(nn.Conv3d(2, 3, 3), nn.Conv3d(3, 2, 1)))
    prune.apply_masks(model, prune.magnitude_masks(model, 0.5))
    x = make(1, 2, 5, 6, 7)
    expected = model(x).detach()
    other = copy.deepcopy(model)
    prune.apply_masks(other, prune.magnitude_masks(other, 0.9))
    other(x)
    assert torch.equal(model(x), expected)
