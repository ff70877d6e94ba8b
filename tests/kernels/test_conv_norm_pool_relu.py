"""The fused block for several input channels against torch's layers in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.conv_norm_pool_relu import run as block_run
from sparsekit.kernels.masked_conv3d import geometry, packing
from sparsekit.kernels.masked_conv3d import run as conv_run
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
        owners = [m for m in (block_run, conv_run, packing, geometry) if hasattr(m, name)]
        assert owners
        for owner in owners:
            monkeypatch.setattr(owner, name, value)
    leaves, mask, grad = operands(case, "half")
    check(compare, leaves, mask, grad, case)


# Grids on which the gradient's planes may pass through a small buffer, of this many planes.
FEW_PLANES = [
    pytest.param(Case(2, 2, 4, (40, 12, 12), padding=ONES), 6, id="even"),
    pytest.param(Case(1, 3, 4, (31, 22, 7), padding=ONES), 6, id="odd"),
    pytest.param(Case(3, 2, 4, (31, 22, 7)), 6, id="no-padding"),
    pytest.param(Case(2, 2, 4, (24, 20, 20), (5, 5, 5), padding=(2, 2, 2)), 10, id="kernel-5"),
    pytest.param(Case(1, 2, 3, (24, 20, 21), (5, 5, 5), padding=ONES), 10, id="kernel-5-padding-1"),
    pytest.param(Case(1, 2, 3, (30, 20, 19), (7, 7, 7), padding=THREE), 14, id="kernel-7"),
    pytest.param(
        Case(2, 2, 3, (31, 22, 7), padding=(2, 1, 1), dilation=(2, 1, 1)), 10, id="dilated"
    ),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("case", "planes"), FEW_PLANES)
def test_few_planes_of_the_gradient_at_a_time(
    case: Case, planes: int, threads: int, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_run, "BLOCK_GRADIENT_BYTES", 1)
    leaves, mask, grad = operands(case, "half")
    shape = geometry.shape_of(
        leaves[0], leaves[1], case.stride, case.padding, case.dilation, case.groups
    )
    layout = block_run.plan_of(mask.clone(), shape).geometry
    assert layout.resident == planes < case.out[0]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = check(compare, leaves, mask, grad, case)
    finally:
        torch.set_num_threads(before)
    # And in one piece.
    monkeypatch.setattr(block_run, "BLOCK_GRADIENT_BYTES", 1 << 30)
    whole = run(leaves, mask.clone(), grad, case)
    assert torch.equal(found[0], whole[0])
    torch.testing.assert_close(found[1], whole[1], rtol=1e-5, atol=1e-5)


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
