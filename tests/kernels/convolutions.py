"""Convolutions that the tests of masked_conv3d share, and loops over taps as their oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from sparsekit.ops import masked_conv3d

Array = npt.NDArray[np.float64]
Compare = Callable[[str, str, Tensor, Array], None]


@dataclass(frozen=True)
class Case:
    batch: int = 2
    c_in: int = 2
    c_out: int = 4
    grid: tuple[int, int, int] = (5, 6, 7)
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options.update(
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups
        )

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.grid, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )


CASES = [
    pytest.param(Case(), id="plain"),
    pytest.param(Case(padding=(1, 1, 1), c_in=3, c_out=5), id="same-size"),
    pytest.param(Case(batch=1, c_in=1, c_out=1, grid=(3, 3, 3)), id="one-voxel-out"),
    pytest.param(Case(c_in=1, c_out=1, grid=(1, 1, 1), kernel=(1, 1, 1)), id="all-ones"),
    pytest.param(Case(grid=(7, 11, 13), kernel=(1, 1, 1), c_in=3), id="pointwise-prime"),
    pytest.param(Case(grid=(1, 7, 1), kernel=(1, 3, 1), padding=(0, 2, 0)), id="flat"),
    pytest.param(Case(batch=0), id="empty-batch"),
    pytest.param(Case(stride=(2, 2, 2), padding=(1, 1, 1)), id="stride-2"),
    pytest.param(Case(grid=(7, 8, 9), stride=(3, 1, 2), padding=(2, 0, 1)), id="stride-uneven"),
    pytest.param(Case(grid=(7, 7, 8), dilation=(2, 1, 3), padding=(2, 1, 3)), id="dilated"),
    pytest.param(Case(c_in=4, c_out=6, groups=2, padding=(1, 1, 1)), id="groups-2"),
    pytest.param(Case(c_in=4, c_out=4, groups=4, stride=(2, 1, 1)), id="depthwise"),
    pytest.param(
        Case(4, 4, 2, (8, 7, 9), (2, 3, 4), (2, 1, 3), (1, 2, 3), (3, 2, 1), 2), id="everything"
    ),
]
DENSITIES = ["none", "one", "half", "all"]

# Drawn shapes are often impossible, and fixtures here have no state.
drawn = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)


def make_mask(shape: tuple[int, ...], density: str) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if density == "one":
        mask.view(-1)[mask.numel() // 2] = True
    elif density == "half":
        order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(3))
        mask.view(-1)[order[: mask.numel() // 2]] = True
    elif density == "all":
        mask.fill_(True)
    return mask


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    x = torch.randn(case.batch, case.c_in, *case.grid, dtype=torch.float64, generator=random)
    weight = torch.randn(
        case.c_out, case.c_in // case.groups, *case.kernel, dtype=torch.float64, generator=random
    )
    bias = torch.randn(case.c_out, dtype=torch.float64, generator=random)
    tensors = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    return tensors[0], tensors[1], tensors[2]


def taps(case: Case) -> list[tuple[tuple[int, int, int], tuple[slice, slice, slice]]]:
    """Each kernel tap with the slices of the padded input that it reads."""
    found = []
    for tap in product(*map(range, case.kernel)):
        at = [t * d for t, d in zip(tap, case.dilation, strict=True)]
        slices = [
            slice(a, a + s * (n - 1) + 1, s)
            for a, s, n in zip(at, case.stride, case.out, strict=True)
        ]
        found.append(((tap[0], tap[1], tap[2]), (slices[0], slices[1], slices[2])))
    return found


def naive(
    case: Case, x: Array, weight: Array, mask: npt.NDArray[np.bool_], bias: Array, g: Array
) -> tuple[Array, Array, Array, Array]:
    """Output, and the gradients of x, weight and bias for the output gradient g."""
    pad = [(0, 0), (0, 0), *((p, p) for p in case.padding)]
    padded = np.pad(x, pad)
    y = np.zeros((case.batch, case.c_out, *case.out))
    dx, dw = np.zeros_like(padded), np.zeros_like(weight)
    c_in, c_out = case.c_in // case.groups, case.c_out // case.groups
    for o, c in product(range(case.c_out), range(c_in)):
        source = o // c_out * c_in + c
        for (i, j, k), (at_d, at_h, at_w) in taps(case):
            if not mask[o, c, i, j, k]:
                continue
            y[:, o] += weight[o, c, i, j, k] * padded[:, source, at_d, at_h, at_w]
            dx[:, source, at_d, at_h, at_w] += weight[o, c, i, j, k] * g[:, o]
            dw[o, c, i, j, k] = (g[:, o] * padded[:, source, at_d, at_h, at_w]).sum()
    y += bias[:, None, None, None]
    inner = tuple(slice(p, p + n) for p, n in zip(case.padding, case.grid, strict=True))
    return y, dx[(slice(None), slice(None), *inner)], dw, g.sum(axis=(0, 2, 3, 4))


def operands(case: Case, density: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves x, weight and bias, the mask, and a gradient of the output; float32."""
    x, weight, bias = make_inputs(case, torch.float32)
    mask = make_mask(tuple(weight.shape), density)
    grad = torch.randn(
        case.batch, case.c_out, *case.out, generator=torch.Generator().manual_seed(11)
    )
    return [x, weight, bias], mask, grad


def run_op(
    leaves: list[Tensor], mask: Tensor, grad: Tensor, case: Case, backend: str = "cpu", **more: Any
) -> list[Tensor]:
    """Output, and the gradients of all leaves."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = masked_conv3d(
        leaves[0], leaves[1], mask, leaves[2], backend=backend, **case.options, **more
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]
