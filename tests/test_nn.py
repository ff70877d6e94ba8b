import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune
from torch.utils.checkpoint import checkpoint

from sparsekit import prune
from sparsekit.errors import ArgumentError, BackendError
from sparsekit.masks import masks_of
from sparsekit.nn import MaskedConv3d, densify, sparsify


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


class OwnConv(nn.Conv3d):
    """A subclass computes what it likes and must not be swapped."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def some_mask(weight: Tensor, density: float = 0.5) -> Tensor:
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < density


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "strided": {"stride": (2, 1, 3), "padding": (0, 1, 2), "dilation": (1, 2, 1)},
    "grouped": {"groups": 2},
    "same": {"padding": "same", "kernel_size": (3, 2, 4)},
    "same-dilated": {"padding": "same", "dilation": (1, 3, 2), "kernel_size": (3, 2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": (1, 2, 0), "padding_mode": "reflect"},
    "circular": {"padding": (1, 0, 2), "padding_mode": "circular", "stride": 2},
    "replicate-same": {"padding": "same", "padding_mode": "replicate", "kernel_size": (1, 3, 2)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one-scan"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_conv3d_with_the_weights_zeroed(name: str, batched: bool) -> None:
    arguments = {"kernel_size": 3, "dtype": torch.float64, **LAYERS[name]}
    layer = MaskedConv3d(2, 4, **arguments)
    plain = nn.Conv3d(2, 4, **arguments)
    plain.load_state_dict(densify(copy.deepcopy(layer)).state_dict())
    mask = some_mask(layer.weight)
    layer.set_mask(mask)
    with torch.no_grad():
        plain.weight[~mask] = 0.0
    shape = (3, 2, 8, 9, 10) if batched else (2, 8, 9, 10)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert layer.weight.grad is not None
    assert plain.weight.grad is not None
    wanted = torch.where(mask, plain.weight.grad, 0.0)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-12, atol=1e-12)
    assert bool((layer.weight.grad[~mask] == 0).all())


def test_mask_density_and_repr() -> None:
    layer = MaskedConv3d(2, 4, 3, padding=1)
    assert layer.density == 1.0
    assert bool(layer.mask.all())
    mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    mask.view(-1)[:54] = True
    layer.set_mask(mask)
    assert layer.density == 0.25
    assert torch.equal(layer.mask, mask)
    mask.fill_(True)
    assert layer.density == 0.25
    assert repr(layer).endswith("padding=(1, 1, 1), density=0.2500)")
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask"]


def test_sparsify_keeps_objects_hooks_and_optimizers() -> None:
    model: Any = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Sequential(nn.Conv3d(2, 2, 1)))
    parameters = list(model.parameters())
    conv = model[0]
    calls: list[str] = []
    conv.register_forward_hook(lambda *_: calls.append("forward"))
    conv.weight.register_hook(lambda _: calls.append("gradient"))
    conv.register_buffer("own", torch.ones(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = {"0.weight": some_mask(conv.weight)}

    assert sparsify(model, masks) is model
    assert model[0] is conv
    assert [type(m).__name__ for m in (model[0], model[2][0])] == ["MaskedConv3d"] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    before = conv.weight.detach().clone()
    model(torch.ones(1, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    assert calls == ["forward", "gradient"]
    assert not torch.equal(conv.weight.detach(), before)
    assert "0.own" in model.state_dict()


def test_a_model_that_is_one_convolution() -> None:
    conv = nn.Conv3d(1, 2, 3)
    masked = sparsify(conv, {"weight": some_mask(conv.weight)})
    assert isinstance(masked, MaskedConv3d)
    assert masked.density == pytest.approx(float(some_mask(conv.weight).float().mean()))
    assert type(densify(masked)) is nn.Conv3d


def test_sparsify_twice_changes_nothing_and_without_masks_prunes_nothing() -> None:
    model: Any = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight[0] = 0.0
    sparsify(model)
    assert model[0].density == 1.0
    mask = some_mask(model[0].weight)
    sparsify(model, {"0.weight": mask, "1.weight": torch.eye(2) > 0})
    sparsify(model)
    sparsify(model, {})
    assert torch.equal(model[0].mask, mask)
    assert len(model[0]._forward_pre_hooks) == 1
    assert set(masks_of(model)) == {"0.weight", "1.weight"}


def test_only_plain_convolutions_are_swapped() -> None:
    model: Any = nn.Sequential(OwnConv(1, 2, 3), nn.Conv2d(1, 2, 3), nn.ConvTranspose3d(1, 2, 3))
    masks = prune.magnitude_masks(model, 0.5)
    sparsify(model, masks)
    assert [type(m) for m in model] == [OwnConv, nn.Conv2d, nn.ConvTranspose3d]
    x = torch.randn(1, 1, 4, 4, 4)
    kept = torch.where(masks["0.weight"], model[0].weight, 0.0)
    expected = 2 * functional.conv3d(x, kept, model[0].bias)
    torch.testing.assert_close(model[0](x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "reparametrise", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm],
    ids=["hook", "parametrization"],
)  # fmt: skip
def test_convolutions_with_a_computed_weight_stay_as_they_are(reparametrise: Any) -> None:
    model: Any = nn.Sequential(reparametrise(nn.Conv3d(1, 2, 3)), nn.Conv3d(2, 1, 1))
    kind = type(model[0])
    expected = model(torch.ones(1, 1, 3, 3, 3)).detach()
    sparsify(model)
    assert [type(m) for m in model] == [kind, MaskedConv3d]
    torch.testing.assert_close(model(torch.ones(1, 1, 3, 3, 3)), expected)


def test_masks_of_torch_are_adopted_on_the_way() -> None:
    model: Any = nn.Sequential(nn.Conv3d(1, 4, 3))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.75)
    wanted = model[0].weight_mask.bool()
    expected = model(torch.ones(1, 1, 4, 4, 4)).detach()
    sparsify(model)
    assert torch.equal(model[0].mask, wanted)
    torch.testing.assert_close(model(torch.ones(1, 1, 4, 4, 4)), expected)


def test_a_copy_loads_a_dense_checkpoint_without_touching_the_original() -> None:
    model: Any = sparsify(nn.Sequential(nn.Conv3d(1, 2, 3)))
    mask = some_mask(model[0].weight)
    prune.apply_masks(model, {"0.weight": mask})
    copied: Any = copy.deepcopy(model)
    copied.load_state_dict(nn.Sequential(nn.Conv3d(1, 2, 3)).state_dict())
    assert copied[0].density == 1.0
    assert torch.equal(model[0].mask, mask)


def test_named_backend_that_cannot_run_raises() -> None:
    layer = MaskedConv3d(1, 2, 3)
    layer.backend = "triton"
    with pytest.raises(BackendError, match="'triton' cannot run masked_conv3d here"):
        layer(torch.ones(1, 1, 3, 3, 3))
    assert "backend" not in densify(layer).__dict__


def test_bad_masks_are_refused_before_anything_changes() -> None:
    model: Any = nn.Sequential(nn.Conv3d(1, 2, 3))
    with pytest.raises(ArgumentError, match=r"the model has no parameter '1\.weight'"):
        sparsify(model, {"1.weight": torch.ones(1, dtype=torch.bool)})
    assert type(model[0]) is nn.Conv3d


@pytest.mark.parametrize("name", ["backward", "no_grad", "checkpoint", "compile", "autocast"])
def test_works_under(name: str) -> None:
    model: Any = sparsify(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Conv3d(2, 2, 2)))
    prune.apply_masks(model, prune.magnitude_masks(model, 0.5))
    x = torch.randn(1, 1, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    if name == "no_grad":
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        return
    if name == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        assert float((y - expected).detach().abs().max()) < 0.05
    elif name == "compile":
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        y = compiled(x)
        assert torch.equal(y, expected)
    elif name == "checkpoint":
        y = checkpoint(model, x, use_reentrant=False)
        assert torch.equal(y, expected)
    else:
        y = expected
    y.float().sum().backward()
    for parameter, mask in ((model.get_parameter(n), m) for n, m in masks_of(model).items()):
        assert parameter.grad is not None
        assert bool((parameter.grad[~mask] == 0).all())
        assert bool((parameter.grad[mask] != 0).any())
