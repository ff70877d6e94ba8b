"""Networks of MONAI give the same after `sparsify`, whatever they are made of."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from sparsekit import explain, prune, sparsify
from sparsekit.nn import MaskedConv3d

# max |found - exact| over max |exact| of the output, and of each parameter's gradient with the
# largest gradient of the network as the scale; the exact ones are those of the network in float64.
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "unet-strided": (
        lambda: UNet(
            spatial_dims=3, in_channels=2, out_channels=3, channels=(4, 8, 16), strides=(2, 2),
            num_res_units=2, dropout=0.0,
        ),
        (2, 2, 16, 20, 12),
    ),
    "basic-unet": (
        lambda: BasicUNet(
            spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4)
        ),
        (1, 1, 32, 16, 16),
    ),
    "segresnet": (
        lambda: SegResNet(
            spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 2),
            blocks_up=(1,),
        ),
        (2, 1, 12, 16, 14),
    ),
    "densenet": (
        lambda: DenseNet(
            spatial_dims=3, in_channels=1, out_channels=2, init_features=8, growth_rate=4,
            block_config=(2, 3), bn_size=2,
        ),
        (2, 1, 20, 22, 24),
    ),
}  # fmt: skip


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output of one training step and the gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return y.detach(), list(torch.autograd.grad(y, [x, *model.parameters()], grad))


def error(found: Tensor, exact: Tensor, scale: float) -> float:
    return float((found.double() - exact).abs().max()) / scale


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients(name: str, sparsity: float) -> None:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    dense: Any = make()
    x = torch.randn(shape)
    masks = prune.magnitude_masks(dense, sparsity, scope="layer")
    with torch.no_grad():
        for parameter, mask in masks.items():
            dense.get_parameter(parameter).mul_(mask)
    sparse = sparsify(copy.deepcopy(dense), masks)
    layers = [m for m in sparse.modules() if isinstance(m, MaskedConv3d)]
    assert len(layers) >= 5
    ran: list[str] = []
    for layer in layers:
        layer.backend = "cpu"
        layer.register_forward_hook(lambda *_: ran.append("cpu"))

    exact_y, exact = step(dense.double(), x.double())
    y, gradients = step(sparse, x)
    assert len(ran) == len(layers)
    assert error(y, exact_y, float(exact_y.abs().max())) < OUTPUT_TOLERANCE
    scale = max(float(t.abs().max()) for t in exact[1:])
    names = [n for n, _ in sparse.named_parameters()]
    for parameter, found, wanted in zip(names, gradients[1:], exact[1:], strict=True):
        # Layers without an op of their own, such as transposed convolutions, have dense gradients.
        if isinstance(sparse.get_submodule(parameter.rpartition(".")[0]), MaskedConv3d):
            mask = masks.get(parameter, torch.ones(()) > 0)
            wanted = torch.where(mask, wanted, 0.0)
            assert not bool(found[~mask.expand_as(found)].any())
        assert error(found, wanted, scale) < GRADIENT_TOLERANCE, parameter
    assert error(gradients[0], exact[0], float(exact[0].abs().max())) < GRADIENT_TOLERANCE


def test_training_keeps_what_is_pruned_at_zero() -> None:
    make, shape = NETWORKS["unet-strided"]
    torch.manual_seed(0)
    model: Any = make()
    masks = prune.magnitude_masks(model, 0.8)
    sparsify(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(shape)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, mask in masks.items():
        assert not bool(model.get_parameter(name).detach()[~mask].any())
    assert "masked_conv3d" in str(explain())
