"""The network of the CPU benchmarks, built from torch's modules and as sparsekit has it.

`BrainAgeCNN` at 91 x 109 x 91, the paper's size, with random weights. Uniform random masks: every
layer keeps the same share of its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.models import PAPER_CHANNELS, PAPER_NECK_CHANNELS, BrainAgeCNN
from sparsekit.nn import sparsify
from sparsekit.types import Size3

GRID: Size3 = (91, 109, 91)
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution of the network."""

    c_in: int
    c_out: int
    grid: Size3
    kernel: int

    @property
    def voxels(self) -> int:
        """Voxels of its input and of its output."""
        d, h, w = self.grid
        return d * h * w

    @property
    def weights(self) -> int:
        """Entries of its weight."""
        return self.c_in * self.c_out * self.kernel**3

    def make(self) -> nn.Conv3d:
        """Return the layer as torch has it."""
        return nn.Conv3d(self.c_in, self.c_out, self.kernel, padding=self.kernel // 2)


def _layers() -> dict[str, Layer]:
    found, c_in, grid = {}, 1, GRID
    for number, c_out in enumerate(PAPER_CHANNELS, start=1):
        found[f"conv{number}"] = Layer(c_in, c_out, grid, 3)
        c_in, grid = c_out, (grid[0] // 2, grid[1] // 2, grid[2] // 2)
    found["neck"] = Layer(c_in, PAPER_NECK_CHANNELS, grid, 1)
    found["out"] = Layer(PAPER_NECK_CHANNELS, 1, (1, 1, 1), 1)
    return found


LAYERS = _layers()
MEAN_LAYERS = ("conv2", "conv3", "conv4", "conv5")
"""Layers of the geometric means."""


class StockNetwork(nn.Module):
    """The same function with torch's own modules only."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for name, layer in LAYERS.items():
            if name.startswith("conv"):
                blocks += [layer.make(), nn.InstanceNorm3d(layer.c_out)]
                blocks += [nn.MaxPool3d(2), nn.ReLU()]
        self.blocks = nn.Sequential(*blocks)
        self.neck = nn.Sequential(
            LAYERS["neck"].make(), nn.InstanceNorm3d(PAPER_NECK_CHANNELS), nn.ReLU()
        )
        self.out = LAYERS["out"].make()

    def forward(self, x: Tensor) -> Tensor:
        """Predict ages (n,) from scans (n, 1, d, h, w)."""
        x = self.neck(self.blocks(x))
        age: Tensor = self.out(x.mean(dim=(2, 3, 4), keepdim=True))
        return age.flatten()

    def convolutions(self) -> dict[str, nn.Conv3d]:
        """By the names of `LAYERS`."""
        found = [module for module in self.modules() if isinstance(module, nn.Conv3d)]
        return dict(zip(LAYERS, found, strict=True))


def convolutions(model: BrainAgeCNN) -> dict[str, nn.Conv3d]:
    """Convolutions of our network by the names of `LAYERS`."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    return dict(zip(LAYERS, found, strict=True))


def random_mask(name: str, sparsity: float, layer: Layer | None = None) -> Tensor:
    """Mask of one layer with exactly ``int(sparsity * n)`` entries pruned, at random places."""
    number = len(LAYERS) if layer else list(LAYERS).index(name)
    layer = layer or LAYERS[name]
    shape = (layer.c_out, layer.c_in, *(layer.kernel,) * 3)
    seed = 1000 * number + round(100 * sparsity)
    order = torch.randperm(layer.weights, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(layer.weights, dtype=torch.bool)
    mask[order[: int(sparsity * layer.weights)]] = False
    return mask.view(shape)


def random_masks(sparsity: float, *, dense: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Masks of all convolutions but those in `dense`, by the names of `LAYERS`."""
    return {name: random_mask(name, sparsity) for name in LAYERS if name not in dense}


def masked_network(masks: Mapping[str, Tensor]) -> BrainAgeCNN:
    """Our network with these masks, by the names of `LAYERS`; others stay dense layers."""
    # Without a mean age all of the prediction comes from the scan: comparing it says something.
    model = BrainAgeCNN(GRID, mean_age=0.0, generator=torch.Generator().manual_seed(1))
    return hold(model, masks)


def hold(model: BrainAgeCNN, masks: Mapping[str, Tensor]) -> BrainAgeCNN:
    """Give our network masks by the names of `LAYERS`."""
    layers = convolutions(model)
    names = {id(module): f"{path}.weight" for path, module in model.named_modules()}
    return sparsify(model, {names[id(layers[name])]: mask for name, mask in masks.items()})


def stock_network(like: BrainAgeCNN) -> StockNetwork:
    """Torch's network with the weights of ours, zeros in place."""
    model = StockNetwork()
    ours = convolutions(like)
    with torch.no_grad():
        for name, layer in model.convolutions().items():
            layer.weight.copy_(ours[name].weight)
            assert layer.bias is not None
            assert ours[name].bias is not None
            layer.bias.copy_(ours[name].bias)  # type: ignore[arg-type]
    return model


def scan() -> Tensor:
    """One scan: smooth noise, 0 at the rim, as brains are."""
    random = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 1, *(size // 4 for size in GRID), generator=random)
    x = nn.functional.interpolate(coarse, size=GRID, mode="trilinear")
    x = x + 0.1 * torch.randn(x.shape, generator=random)
    x[..., :4], x[..., -4:] = 0.0, 0.0
    return x
