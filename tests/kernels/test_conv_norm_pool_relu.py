"""The fused block for several input channels against torch's layers in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sparsekit import flops, masked_conv3d, prune, sparsify
from sparsekit.kernels import buffers
from sparsekit.kernels.conv_norm_pool_relu import run as block_run
from sparsekit.kernels.masked_conv3d import geometry
from sparsekit.kernels.masked_conv3d import run as conv_run
from sparsekit.models import BrainAgeCNN
from sparsekit.nn import MaskedConv3d, can_fuse, fused_block
from sparsekit.ops import conv_norm_pool_relu
from tests.kernels.convolutions import DENSITIES, Case, Compare, make_mask

OP = "conv_norm_pool_relu"
EPS = 1e-5
LEARNING_RATE = 1e-3
THREE, ONES, TWOS = (3, 3, 3), (1, 1, 1), (2, 2, 2)

CASES = [
    pytest.param(Case(2, 3, 4, (6, 8, 10), padding=ONES), id="even"),
    pytest.param(Case(3, 2, 5, (5, 7, 11), padding=ONES), id="prime-batch-3"),
    pytest.param(Case(1, 2, 3, TWOS, padding=ONES), id="one-window"),
    pytest.param(Case(1, 2, 3, (3, 2, 3), padding=ONES), id="one-window-odd"),
    pytest.param(Case(2, 3, 4, (9, 8, 11), padding=ONES, stride=TWOS), id="strided"),
    pytest.param(Case(1, 3, 4, (9, 8, 17), THREE, (1, 2, 3), (2, 0, 1)), id="stride-uneven"),
    pytest.param(Case(2, 4, 6, (5, 6, 7), padding=ONES, groups=2), id="groups"),
    pytest.param(Case(1, 2, 3, (7, 8, 9), THREE, ONES, (2, 1, 3), (2, 1, 3)), id="dilated"),
    pytest.param(Case(2, 4, 3, (4, 5, 6), ONES), id="pointwise"),
    pytest.param(Case(1, 2, 3, (2, 3, 2), TWOS, padding=(3, 2, 4)), id="padding-beyond-reach"),
    pytest.param(Case(1, 2, 3, (5, 6, 70), padding=ONES), id="long-rows"),
    pytest.param(Case(1, 2, 3, (4, 30, 33), padding=ONES), id="several-tiles"),
    pytest.param(Case(1, 2, 3, (31, 2, 3), padding=ONES), id="deep"),
    pytest.param(Case(1, 1, 4, (6, 7, 8), padding=ONES), id="one-channel-in"),
]  # fmt: skip


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torch_layers(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, case: Case
) -> Tensor:
    kept = torch.where(mask, weight, 0.0)
    z = functional.conv3d(x, kept, bias, **case.options)
    return functional.relu(functional.max_pool3d(functional.instance_norm(z, eps=EPS), 2))


def is_clear(x: Tensor, weight: Tensor, mask: Tensor, case: Case) -> bool:
    """Whether rounding decides nothing: no near-ties in a window, nothing near the ReLU's edge."""
    z = functional.conv3d(x.double(), torch.where(mask, weight, 0.0).double(), **case.options)
    z = functional.instance_norm(z, eps=EPS)
    parts = z[..., : z.shape[2] // 2 * 2, : z.shape[3] // 2 * 2, : z.shape[4] // 2 * 2]
    windows = parts.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(-3)
    top = windows.topk(2, dim=-1).values
    alive = mask.flatten(1).any(1)
    gaps = (top[..., 0] - top[..., 1])[:, alive]
    edges = top[..., 0].abs()[:, alive]
    # What only padding reaches is equal to the last bit, for everybody.
    return bool(((gaps == 0) | (gaps > 2e-5)).all()) and bool((edges > 2e-5).all())


def operands(case: Case, density: str) -> tuple[list[Tensor], Tensor, Tensor]:
    mask = make_mask((case.c_out, case.c_in // case.groups, *case.kernel), density)
    for seed in range(0, 400, 4):
        x = normal(case.batch, case.c_in, *case.grid, seed=seed)
        weight = normal(*mask.shape, seed=seed + 1)
        if is_clear(x, weight, mask, case):
            break
    else:
        raise AssertionError("no data without near-ties")
    bias = normal(case.c_out, seed=seed + 2)
    d, h, w = case.out
    return [x, weight, bias], mask, normal(case.batch, case.c_out, d // 2, h // 2, w // 2, seed=9)


def run(leaves: list[Tensor], mask: Tensor, grad: Tensor, case: Case) -> list[Tensor]:
    own = [t.detach().requires_grad_() for t in leaves]
    y = conv_norm_pool_relu(own[0], own[1], mask, own[2], backend="cpu", eps=EPS, **case.options)
    return [y.detach(), *torch.autograd.grad(y, own, grad)]


def exact(leaves: list[Tensor], mask: Tensor, grad: Tensor, case: Case) -> list[Tensor]:
    """Output, gradients of x and weight, and the latter as if nothing were pruned."""
    # Without the bias, which the norm takes away but for rounding.
    x = leaves[0].detach().double().requires_grad_()
    kept = torch.where(mask, leaves[1], 0.0).detach().double().requires_grad_()
    y = torch_layers(x, kept, torch.ones_like(mask), None, case)
    dx, dw = torch.autograd.grad(y, [x, kept], grad.double())
    return [y.detach(), dx, torch.where(mask, dw, 0.0), dw]


def check(
    compare: Compare, leaves: list[Tensor], mask: Tensor, grad: Tensor, case: Case
) -> list[Tensor]:
    found, wanted = run(leaves, mask, grad, case), exact(leaves, mask, grad, case)
    compare(OP, "forward", found[0], wanted[0].numpy())
    compare(OP, "input", found[1], wanted[1].numpy())
    # A filter of one weight has no gradient, since the norm takes its size away: what cancels
    # there is as large as the gradients beside it.
    scale = wanted[3].abs().max().view(1)
    both = (torch.cat([t.flatten(), scale.to(t.dtype)]) for t in found[2:3] + wanted[2:3])
    compare(OP, "weight", next(both), next(both).numpy())
    assert not bool(found[2][~mask].any())
    # The norm takes the bias away.
    assert not bool(found[3].any())
    return found


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: Case, density: str, compare: Compare) -> None:
    leaves, mask, grad = operands(case, density)
    check(compare, leaves, mask, grad, case)


# What is decided by size, forced.
MODES: dict[str, dict[str, int]] = {
    "stream": {"_STREAM_BYTES": 0},
    "prefetch": {"_PREFETCH_BYTES": 0},
    "threads": {"_WORK_PER_THREAD": 0, "_BYTES_PER_THREAD": 0},
    "few-planes-at-once": {"BLOCK_GRADIENT_BYTES": 1},
    "one-channel-blocks": {"_FIRST_CACHE_BYTES": 1, "_SECOND_CACHE_BYTES": 1},
    "some-planes-at-once": {"BLOCK_GRADIENT_BYTES": 1 << 14},
}
MODES["all"] = {name: value for mode in MODES.values() for name, value in mode.items()}
MODES["all-of-few-planes"] = MODES["all"] | MODES["few-planes-at-once"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_every_way_through_the_kernels(
    case: Case, mode: str, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in MODES[mode].items():
        owners = [module for module in (block_run, conv_run, geometry) if hasattr(module, name)]
        assert owners
        for owner in owners:
            monkeypatch.setattr(owner, name, value)
    leaves, mask, grad = operands(case, "half")
    if mode == "few-planes-at-once" and case.stride == ONES:
        shape = conv_run.shape_of(
            leaves[0], leaves[1], case.stride, case.padding, case.dilation, case.groups
        )
        assert block_run.plan_of(mask.clone(), shape).geometry.resident or case.out[0] <= 8
    check(compare, leaves, mask, grad, case)


def test_of_equal_voxels_the_first_takes_the_gradient(compare: Compare) -> None:
    """Sums of small integers are exact, so that ties are ties in float32 as well."""
    case = Case(2, 2, 6, (8, 9, 21), padding=ONES)
    random = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (2, 2, 8, 9, 21), generator=random).float()
    weight = torch.randint(-1, 2, (6, 2, 3, 3, 3), generator=random).float()
    mask = make_mask(tuple(weight.shape), "half")
    z = functional.conv3d(x, torch.where(mask, weight, 0.0), padding=1)
    windows = z[..., :8, :20].unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).flatten(-3)
    top = windows.topk(2).values
    assert float((top[..., 0] == top[..., 1]).float().mean()) > 0.1
    grad = normal(2, 6, 4, 4, 10, seed=4)
    check(compare, [x, weight, torch.zeros(6)], mask, grad, case)


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(8))
def test_ties_of_two_voxels(first: int, second: int) -> None:
    x = torch.zeros(1, 2, 4, 2, 2)
    x[0, 0, :2].view(-1)[[first, second]] = 1.0
    x.requires_grad_()
    weight = torch.zeros(1, 2, 1, 1, 1)
    weight[0, 0] = 1.0
    mask = torch.ones_like(weight, dtype=torch.bool)
    y = conv_norm_pool_relu(x, weight, mask, backend="cpu")
    (grad,) = torch.autograd.grad(y[0, 0, 0, 0, 0], x)
    assert int(grad[0, 0, :2].argmax()) == min(first, second)


def agree_where_finite(found: Tensor, plain: Tensor) -> None:
    """Weight gradients multiply zeros with numbers of the filter that comes next in memory."""
    fine = found.isfinite()
    assert float(fine.float().mean()) > 0.5
    assert torch.equal(found[fine], plain[fine])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_fills_its_channels_only(value: float) -> None:
    case = Case(2, 3, 4, (6, 7, 9), padding=ONES)
    leaves, mask, grad = operands(case, "all")
    mask = mask.clone()
    mask[2, 1] = False
    plain = run(leaves, mask, grad, case)
    x = leaves[0].clone()
    x[1, 1, 2, 3, 4] = value
    found = run([x, *leaves[1:]], mask, grad, case)
    # Filter 2 does not read that channel. As in torch, it may multiply it with zeros.
    lost = found[0].isnan().flatten(2)
    assert torch.equal(lost.all(2), lost.any(2))
    assert not bool(lost[0].any())
    assert bool(lost[1, [0, 1, 3]].all())
    fine = ~lost.all(2)
    assert torch.equal(found[0][fine], plain[0][fine])
    assert torch.equal(found[3].isnan(), ~fine[1])
    if fine[1, 2]:
        agree_where_finite(found[2][2], plain[2][2])
    assert torch.equal(found[1][0], plain[1][0])
    assert bool(found[1][1].isnan().all())
    # A gradient that is not finite reaches no other sample and no other filter either.
    dirty = grad.clone()
    dirty[0, 1][found[0][0, 1] > 0] = value
    found = run(leaves, mask, dirty, case)
    assert not bool(found[0].isnan().any())
    assert bool((~found[2][1].isfinite()).all())
    agree_where_finite(found[2][[0, 2, 3]], plain[2][[0, 2, 3]])
    assert torch.equal(found[1][1], plain[1][1])
    assert torch.equal(~found[3].isfinite(), torch.tensor([False, True, False, False]))


def test_pruned_weights_may_hold_anything() -> None:
    case = Case(2, 3, 4, (6, 7, 9), padding=ONES)
    leaves, mask, grad = operands(case, "half")
    plain = run(leaves, mask, grad, case)
    for value in (float("nan"), float("inf")):
        dirty = torch.where(mask, leaves[1], value)
        for result, wanted in zip(
            run([leaves[0], dirty, leaves[2]], mask, grad, case), plain, strict=True
        ):
            assert torch.equal(result, wanted)


def test_a_large_mean_costs_no_digits() -> None:
    case = Case(1, 2, 3, (6, 7, 9), padding=(0, 0, 0))
    leaves, mask, grad = operands(case, "half")
    found = run([leaves[0] + 100.0, *leaves[1:]], mask, grad, case)
    wanted = exact([leaves[0] + 100.0, *leaves[1:]], mask, grad, case)
    # The convolution's own rounding, which is relative to its values, is what is left.
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    case = Case(2, 4, 8, (9, 22, 31), padding=ONES)
    leaves = [normal(2, 4, 9, 22, 31), normal(8, 4, 3, 3, 3), normal(8)]
    mask = make_mask((8, 4, 3, 3, 3), "half")
    grad = normal(2, 8, 4, 11, 15)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(leaves, mask, grad, case)
        torch.set_num_threads(threads)
        more = [run(leaves, mask, grad, case) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for again in more:
        assert torch.equal(again[0], one[0])
        assert torch.equal(again[1], one[1])
        torch.testing.assert_close(again[2], one[2], rtol=1e-4, atol=1e-4)
    assert torch.equal(more[0][2], more[1][2])


# Blocks of a network: when they are fused, and what they leave behind.


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
    lent = buffers._lent_bytes

    def step() -> None:
        loss = model(x).sum()
        held = buffers._lent_bytes
        assert held > lent
        optimizer.zero_grad()
        loss.backward()
        # While the loss lives on, what the backward pass needed has come back.
        assert buffers._lent_bytes < held
        optimizer.step()

    for _ in range(3):
        step()
    optimizer.zero_grad()
    after = (buffers._lent_bytes, buffers._free_bytes, buffers._peak_lent_bytes)
    for _ in range(30):
        step()
    optimizer.zero_grad()
    assert (buffers._lent_bytes, buffers._free_bytes, buffers._peak_lent_bytes) == after
    assert buffers._lent_bytes == lent
    buffers.release()
    assert buffers._free_bytes == 0


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
