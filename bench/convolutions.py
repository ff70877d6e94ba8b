"""Single convolutions of the network: torch's layer, torch's layer channels last, and ours."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from sparsekit.bench.agreement import check_close, check_zero_outside
from sparsekit.bench.network import LAYERS, Layer, random_mask
from sparsekit.bench.pairs import OURS, STOCK, Case
from sparsekit.nn import MaskedConv3d, sparsify

Mode = Literal["forward", "step"]
CHANNELS_LAST = "channels_last_3d"
# Largest difference over the largest value: both sides sum in float32, in different orders, and the
# gradients of the first layers add up to 900,000 products per weight.
FORWARD_LIMIT = 2e-5
GRADIENT_LIMIT = 3e-4


def conv_case(name: str, sparsity: float, mode: Mode, layer: Layer | None = None) -> Case:
    """Forward pass alone, or forward pass and all gradients that training needs, of one layer.

    Parameters
    ----------
    name : str
        In `LAYERS`, or any name of `layer`. The input of ``conv1`` needs no gradient.
    sparsity : float
        Share of its weights pruned at random.
    mode : {"forward", "step"}
    layer : Layer, optional
        A layer of your own.
    """
    mask = random_mask(name, sparsity, layer)
    layer = layer or LAYERS[name]
    ours = layer.make()
    with torch.no_grad():
        random = torch.Generator().manual_seed(2)
        ours.weight.copy_(torch.randn(ours.weight.shape, generator=random))
    stock = layer.make()
    x = torch.randn(1, layer.c_in, *layer.grid, generator=random)
    g = torch.randn(1, layer.c_out, *layer.grid, generator=random)
    own = nn.Sequential(ours)
    sparsify(own, {"0.weight": mask})
    stock.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "weight_mask"})
    assert isinstance(ours, MaskedConv3d)
    last = layer.make().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    last.load_state_dict(stock.state_dict())

    check_conv(name, ours, stock, x, g)
    wants_x = name != "conv1"
    memory = torch.channels_last_3d
    sides = {
        STOCK: _call(stock, x, g, mode, wants_x),
        CHANNELS_LAST: _call(
            last,
            x.contiguous(memory_format=memory),
            g.contiguous(memory_format=memory),
            mode,
            wants_x,
        ),
        OURS: _call(ours, x, g, mode, wants_x),
    }
    what = "masked_conv3d forward" if mode == "forward" else "masked_conv3d forward + gradients"
    labels = {"what": what, "layer": name, "sparsity": sparsity, "masks": "uniform random"}
    return Case(labels, sides, {"unpruned": int(mask.sum())})


def _call(
    layer: nn.Conv3d, x: Tensor, g: Tensor, mode: Mode, wants_x: bool
) -> Callable[[], object]:
    if mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                y: Tensor = layer(x)
            return y

        return forward
    own_x = x.detach().requires_grad_(wants_x)

    def step() -> Tensor:
        own_x.grad = layer.weight.grad = None
        if layer.bias is not None:
            layer.bias.grad = None
        y: Tensor = layer(own_x)
        y.backward(g)
        return y

    return step


def check_conv(name: str, ours: MaskedConv3d, stock: nn.Conv3d, x: Tensor, g: Tensor) -> None:
    """Compare output and gradients of our layer with those of torch's.

    Raises
    ------
    DisagreementError
        They differ by more than the limits of this module.
    """
    inputs = []
    outputs = []
    for layer in (ours, stock):
        inputs.append(x.detach().requires_grad_())
        outputs.append(layer(inputs[-1]))
        outputs[-1].backward(g)
    check_close(f"{name}: output", outputs[0], outputs[1], FORWARD_LIMIT)
    check_close(f"{name}: gradient of the input", inputs[0].grad, inputs[1].grad, FORWARD_LIMIT)
    assert stock.weight.grad is not None
    expected = torch.where(ours.mask, stock.weight.grad, 0.0)
    check_close(f"{name}: gradient of the weight", ours.weight.grad, expected, GRADIENT_LIMIT)
    check_zero_outside(f"{name}: weight", ours.weight.grad, ours.mask)
    assert ours.bias is not None
    assert stock.bias is not None
    check_close(f"{name}: gradient of the bias", ours.bias.grad, stock.bias.grad, GRADIENT_LIMIT)
