"""Blocks of the network behind its convolutions, and with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.bench.agreement import check_close
from sparsekit.bench.convolutions import conv_case
from sparsekit.bench.network import LAYERS, convolutions, masked_network, random_mask, stock_network
from sparsekit.bench.pairs import OURS, STOCK, Case
from sparsekit.models import BrainAgeCNN
from sparsekit.ops import norm_pool_relu

# Largest difference over the largest value, and the share of entries that a flip may move: torch
# compares normalised and rounded voxels, we those before the norm.
FORWARD_LIMIT = 5e-5
GRADIENT_LIMIT = 1e-3
FLIPS = 1e-4
# A flip moves one product out of ten thousands of a weight's gradient.
WEIGHT_LIMIT = 1e-2


def _step(module: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], Tensor]:
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []

    def step() -> Tensor:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        y = module(x)
        y.backward(g)
        return y

    return step


def norm_pool_relu_case(numbers: Sequence[int]) -> Case:
    """Instance norm, max pooling and ReLU of these blocks one after another, with gradients."""
    stocks, own = [], []
    for number in numbers:
        layer = LAYERS[f"conv{number}"]
        random = torch.Generator().manual_seed(number)
        x = torch.randn(1, layer.c_out, *layer.grid, generator=random)
        g = torch.randn(1, layer.c_out, *(size // 2 for size in layer.grid), generator=random)
        modules = nn.Sequential(nn.InstanceNorm3d(layer.c_out), nn.MaxPool3d(2), nn.ReLU())
        their_x, our_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        stocks.append(_step(modules, their_x, g))
        own.append(_step(norm_pool_relu, our_x, g))
        name = f"norm + pool + ReLU of block {number}"
        check_close(f"{name}: output", own[-1](), stocks[-1](), FORWARD_LIMIT)
        check_close(f"{name}: gradient", our_x.grad, their_x.grad, GRADIENT_LIMIT, FLIPS)
    labels = {"what": "norm + pool + ReLU, forward + gradients", "layer": _name(numbers)}
    sides = {STOCK: lambda: [f() for f in stocks], OURS: lambda: [f() for f in own]}
    return Case(labels, sides)


WITHOUT_CONVOLUTION = "ours, convolution alone"
IN_BLOCK = "norm + pool + ReLU within the fused block"


def within_block_case(number: int, sparsity: float) -> Case:
    """What norm, pooling and ReLU add to a convolution: the fused block beside the convolution.

    `in_block_ratios` makes the figure of it.
    """
    whole = block_case(number, sparsity)
    alone = conv_case(f"conv{number}", sparsity, "step")
    layers = norm_pool_relu_case((number,))
    sides = {
        STOCK: layers.sides[STOCK],
        WITHOUT_CONVOLUTION: alone.sides[OURS],
        OURS: whole.sides[OURS],
    }
    return Case({**whole.labels, "what": IN_BLOCK}, sides)


def in_block_ratios(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Stock's three layers over what they add to ours, all these blocks together, by round."""
    rounds = zip(
        *(
            zip(*(row["milliseconds"][s] for s in (STOCK, OURS, WITHOUT_CONVOLUTION)), strict=True)
            for row in rows
        ),
        strict=True,
    )
    found = []
    for blocks in rounds:
        stock = sum(times[0] for times in blocks)
        added = sum(times[1] - times[2] for times in blocks)
        # Noise alone can make a small difference negative; it counts as almost nothing.
        found.append(stock / max(added, 0.01 * stock))
    return found


def _name(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    return f"blocks {numbers[0]} to {numbers[-1]} together"


def block_case(number: int, sparsity: float) -> Case:
    """Convolution, norm, pooling and ReLU of one block, forward and gradients, as the step has it.

    The first block's input needs no gradient.
    """
    name = f"conv{number}"
    layer = LAYERS[name]
    model: BrainAgeCNN = masked_network({name: random_mask(name, sparsity)})
    stock = stock_network(model)
    theirs = stock.blocks[4 * (number - 1) : 4 * number]
    ours = model.blocks[number - 1]
    random = torch.Generator().manual_seed(number)
    x = torch.randn(1, layer.c_in, *layer.grid, generator=random)
    g = torch.randn(1, layer.c_out, *(size // 2 for size in layer.grid), generator=random)
    their_x, our_x = (x.clone().requires_grad_(number > 1) for _ in range(2))
    sides = {STOCK: _step(theirs, their_x, g), OURS: _step(ours, our_x, g)}

    block = f"block {number} at {sparsity:.0%}"
    check_close(f"{block}: output", sides[OURS](), sides[STOCK](), FORWARD_LIMIT)
    if number > 1:
        # A flip moves what a voxel's 27 neighbours in all channels get.
        check_close(f"{block}: gradient of the input", our_x.grad, their_x.grad, 1e-3, 100 * FLIPS)
    weight = convolutions(model)[name].weight.grad
    their_weight = stock.convolutions()[name].weight.grad
    assert their_weight is not None
    expected = torch.where(random_mask(name, sparsity), their_weight, 0.0)
    check_close(f"{block}: gradient of the weight", weight, expected, WEIGHT_LIMIT)
    labels = {
        "what": "block as a whole, forward + gradients",
        "layer": f"block {number}",
        "sparsity": sparsity,
        "masks": "uniform random",
    }
    return Case(labels, sides)
