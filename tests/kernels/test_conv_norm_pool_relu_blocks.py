"""Blocks of a network: when they are fused, and what they leave behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsekit import flops, masked_conv3d, prune, sparsify
from sparsekit.kernels import buffers
from sparsekit.models import BrainAgeCNN
from sparsekit.nn import MaskedConv3d, can_fuse, fused_block
from sparsekit.ops import conv_norm_pool_relu
from tests.kernels.convolutions import Compare, make_mask

OP = "conv_norm_pool_relu"
EPS = 1e-5
LEARNING_RATE = 1e-3
THREE, ONES, TWOS = (3, 3, 3), (1, 1, 1), (2, 2, 2)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block() -> nn.Module:
    torch.manual_seed(0)
    model = sparsify(BrainAgeCNN((16, 18, 20), width=0.2, blocks=2))
    prune.apply_masks(model, prune.magnitude_masks(model, 0.6))
    return model


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(seen),
    "forward-kwargs": lambda m, seen: m.register_forward_hook(seen, with_kwargs=True),
    "pre": lambda m, seen: m.register_forward_pre_hook(seen),
    "backward": lambda m, seen: m.register_full_backward_hook(seen),
    "backward-pre": lambda m, seen: m.register_full_backward_pre_hook(seen),
    "global": lambda m, seen: nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen() if module is m else None
    ),
    "global-backward": lambda m, seen: nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen() if module is m else None
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_on_the_convolution_sees_it(name: str) -> None:
    model: Any = block()
    x = normal(1, 1, 16, 18, 20).requires_grad_()
    expected = model(x)
    conv = model.blocks[1].conv
    assert can_fuse(conv, normal(1, conv.in_channels, 8, 9, 10))
    calls: list[int] = []
    handle = HOOKS[name](conv, lambda *_: calls.append(1))
    try:
        y = model(x)
        y.sum().backward()
    finally:
        handle.remove()
    assert len(calls) == 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert can_fuse(conv, normal(1, conv.in_channels, 8, 9, 10))


def test_a_replaced_forward_is_called() -> None:
    model: Any = block()
    conv, calls = model.blocks[1].conv, []
    original = conv.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(x.shape)
        y: Tensor = original(x)
        return y

    conv.forward = forward
    model(normal(1, 1, 16, 18, 20))
    assert len(calls) == 1


def test_flops_of_a_model_with_fused_blocks_list_every_layer() -> None:
    shape = (1, 1, 16, 18, 20)
    dense = flops.count(BrainAgeCNN((16, 18, 20), width=0.2, blocks=2), shape)
    sparse = flops.count(block(), shape)
    assert list(sparse.by_layer) == list(dense.by_layer)
    assert sparse.dense_train_step == dense.train_step
    assert 0 < sparse.train_step < dense.train_step


def test_a_fused_block_ties_new_parameters_to_their_mask() -> None:
    """As the layer's own call does, which the fused block goes around."""
    conv = MaskedConv3d(2, 4, 3, padding=1)
    mask = make_mask(tuple(conv.weight.shape), "half")
    conv.set_mask(mask)
    conv.load_state_dict({n: t.clone() for n, t in conv.state_dict().items()}, assign=True)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x = normal(1, 2, 6, 6, 6)
    fused_block(conv, x).sum().backward()
    with torch.no_grad():
        conv.weight.fill_(1.0)
    optimizer.step()
    assert not bool(conv.weight[~mask].any())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    model = block()
    x = normal(1, 1, 16, 18, 20).requires_grad_()
    wanted = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    y: Any = checkpoint(model, x, use_reentrant=reentrant)
    y.sum().backward()
    for parameter, exact_grad in zip(model.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, exact_grad)


def test_a_graph_can_be_used_twice_if_it_is_kept() -> None:
    model = block()
    loss = model(normal(1, 1, 16, 18, 20)).sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(model.parameters()))


def test_validation_in_inference_mode_before_training() -> None:
    model = block()
    x = normal(1, 1, 16, 18, 20)
    with torch.inference_mode():
        first = model(x)
    y = model(x)
    y.sum().backward()
    assert torch.equal(y.detach(), first)
    assert all(p.grad is not None for p in model.parameters())


def test_a_second_derivative_is_refused() -> None:
    x = normal(1, 2, 6, 6, 6).requires_grad_()
    weight = normal(3, 2, 3, 3, 3)
    mask = make_mask(tuple(weight.shape), "half")
    y = conv_norm_pool_relu(x, weight, mask, backend="cpu")
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def reference_step(
    model: BrainAgeCNN, x: Tensor, age: Tensor, masks: dict[str, Tensor], lr: float
) -> None:
    """One SGD step with torch's layers only, in the dtype of the model."""
    y = x
    stage: Any
    for stage in model.blocks:
        y = functional.conv3d(y, stage.conv.weight, stage.conv.bias, padding=1)
        y = functional.relu(functional.max_pool3d(functional.instance_norm(y, eps=EPS), 2))
    y = functional.relu(functional.conv3d(y, model.neck.weight, model.neck.bias))
    y = functional.conv3d(y.mean((2, 3, 4), keepdim=True), model.out.weight, model.out.bias)
    loss = (y.flatten() - age).square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
            parameter.sub_(lr * gradient)
            if name in masks:
                parameter.mul_(masks[name])


def test_twenty_steps_of_training_stay_near_float64(compare: Compare) -> None:
    torch.manual_seed(0)
    model = BrainAgeCNN((22, 25, 23), width=0.25, blocks=3, last_norm=False)
    masks = prune.magnitude_masks(model, 0.8, scope="layer")
    sparsify(model, masks)
    exact_model = BrainAgeCNN((22, 25, 23), width=0.25, blocks=3, last_norm=False).double()
    own = {n: t.clone() for n, t in model.state_dict().items() if not n.endswith("_mask")}
    exact_model.load_state_dict(own)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for i in range(20):
        x, age = normal(2, 1, 22, 25, 23, seed=i), 60 + 10 * normal(2, seed=100 + i)
        optimizer.zero_grad()
        (model(x) - age).square().mean().backward()
        optimizer.step()
        reference_step(exact_model, x.double(), age.double(), masks, LEARNING_RATE)
        for name, mask in masks.items():
            assert not bool(model.get_parameter(name)[~mask].any())
    for part in ("weight", "bias"):
        names = [n for n, _ in model.named_parameters() if n.endswith(part)]
        found = torch.cat([model.get_parameter(n).detach().flatten() for n in names])
        wanted = torch.cat([exact_model.get_parameter(n).detach().flatten() for n in names])
        begin = torch.cat([own[n].double().flatten() for n in names])
        # A test of training must train.
        assert float((wanted - begin).abs().max()) > 1e-2
        compare(OP, "training", found, wanted.numpy())


def test_training_takes_no_more_memory_step_after_step() -> None:
    model = sparsify(BrainAgeCNN((46, 40, 42), width=0.5, blocks=3))
    prune.apply_masks(model, prune.magnitude_masks(model, 0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x = normal(1, 1, 46, 40, 42)
    buffers.release()
    lent, _ = buffers.held_bytes()

    def step() -> None:
        loss = model(x).sum()
        needed, _ = buffers.held_bytes()
        assert needed > lent
        optimizer.zero_grad()
        loss.backward()
        # While the loss lives on, what the backward pass needed has come back.
        assert buffers.held_bytes()[0] < needed
        optimizer.step()

    for _ in range(3):
        step()
    optimizer.zero_grad()
    after = buffers.held_bytes()
    for _ in range(30):
        step()
    optimizer.zero_grad()
    assert buffers.held_bytes() == after
    assert after[0] == lent
    buffers.release()
    assert buffers.held_bytes()[1] < after[1]


def test_the_block_is_the_layers_one_after_the_other() -> None:
    """Also where only the inputs of the single-channel kernels need no gradient."""
    weight, bias = normal(4, 1, 3, 3, 3), normal(4)
    mask = make_mask(tuple(weight.shape), "half")
    x = normal(2, 1, 8, 9, 10)
    fused = conv_norm_pool_relu(x, weight, mask, bias, padding=1, backend="cpu")
    with_gradient = conv_norm_pool_relu(
        x.clone().requires_grad_(), weight, mask, bias, padding=1, backend="cpu"
    )
    z = masked_conv3d(x, weight, mask, bias, padding=1)
    y = functional.relu(functional.max_pool3d(functional.instance_norm(z, eps=EPS), 2))
    torch.testing.assert_close(fused, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(with_gradient.detach(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("op", [masked_conv3d, conv_norm_pool_relu])
def test_a_mask_that_changed_meanwhile_is_refused(op: Any, channels: int) -> None:
    """By the block and by the plain convolution alike."""
    weight = torch.ones(4, channels, 3, 3, 3, requires_grad=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    y = op(torch.ones(1, channels, 6, 6, 6), weight, mask, padding=1, backend="cpu")
    mask[0, 0] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("op", [masked_conv3d, conv_norm_pool_relu])
def test_training_with_a_mask_made_in_inference_mode(op: Any, channels: int) -> None:
    with torch.inference_mode():
        mask = torch.ones(4, channels, 3, 3, 3, dtype=torch.bool)
    weight = torch.ones(4, channels, 3, 3, 3, requires_grad=True)
    x = torch.arange(216.0 * channels).reshape(1, channels, 6, 6, 6).sin()
    found = torch.autograd.grad(op(x, weight, mask, padding=1, backend="cpu").sum(), weight)
    known = torch.autograd.grad(
        op(x, weight, mask.clone(), padding=1, backend="reference").sum(), weight
    )
    torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-2)
