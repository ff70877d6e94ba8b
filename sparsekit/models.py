"""Networks to prune and train."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.errors import ArgumentError
from sparsekit.nn import ConvBlock, can_fuse, fused_block
from sparsekit.ops import norm_pool_relu
from sparsekit.types import Size3

PAPER_CHANNELS = (32, 64, 128, 256, 256)
PAPER_NECK_CHANNELS = 64


class BrainAgeCNN(nn.Module):
    """3D convolutional network that predicts age from a T1-weighted scan.

    The network of Stripelis et al. (arXiv 2208.11669) and Gupta et al. (PMLR 143:228) by
    default, with 2,948,801 parameters. Each block is a 3x3x3 convolution, an instance norm
    without parameters, a max-pool by 2 and a ReLU; then come a 1x1x1 convolution, the mean over
    the remaining map and a 1x1x1 convolution to one number. Weights start Glorot-uniform, biases
    at 0, the last bias at `mean_age`. Instance norm uses the statistics of the scan at hand in
    training and evaluation alike.

    Parameters
    ----------
    in_shape : tuple of 3 int
        Grid of the scans, (d, h, w).
    width : float
        Factor on all channel counts (rounded, at least 1).
    mean_age : float
        Initial prediction, in years.
    dropout : float
        Probability of dropping a channel's mean before the last convolution. Draws from torch's
        global generator unless `forward` is given one.
    blocks : int, optional
        Number of blocks, 1 to 5. By default as many as leave a map of at least 2 along each axis.
    last_norm : bool, optional
        Instance norm after the first 1x1x1 convolution. By default only with five blocks, as in
        the paper: on the small maps of shallower networks it normalises the signal away.
    age_scale : float
        Years per unit of the last convolution's output (its bias, in years, is not scaled).
    generator : torch.Generator, optional
        Source of the initial weights; torch's global generator by default.

    Raises
    ------
    ArgumentError
        The grid is too small for the blocks, or an argument is out of range.

    Examples
    --------
    >>> model = BrainAgeCNN((46, 55, 46), width=0.25)
    >>> sum(p.numel() for p in model.parameters())
    73969
    """

    def __init__(
        self,
        in_shape: Sequence[int] = (91, 109, 91),
        width: float = 1.0,
        mean_age: float = 62.68,
        dropout: float = 0.0,
        blocks: int | None = None,
        last_norm: bool | None = None,
        age_scale: float = 1.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3 or any(size < 1 for size in in_shape):
            raise ArgumentError(f"in_shape: expected 3 sizes >= 1, got {tuple(in_shape)}")
        if not width > 0:
            raise ArgumentError(f"width: expected a number > 0, got {width}")
        if not 0.0 <= dropout < 1.0:
            raise ArgumentError(f"dropout: expected a probability in [0, 1), got {dropout}")
        if not age_scale > 0:
            raise ArgumentError(f"age_scale: expected a number of years > 0, got {age_scale}")
        self.in_shape: Size3 = (in_shape[0], in_shape[1], in_shape[2])
        count = _block_count(self.in_shape, blocks)
        if last_norm is None:
            last_norm = count == len(PAPER_CHANNELS)
        if last_norm and all(size >> count == 1 for size in self.in_shape):
            raise ArgumentError(
                f"last_norm: the last map of a {self.in_shape} grid after {count} blocks has one "
                "voxel, which cannot be normalised; use fewer blocks or last_norm=False"
            )
        self.width = width
        self.mean_age = mean_age
        self.dropout = dropout
        self.age_scale = age_scale

        channels = [_scaled(c, width) for c in PAPER_CHANNELS[:count]]
        neck = _scaled(PAPER_NECK_CHANNELS, width)
        self.blocks = nn.Sequential(
            *(_Block(c_in, c_out) for c_in, c_out in zip([1, *channels], channels, strict=False))
        )
        self.neck = nn.Conv3d(channels[-1], neck, 1)
        self.neck_norm = _InstanceNorm(neck) if last_norm else nn.Identity()
        self.out = nn.Conv3d(neck, 1, 1)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw Glorot-uniform weights; biases become 0 and the last one `mean_age`.

        The last weights are divided by `age_scale`, so that the first predictions do not depend
        on it.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Else the first steps, far from the mean age, can leave the units before it dead.
        with torch.no_grad():
            self.out.weight /= self.age_scale
        if self.out.bias is not None:
            nn.init.constant_(self.out.bias, self.mean_age)

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Predict ages.

        Parameters
        ----------
        x : Tensor, (n, 1, d, h, w)
            Normalised scans on the grid `in_shape`.
        generator : torch.Generator, optional
            Source of the dropout mask; torch's global generator by default.

        Returns
        -------
        Tensor, (n,)
            Ages in years.
        """
        if x.ndim != 5 or x.shape[1:] != (1, *self.in_shape):
            raise ArgumentError(
                f"x: expected shape (n, 1, {', '.join(map(str, self.in_shape))}), "
                f"got {tuple(x.shape)}; build the model with the scans' grid as in_shape"
            )
        x = self.blocks(x)  # [n, c, d', h', w']
        x = functional.relu(self.neck_norm(self.neck(x)))
        x = x.mean(dim=(2, 3, 4), keepdim=True)  # [n, c, 1, 1, 1]
        x = _dropout(x, self.dropout if self.training else 0.0, generator)
        # Scaling the input of the last convolution leaves its bias in years.
        age: Tensor = self.out(x * self.age_scale if self.age_scale != 1.0 else x)
        return age.flatten()


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


class _Block(ConvBlock):
    """Convolution, instance norm without parameters, 2x2x2 max pooling, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map, (n, c_in, d, h, w) to (n, c_out, d // 2, h // 2, w // 2)."""
        if can_fuse(self.conv, x):
            return fused_block(self.conv, x)
        return norm_pool_relu(self.conv(x))

    def extra_repr(self) -> str:
        """Name what follows the convolution."""
        return "then: instance norm, max pool 2, ReLU"


class _InstanceNorm(nn.InstanceNorm3d):
    """Instance norm without parameters: layer norm over the voxels, which torch has fast."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each channel of each sample (n, c, d, h, w)."""
        if input[0, 0].numel() == 1:
            # Refuses to normalise a single voxel.
            normed: Tensor = super().forward(input)
            return normed
        return functional.layer_norm(input, input.shape[2:], eps=self.eps)


def _block_count(in_shape: Size3, blocks: int | None) -> int:
    limit = len(PAPER_CHANNELS)
    smallest = min(in_shape)
    if blocks is None:
        fitting = [b for b in range(1, limit + 1) if smallest >> b >= 2]
        if not fitting:
            raise ArgumentError(
                f"in_shape: expected at least 4 voxels along each axis, got {in_shape}"
            )
        return fitting[-1]
    if not 1 <= blocks <= limit:
        raise ArgumentError(f"blocks: expected 1 to {limit}, got {blocks}")
    if smallest >> blocks < 1:
        raise ArgumentError(
            f"in_shape: {blocks} blocks need at least {2**blocks} voxels along each axis, "
            f"got {in_shape}; use fewer blocks"
        )
    return blocks


def _dropout(x: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    if probability == 0.0:
        return x
    if generator is None:
        return functional.dropout(x, probability)
    keep = torch.empty_like(x).bernoulli_(1.0 - probability, generator=generator)
    return x * keep / (1.0 - probability)
