"""The CPU convolution in torch's machinery: operators, compiling, autograd, autocast, DDP."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from sparsekit import explain, masked_conv3d, prune, sparsify
from sparsekit.kernels.masked_conv3d import autograd
from sparsekit.nn import MaskedConv3d


def make(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_mask(*shape: int, seed: int = 3) -> Tensor:
    return make(*shape, seed=seed) > 0


def small_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv3d(4, 6, 3, stride=2, groups=2), nn.BatchNorm3d(6), nn.ReLU(),
        nn.Conv3d(6, 3, (1, 2, 3), dilation=2, padding=(0, 2, 2), bias=False),
    )  # fmt: skip
    sparsify(model)
    prune.apply_masks(model, prune.magnitude_masks(model, 0.6))
    for layer in model.modules():
        if isinstance(layer, MaskedConv3d):
            layer.backend = "cpu"
    return model


def step(model: Callable[..., Tensor], x: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Output and the gradients of x and the parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    found = torch.autograd.grad(y.float().square().sum(), [x, *parameters])
    return [y.detach(), *found]


def equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for result, exact in zip(found, wanted, strict=True):
        assert torch.equal(result, exact)


OPERATOR_CASES: dict[str, tuple[Any, ...]] = {
    "plain": ((2, 2, 5, 6, 7), (4, 2, 3, 3, 3), True, [1] * 3, [1] * 3, [1] * 3, 1, None),
    "no-bias": ((1, 2, 5, 6, 7), (4, 2, 1, 2, 3), False, [1] * 3, [0] * 3, [1] * 3, 1, None),
    "everything": (
        (3, 4, 8, 7, 9), (4, 2, 2, 3, 4), True, [2, 1, 3], [1, 2, 3], [3, 2, 1], 2, (3, 1, 4, 7, 4),
    ),
}  # fmt: skip


def operator_arguments(name: str) -> tuple[Any, ...]:
    x, weight, bias, stride, padding, dilation, groups, voxels = OPERATOR_CASES[name]
    return (
        make(*x).requires_grad_(), make(*weight, seed=2).requires_grad_(), some_mask(*weight),
        make(weight[0], seed=4).requires_grad_() if bias else None,
        stride, padding, dilation, groups, some_mask(*voxels) if voxels else None,
    )  # fmt: skip


@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_the_registered_operators(name: str) -> None:
    arguments = operator_arguments(name)
    results = torch.library.opcheck(autograd.masked_conv3d_op, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4
    x, weight, mask, _, *rest, voxels = arguments
    y = torch.ops.sparsekit.masked_conv3d(*arguments)
    plain = (torch.ones_like(y.detach()), x.detach(), weight.detach(), mask, voxels, *rest, "")
    for need_x in (True, False):
        results = torch.library.opcheck(autograd.masked_conv3d_backward_op, (*plain, need_x))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_the_operator_equals_the_eager_path(name: str) -> None:
    x, weight, mask, bias, stride, padding, dilation, groups, voxels = operator_arguments(name)
    leaves = [t for t in (x, weight, bias) if t is not None]
    y = torch.ops.sparsekit.masked_conv3d(
        x, weight, mask, bias, stride, padding, dilation, groups, voxels
    )
    same = masked_conv3d(
        x, weight, mask, bias, stride=stride, padding=padding, dilation=dilation, groups=groups,
        voxel_mask=voxels, backend="cpu",
    )  # fmt: skip
    out = make(*y.shape, seed=9)
    equal(
        [y, *torch.autograd.grad(y, leaves, out)], [same, *torch.autograd.grad(same, leaves, out)]
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = small_model()
    x = make(2, 2, 8, 9, 10)
    parameters = list(model.parameters())
    wanted = step(model, x, parameters)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    ran: list[str] = []
    original = autograd._forward

    def watched(*args: Any) -> Any:
        ran.append("kernel")
        return original(*args)

    monkeypatch.setattr(autograd, "_forward", watched)
    for _ in range(2):
        found = step(compiled, x, parameters)
        for result, exact in zip(found, wanted, strict=True):
            torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4)
    # The same kernels, also where torch compiles what lies between them.
    assert len(ran) == 6
    # Another mask is seen by what has been compiled.
    prune.apply_masks(model, prune.magnitude_masks(model, 0.8))
    wanted = step(model, x, parameters)
    for result, exact in zip(step(compiled, x, parameters), wanted, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_reference(dtype: torch.dtype) -> None:
    module = MaskedConv3d(2, 4, 3)
    module.set_mask(some_mask(*module.weight.shape))
    x = make(1, 2, 6, 6, 6)
    exact = module(x)
    with torch.autocast("cpu", dtype):
        y = module(x)
    assert y.dtype == dtype
    assert float((y.float() - exact).detach().abs().max()) < 0.05
    y.float().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.dtype == torch.float32
    assert not bool(module.weight.grad[~module.mask].any())
    assert "torch.autocast is on" in str(explain())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    x, weight = make(1, 2, 5, 5, 5).to(dtype), make(3, 2, 3, 3, 3).to(dtype)
    mask = some_mask(*weight.shape)
    y = masked_conv3d(x, weight, mask)
    assert torch.equal(y, masked_conv3d(x, weight, mask, backend="reference"))
    assert "the CPU kernels are for float32" in str(explain())
    with pytest.raises(RuntimeError, match="the CPU kernels are for float32"):
        masked_conv3d(x, weight, mask, backend="cpu")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    model = small_model()
    x = make(2, 2, 8, 9, 10)
    wanted = step(model, x, list(model.parameters()))
    x = x.detach().requires_grad_()
    y: Any = checkpoint(model, x, use_reentrant=reentrant)
    y.square().sum().backward()
    assert x.grad is not None
    equal([y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)], wanted)


def test_saved_tensors_may_wait_elsewhere() -> None:
    model = small_model()
    x = make(2, 2, 8, 9, 10)
    wanted = step(model, x, list(model.parameters()))
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        equal(step(model, x, list(model.parameters())), wanted)
    assert packed


def test_a_second_derivative_is_refused() -> None:
    x = make(1, 2, 5, 5, 5).requires_grad_()
    weight = make(3, 2, 3, 3, 3).requires_grad_()
    mask = some_mask(*weight.shape)
    y = masked_conv3d(x, weight, mask, backend="cpu")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
    y = torch.ops.sparsekit.masked_conv3d(x, weight, mask, None, [1] * 3, [0] * 3, [1] * 3, 1, None)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_forward_mode_derivative_is_refused() -> None:
    module = MaskedConv3d(2, 4, 3)
    module.backend = "cpu"
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(make(1, 2, 5, 5, 5), make(1, 2, 5, 5, 5))
        with pytest.raises(RuntimeError, match="forward mode AD"):
            module(x)


def test_a_graph_can_be_used_twice_if_it_is_kept() -> None:
    model = small_model()
    x = make(2, 2, 8, 9, 10).requires_grad_()
    leaves = [x, *model.parameters()]
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    equal(list(first), list(second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_add_up_over_two_uses_of_a_layer() -> None:
    module = MaskedConv3d(2, 2, 3, padding=1)
    module.set_mask(some_mask(*module.weight.shape))
    x = make(1, 2, 5, 6, 7)
    module(module(x)).square().sum().backward()
    double = module.weight.detach().double().requires_grad_()
    y = x.double()
    for _ in range(2):
        y = masked_conv3d(y, double, module.mask, module.bias.detach().double(), padding=1)  # type: ignore[union-attr]
    y.square().sum().backward()
    assert module.weight.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(module.weight.grad.double(), double.grad, rtol=1e-4, atol=1e-4)


def test_a_changed_weight_before_the_backward_pass_is_refused() -> None:
    module = MaskedConv3d(2, 2, 3)
    y = module(make(1, 2, 5, 6, 7))
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_large_outputs_may_be_changed_in_place() -> None:
    """What comes from the pool of buffers is no view to torch."""
    module = MaskedConv3d(2, 8, 3, padding=1)
    x = make(1, 2, 32, 32, 32).requires_grad_()
    y = module(x)
    assert y.numel() * 4 >= 1 << 19
    assert not y._is_view()
    y.relu_().sum().backward()
    double = x.detach().double().requires_grad_()
    wanted = nn.functional.conv3d(double, module.weight.double(), module.bias.double(), padding=1)  # type: ignore[union-attr]
    wanted.relu().sum().backward()
    assert x.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(x.grad.double(), double.grad, rtol=1e-4, atol=1e-4)
    x.grad.zero_()


def test_transforms_take_the_reference() -> None:
    module = MaskedConv3d(2, 3, 3)
    module.set_mask(some_mask(*module.weight.shape))
    x = make(4, 2, 5, 5, 5)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(given: dict[str, Tensor], scan: Tensor) -> Tensor:
        y: Tensor = functional_call(module, given, (scan,))
        return y.square().sum()

    found = grad(loss)(parameters, x)
    wanted = step(module, x, list(module.parameters()))
    torch.testing.assert_close(found["weight"], wanted[2], rtol=1e-4, atol=1e-4)
    assert "torch.func" in str(explain())
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["weight"].sum(0), wanted[2], rtol=1e-4, atol=1e-4)


def test_functional_calls_take_the_tensors_that_they_are_given() -> None:
    module = MaskedConv3d(2, 3, 3)
    x = make(1, 2, 5, 5, 5)
    weight = make(*module.weight.shape, seed=8).requires_grad_()
    mask = some_mask(*weight.shape)
    y: Any = functional_call(module, {"weight": weight, "weight_mask": mask}, (x,))
    torch.testing.assert_close(
        y, nn.functional.conv3d(x, torch.where(mask, weight, 0.0), module.bias)
    )
    y.sum().backward()
    assert weight.grad is not None
    assert not bool(weight.grad[~mask].any())


class Tagged(Tensor):
    """A subclass may stand for values that are elsewhere."""


@pytest.mark.parametrize("which", ["x", "weight"])
def test_subclasses_take_the_reference(which: str) -> None:
    x, weight = make(1, 2, 5, 5, 5), make(3, 2, 3, 3, 3)
    mask = some_mask(*weight.shape)
    expected = masked_conv3d(x, weight, mask, backend="reference")
    if which == "x":
        x = x.as_subclass(Tagged)
    else:
        weight = weight.as_subclass(Tagged)
    assert type(masked_conv3d(x, weight, mask)) is Tagged
    assert torch.equal(masked_conv3d(x, weight, mask).as_subclass(Tensor), expected)
    with pytest.raises(RuntimeError, match="subclasses"):
        masked_conv3d(x, weight, mask, backend="cpu")


def test_defaults_of_device_and_dtype_do_not_matter() -> None:
    model = small_model()
    x = make(2, 2, 8, 9, 10)
    wanted = step(model, x, list(model.parameters()))
    with torch.device("meta"):
        equal(step(model, x, list(model.parameters())), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        equal(step(model, x, list(model.parameters())), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_torch_s_own_samples_of_conv3d(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_TEST_WITH_SLOW", raising=False)
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.conv3d")
    samples = list(info.sample_inputs("cpu", torch.float32, requires_grad=True))
    assert len(samples) >= 5
    taken = 0
    for sample in samples:
        x, (weight, *rest) = sample.input, sample.args
        options = dict(sample.kwargs)
        bias = rest[0] if rest else options.pop("bias", None)
        names = ("stride", "padding", "dilation", "groups")
        options.update(zip(names, rest[1:], strict=False))
        leaves = [t for t in (x, weight, bias) if t is not None]
        mask = torch.ones_like(weight, dtype=torch.bool)
        y = masked_conv3d(x, weight, mask, bias, **options)
        wanted = nn.functional.conv3d(x, weight, bias, **options)
        torch.testing.assert_close(y, wanted)
        g = make(*y.shape)
        for found, exact in zip(
            torch.autograd.grad(y, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True
        ):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        if x.numel():
            taken += 1
            same = masked_conv3d(x, weight, mask, bias, backend="cpu", **options)
            torch.testing.assert_close(same, wanted)
    assert taken >= 5
