"""The Triton kernels of masked_conv3d against torch in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparsekit.kernels.masked_conv3d import gpu_plan, launches
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_plan import Plan, Settings, Tile
from sparsekit.kernels.masked_conv3d.strips import Strips
from sparsekit.types import Size3
from tests.kernels.convolutions import DENSITIES, make_mask
from tests.tolerances import TOLERANCES

ONES: Size3 = (1, 1, 1)
ZEROS: Size3 = (0, 0, 0)


@dataclass(frozen=True)
class Case:
    samples: int = 1
    c_in: int = 3
    c_out: int = 5
    size: Size3 = (5, 6, 7)
    kernel: Size3 = (3, 3, 3)
    stride: Size3 = ONES
    padding: Size3 = ZEROS
    dilation: Size3 = ONES
    groups: int = 1

    @property
    def shape(self) -> Shape:
        return Shape(
            self.c_in, self.c_out, self.size, self.kernel, self.stride, self.padding,
            self.dilation, self.groups,
        )  # fmt: skip


CASES = {
    "plain": Case(),
    "same-size": Case(padding=ONES, c_in=18, c_out=17, size=(3, 4, 5)),
    "one-voxel-out": Case(c_in=1, c_out=1, size=(3, 3, 3)),
    "all-ones": Case(c_in=1, c_out=1, size=ONES, kernel=ONES),
    "pointwise-prime": Case(size=(3, 5, 7), kernel=ONES),
    "flat": Case(size=(1, 7, 1), kernel=(1, 3, 1), padding=(0, 2, 0)),
    "empty-batch": Case(samples=0),
    "stride-2": Case(stride=(2, 2, 2), padding=ONES),
    "stride-uneven": Case(size=(7, 5, 6), stride=(3, 1, 2), padding=(2, 0, 1)),
    "stride-beyond-kernel": Case(size=(7, 7, 7), kernel=ONES, stride=(3, 3, 3)),
    "dilated": Case(size=(5, 4, 5), dilation=(2, 1, 3), padding=(2, 1, 3)),
    "groups-2": Case(c_in=4, c_out=6, groups=2, padding=ONES, size=(3, 4, 3)),
    "depthwise": Case(samples=2, c_in=3, c_out=3, groups=3, stride=(2, 1, 1)),
    "everything": Case(
        2, 4, 4, (5, 7, 6), (2, 3, 2), (2, 1, 3), (1, 2, 3), (3, 2, 1), 2
    ),
}  # fmt: skip
# (channels of a run forward, backward): wide accesses both ways, one way, not at all.
WIDTHS = ((16, 16), (1, 1))
MIXED = ((16, 1), (1, 16))


def small(width: int, gradient_width: int) -> Settings:
    """Tiles so small that little tensors fill several."""
    tile = Tile(16, 16, 32)
    return Settings(tile, tile, tile, width, gradient_width)


def drawn(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, weight, bias and gradient of the output, as float64 with values that `dtype` has."""
    random = torch.Generator().manual_seed(7)
    sizes = (
        (case.samples, case.c_in, *case.size),
        (case.c_out, case.c_in // case.groups, *case.kernel),
        (case.c_out,),
        (case.samples, case.c_out, *case.shape.out),
    )
    x, weight, bias, g = (
        torch.randn(size, generator=random, dtype=torch.float64).to(dtype).double()
        for size in sizes
    )
    return x, weight, bias, g


def exact(
    case: Case, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor, g: Tensor,
    voxels: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = functional.conv3d(
        x, torch.where(mask, weight, 0.0), bias, case.stride, case.padding, case.dilation,
        case.groups,
    )  # fmt: skip
    if voxels is not None:
        y = torch.where(voxels[:, None], y, 0.0)
    dx, dw = torch.autograd.grad(y, (x, weight), g)
    return {"forward": y.detach(), "input": dx, "weight": dw}


def run(
    case: Case, settings: Settings, mask: Tensor, dtype: torch.dtype, device: str,
    precision: str = "ieee", voxels: Tensor | None = None, last: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Plan]:  # fmt: skip
    """What the kernels compute, what is right, and the plan."""
    x, weight, bias, g = drawn(case, dtype)
    right = exact(case, x, weight, mask, bias, g, voxels)
    plan = gpu_plan.make(mask.to(device), case.shape, settings)
    own_x, own_weight, own_bias, own_g = (t.to(dtype).to(device) for t in (x, weight, bias, g))
    own_mask = mask.to(device)
    own_voxels = None if voxels is None else voxels.to(device)
    if last:
        own_x = own_x.contiguous(memory_format=torch.channels_last_3d)
    source = launches.pack_source(own_x, plan)
    y = torch.empty(
        (case.samples, case.c_out, *case.shape.out), dtype=dtype, device=device,
        memory_format=torch.channels_last_3d if last else torch.contiguous_format,
    )  # fmt: skip
    launches.forward(
        source, own_weight, own_mask, own_bias, plan, y,
        precision=precision, voxel_mask=own_voxels,
    )  # fmt: skip
    if own_voxels is not None:
        y.masked_fill_(~own_voxels[:, None], 0.0)
        own_g = torch.where(own_voxels[:, None], own_g, 0.0)
    found = launches.backward(
        own_g, source, own_weight, own_mask, plan,
        precision=precision, need_x=True, need_weight=True, voxel_mask=own_voxels,
    )  # fmt: skip
    assert found.x is not None
    assert found.weight is not None
    got = {"forward": y, "input": found.x, "weight": found.weight}
    return {name: tensor.cpu().double() for name, tensor in got.items()}, right, plan


def agree(
    got: dict[str, Tensor], right: dict[str, Tensor], dtype: torch.dtype,
    op: str = "masked_conv3d_triton",
) -> None:  # fmt: skip
    for name, expected in right.items():
        assert got[name].shape == expected.shape
        assert torch.isfinite(got[name]).all(), name
        if expected.numel() == 0:
            continue
        limit = TOLERANCES[op, dtype, name] * max(float(expected.abs().max()), 1e-30)
        worst = float((got[name] - expected).abs().max())
        assert worst <= limit, f"{name}: error {worst:.3g} above {limit:.3g}"


GRID = [
    pytest.param(name, density, widths, id=f"{name}-{density}-{widths[0]}-{widths[1]}")
    for name in CASES
    for density in DENSITIES
    for widths in (*WIDTHS, *(MIXED if density == "half" else ()))
]


@pytest.mark.parametrize(("name", "density", "widths"), GRID)
def test_output_and_gradients(
    name: str, density: str, widths: tuple[int, int], device: str
) -> None:
    case = CASES[name]
    mask = make_mask((case.c_out, case.c_in // case.groups, *case.kernel), density)
    got, right, _ = run(case, small(*widths), mask, torch.float32, device)
    agree(got, right, torch.float32)
    # Not only small: exactly 0.
    assert not got["weight"][~mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 16), (1, 1)], ids=["runs", "columns"])
def test_half_types_add_up_in_float32(
    dtype: torch.dtype, widths: tuple[int, int], device: str, sanitized: bool
) -> None:
    if dtype == torch.bfloat16 and device == "cpu" and not sanitized:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; ttsem runs this case")
    case = Case(c_in=18, c_out=17, padding=ONES, size=(3, 3, 4))
    mask = make_mask((17, 18, 3, 3, 3), "half")
    got, right, _ = run(case, small(*widths), mask, dtype, device)
    agree(got, right, dtype)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "bf16x3"])
def test_precision_modes(precision: str, device: str, sanitized: bool) -> None:
    if device == "cpu" and not sanitized:
        pytest.skip("Triton's interpreter computes every mode in float32; ttsem runs this case")
    case = Case(c_in=18, c_out=17, padding=ONES, size=(3, 3, 4))
    mask = make_mask((17, 18, 3, 3, 3), "half")
    got, right, _ = run(case, small(16, 16), mask, torch.float32, device, precision)
    agree(got, right, torch.float32, f"masked_conv3d_triton {precision}")


@pytest.mark.parametrize("widths", [(16, 16), (1, 1)], ids=["runs", "columns"])
@pytest.mark.parametrize("name", ["plain", "stride-uneven", "dilated", "everything"])
@pytest.mark.parametrize("density", ["none", "one", "some", "all"])
def test_voxel_mask_skips_tiles_and_nothing_else(
    name: str, density: str, widths: tuple[int, int], device: str
) -> None:
    case = CASES[name]
    voxels = torch.zeros((case.samples, *case.shape.out), dtype=torch.bool)
    if density == "one":
        voxels[-1, -1, -1, -1] = True
    elif density == "some":
        voxels[:, : (voxels.shape[1] + 1) // 2, 0] = True
    elif density == "all":
        voxels.fill_(True)
    mask = make_mask((case.c_out, case.c_in // case.groups, *case.kernel), "half")
    got, right, _ = run(case, small(*widths), mask, torch.float32, device, voxels=voxels)
    agree(got, right, torch.float32)


@pytest.mark.parametrize("rows", [32, 64])
def test_tiles_wider_than_the_filters(rows: int, device: str) -> None:
    case = Case(c_in=5, c_out=37, kernel=(2, 2, 2), size=(4, 3, 5))
    tile = Tile(rows, 32, 32)
    settings = Settings(tile, tile, tile, 32, 32)
    mask = make_mask((37, 5, 2, 2, 2), "half")
    got, right, _ = run(case, settings, mask, torch.float32, device)
    agree(got, right, torch.float32)


def test_channels_last_in_and_out(device: str) -> None:
    case = Case(samples=2, padding=ONES, size=(2, 3, 5))
    mask = make_mask((5, 3, 3, 3, 3), "half")
    got, right, _ = run(case, small(16, 16), mask, torch.float32, device, last=True)
    agree(got, right, torch.float32)


def test_pruned_values_take_part_in_nothing(device: str) -> None:
    case = Case()
    mask = make_mask((5, 3, 3, 3, 3), "half")
    x, weight, bias, g = drawn(case, torch.float32)
    right = exact(case, x, weight, mask, bias, g)
    poisoned = torch.where(mask, weight, float("nan")).float().to(device)
    plan = gpu_plan.make(mask.to(device), case.shape, small(1, 1))
    source = launches.pack_source(x.float().to(device), plan)
    y = torch.empty(right["forward"].shape, device=device)
    kept = mask.to(device)
    launches.forward(source, poisoned, kept, bias.float().to(device), plan, y, precision="ieee")
    found = launches.backward(
        g.float().to(device), source, poisoned, kept, plan,
        precision="ieee", need_x=True, need_weight=True,
    )  # fmt: skip
    assert found.x is not None
    assert found.weight is not None
    got = {"forward": y, "input": found.x, "weight": found.weight}
    agree({k: v.cpu().double() for k, v in got.items()}, right, torch.float32)


# NumPy under the interpreter warns of infinities times 0.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_infinities_outside_the_output_reach_no_weight(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Strips of twice the grid's height: numbers beyond the output have places in the input.
    monkeypatch.setattr(gpu_plan, "strips_of", lambda grid, n: Strips(grid, (2, 1), n))
    case = Case(c_in=1, c_out=1, size=(2, 1, 6), kernel=(2, 1, 1))
    mask = make_mask((1, 1, 2, 1, 1), "all")
    x, weight, bias, g = drawn(case, torch.float32)
    x[:, :, 1] = float("inf")
    right = exact(case, x, weight, mask, bias, g)
    plan = gpu_plan.make(mask.to(device), case.shape, small(1, 1))
    source = launches.pack_source(x.float().to(device), plan)
    found = launches.backward(
        g.float().to(device), source, weight.float().to(device), mask.to(device), plan,
        precision="ieee", need_x=False, need_weight=True,
    )  # fmt: skip
    assert found.weight is not None
    finite = torch.isfinite(right["weight"])
    assert finite.view(-1).tolist() == [True, False]
    torch.testing.assert_close(found.weight.cpu()[finite].double(), right["weight"][finite])
