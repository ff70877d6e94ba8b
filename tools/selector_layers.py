"""Convolutions that `fit_selector.py` measures."""

from dataclasses import dataclass
from typing import Any

from sparsekit.kernels.masked_conv3d import cost
from sparsekit.kernels.masked_conv3d.geometry import Shape


@dataclass(frozen=True)
class Layer:
    """A convolution to measure."""

    samples: int
    c_in: int
    c_out: int
    size: tuple[int, int, int]
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    op: cost.Op = "masked_conv3d"
    held_out: bool = False
    weight_alone: bool = False
    """Also measure the step of a layer whose input needs no gradient."""

    @property
    def shape(self) -> Shape:
        """Sizes, padded to keep the map at stride 1."""
        k, s, p = self.kernel, self.stride, self.kernel // 2
        return Shape(
            self.c_in, self.c_out, self.size, (k, k, k), (s, s, s), (p, p, p), (1, 1, 1),
            self.groups,
        )  # fmt: skip


def _blocks(*rows: tuple[Any, ...]) -> list[Layer]:
    return [Layer(*row[:4], op="conv_norm_pool_relu", held_out=len(row) > 4) for row in rows]


HELD = {"held_out": True}
LAYERS = [
    # The default network, at full and at half resolution.
    Layer(1, 32, 64, (45, 54, 45)),
    Layer(1, 64, 128, (22, 27, 22)),
    Layer(1, 128, 256, (11, 13, 11)),
    Layer(1, 256, 256, (5, 6, 5)),
    Layer(2, 64, 128, (22, 27, 22), **HELD),
    Layer(2, 128, 256, (11, 13, 11)),
    Layer(4, 256, 256, (5, 6, 5)),
    Layer(1, 32, 64, (23, 27, 23)),
    Layer(2, 32, 64, (23, 27, 23), **HELD),
    Layer(1, 64, 128, (11, 13, 11), **HELD),
    Layer(4, 64, 128, (11, 13, 11)),
    Layer(1, 128, 256, (5, 6, 5), weight_alone=True),
    # Narrow ones: the demo's.
    Layer(4, 1, 8, (46, 55, 46)),
    Layer(1, 1, 8, (46, 55, 46)),
    Layer(2, 1, 8, (46, 55, 46), **HELD),
    Layer(4, 8, 16, (23, 27, 23)),
    Layer(1, 8, 16, (23, 27, 23), weight_alone=True),
    Layer(8, 8, 16, (23, 27, 23), **HELD),
    Layer(4, 16, 32, (11, 13, 11), weight_alone=True),
    Layer(1, 16, 32, (11, 13, 11)),
    Layer(2, 16, 32, (11, 13, 11), **HELD),
    Layer(4, 32, 64, (5, 6, 5)),
    Layer(1, 32, 64, (5, 6, 5)),
    Layer(1, 1, 32, (60, 60, 60)),
    Layer(1, 3, 32, (40, 40, 40), weight_alone=True),
    Layer(2, 4, 24, (32, 32, 32), weight_alone=True),
    Layer(1, 8, 8, (48, 48, 48)),
    Layer(1, 16, 16, (48, 48, 48)),
    Layer(1, 12, 20, (40, 40, 40), **HELD),
    Layer(1, 24, 24, (32, 32, 32), weight_alone=True),
    Layer(1, 48, 48, (32, 32, 32)),
    Layer(1, 16, 32, (60, 60, 60)),
    Layer(1, 32, 32, (45, 54, 45), **HELD),
    Layer(2, 40, 36, (20, 20, 20), **HELD),
    Layer(2, 20, 40, (24, 24, 24)),
    Layer(1, 72, 56, (12, 12, 12)),
    Layer(1, 7, 13, (23, 29, 31), **HELD),
    Layer(1, 96, 96, (16, 16, 16)),
    Layer(1, 320, 320, (8, 8, 8), **HELD),
    # Maps on which the constant part of a call decides.
    Layer(1, 1, 1, (3, 3, 3)),
    Layer(1, 4, 8, (4, 4, 4)),
    Layer(8, 16, 16, (3, 3, 3)),
    Layer(2, 8, 16, (6, 6, 6), **HELD, weight_alone=True),
    # 1 x 1 x 1.
    Layer(1, 256, 64, (2, 3, 2), kernel=1),
    Layer(4, 64, 16, (2, 3, 2), kernel=1),
    Layer(1, 64, 1, (1, 1, 1), kernel=1),
    Layer(4, 16, 1, (1, 1, 1), kernel=1, weight_alone=True),
    Layer(1, 256, 64, (11, 13, 11), kernel=1, weight_alone=True),
    Layer(1, 64, 256, (22, 27, 22), kernel=1),
    Layer(2, 32, 64, (32, 32, 32), kernel=1),
    Layer(1, 128, 128, (16, 16, 16), kernel=1, **HELD),
    Layer(8, 16, 8, (2, 3, 2), kernel=1, **HELD),
    # Strides, larger kernels, groups.
    Layer(1, 32, 64, (45, 54, 45), stride=2),
    Layer(1, 64, 128, (22, 27, 22), stride=2),
    Layer(4, 16, 32, (16, 16, 16), stride=2, weight_alone=True),
    Layer(2, 32, 32, (24, 24, 24), stride=2, **HELD),
    Layer(1, 8, 8, (32, 32, 32), kernel=5, weight_alone=True),
    Layer(1, 16, 32, (20, 20, 20), kernel=5),
    Layer(1, 24, 16, (24, 24, 24), kernel=5, **HELD),
    Layer(1, 64, 128, (22, 27, 22), groups=2),
    Layer(1, 64, 64, (22, 27, 22), groups=8, weight_alone=True),
    Layer(1, 64, 64, (22, 27, 22), groups=16),
    Layer(2, 48, 48, (16, 16, 16), groups=4, **HELD),
    Layer(1, 24, 24, (20, 20, 20), groups=2),
    Layer(2, 40, 40, (12, 12, 12), groups=8),
    Layer(1, 64, 64, (22, 27, 22), groups=64),
    Layer(1, 32, 32, (32, 32, 32), groups=32),
    Layer(4, 96, 96, (8, 8, 8), groups=96, weight_alone=True),
    Layer(2, 48, 48, (16, 16, 16), groups=48, **HELD),
    *_blocks(
        (1, 32, 64, (45, 54, 45)),
        (1, 64, 128, (22, 27, 22)),
        (1, 128, 256, (11, 13, 11)),
        (1, 256, 256, (5, 6, 5)),
        (4, 8, 16, (23, 27, 23)),
        (1, 8, 16, (23, 27, 23)),
        (4, 16, 32, (11, 13, 11)),
        (1, 16, 32, (11, 13, 11)),
        (4, 32, 64, (5, 6, 5)),
        (2, 4, 8, (4, 4, 4)),
        (2, 32, 64, (23, 27, 23)),
        (1, 16, 16, (32, 32, 32), "held out"),
        (2, 128, 256, (5, 6, 5), "held out"),
        (2, 8, 16, (23, 27, 23), "held out"),
        (2, 16, 32, (11, 13, 11), "held out"),
        (1, 1, 32, (91, 109, 91)),
        (4, 1, 8, (46, 55, 46)),
        (1, 1, 8, (46, 55, 46)),
        (1, 1, 8, (16, 16, 16)),
        (2, 1, 8, (46, 55, 46), "held out"),
        (1, 1, 16, (30, 30, 30), "held out"),
    ),
]  # fmt: skip
