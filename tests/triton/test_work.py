"""Counts of the cost model against what the interpreter executes in the same launch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.kernels.masked_conv3d import gpu_cost, gpu_plan, gpu_work, launches, triton_passes
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_plan import Plan, Settings, Tile
from sparsekit.kernels.masked_conv3d.tiles import Kind

ONES = (1, 1, 1)
TILE = Tile(16, 16, 32)

Measured = dict[str, Any]


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """Counts of every launch, by kernel; only the interpreter can count."""
    if device != "cpu":
        pytest.skip("the counts are of Triton's interpreter: TRITON_INTERPRET=1")
    from tests.triton.counters import counted

    found: Measured = {}

    def counting(name: str) -> None:
        kernel = getattr(triton_passes, name)

        class Counting:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*arguments: Any, **options: Any) -> None:
                    with counted() as counts:
                        kernel[grid](*arguments, **options)
                    found.setdefault(name, []).append(counts)

                return launch

        monkeypatch.setattr(triton_passes, name, Counting())

    for name in ("gather_product", "weight_gradient"):
        counting(name)
    return found


def block_mask(c_out: int, c_in: int, block: int, keep: float) -> Tensor:
    random = torch.Generator().manual_seed(5)
    blocks = torch.rand((c_out // block, c_in // block, 3, 3, 3), generator=random) < keep
    return blocks.repeat_interleave(block, 0).repeat_interleave(block, 1)


def run(shape: Shape, settings: Settings, mask: Tensor, samples: int) -> Plan:
    random = torch.Generator().manual_seed(6)
    plan = gpu_plan.make(mask, shape, settings)
    x = torch.randn((samples, shape.c_in, *shape.size), generator=random)
    weight = torch.randn(mask.shape, generator=random)
    bias = torch.randn(shape.c_out, generator=random)
    y = torch.empty((samples, shape.c_out, *shape.out))
    source = launches.pack_source(x, plan)
    launches.forward(source, weight, mask, bias, plan, y, precision="ieee")
    launches.backward(
        y, source, weight, mask, plan, precision="ieee", need_x=True, need_weight=True
    )
    return plan


@pytest.mark.parametrize("width", [16, 1])
@pytest.mark.parametrize("stride", [ONES, (2, 1, 2)])
def test_counts_equal_those_of_the_interpreter(
    width: int, stride: tuple[int, int, int], launched: Measured
) -> None:
    shape = Shape(18, 20, (3, 5, 4), (3, 3, 3), stride, ONES, ONES, 1)
    mask = torch.rand((20, 18, 3, 3, 3), generator=torch.Generator().manual_seed(1)) < 0.02
    plan = run(shape, Settings(TILE, TILE, TILE, width, width), mask, 2)
    forward, *backward = launched["gather_product"]
    expected = [gpu_work.product(plan.forward, TILE, 2, 20, torch.float32, bias=True)]
    expected += [
        gpu_work.product(launch, TILE, 2, 18, torch.float32, bias=False) for launch in plan.backward
    ]
    for counts, work in zip([forward, *backward], expected, strict=True):
        assert (counts.loaded, counts.products) == (work.loaded, work.products)
    assert sum(c.stored for c in backward) == sum(w.stored for w in expected[1:])
    assert forward.stored == expected[0].stored
    (counts,) = launched["weight_gradient"]
    work = gpu_work.weight_gradient(plan, 2, torch.float32)
    assert (counts.loaded, counts.stored, counts.products) == (
        work.loaded, work.stored, work.products,
    )  # fmt: skip


@pytest.mark.parametrize("block", [16, 32])
def test_executed_work_of_block_masks_follows_density(block: int, launched: Measured) -> None:
    shape = Shape(64, 64, (2, 4, 4), (3, 3, 3), ONES, ONES, ONES, 1)
    mask = block_mask(64, 64, block, 0.15)
    tile = Tile(block, 16, 32)
    plan = run(shape, Settings(tile, tile, tile, block, block), mask, 1)
    dense = 2 * 32 * mask.numel()
    density = float(mask.float().mean())
    passes = [
        (launched["gather_product"][0],
         gpu_work.product(plan.forward, tile, 1, 64, torch.float32, bias=True)),
        (launched["gather_product"][1],
         gpu_work.product(plan.backward[0], tile, 1, 64, torch.float32, bias=False)),
        (launched["weight_gradient"][0], gpu_work.weight_gradient(plan, 1, torch.float32)),
    ]  # fmt: skip
    for counts, work in passes:
        assert counts.products == work.products
        executed = counts.products - work.filling
        assert abs(executed - density * dense) <= 0.05 * density * dense


def test_the_model_counts_the_same_columns(launched: Measured) -> None:
    del launched
    mask = block_mask(32, 48, 16, 0.2)
    shape = Shape(48, 32, (4, 4, 4), (3, 3, 3), ONES, ONES, ONES, 1)
    listed = gpu_cost.count_columns(mask, 1)
    for (rows, width), columns in listed.forward.items():
        tile = Tile(rows, 16, 32)
        plan = gpu_plan.make(mask, shape, Settings(tile, tile, tile, width, width))
        assert int(plan.forward.lists.counts.sum()) == columns
        assert int(plan.backward[0].lists.counts.sum()) == listed.backward[rows, width]
    kind = Kind("sm_90", torch.bfloat16, "ieee")
    choice = gpu_cost.decide(shape, 1, kind, listed, train=True)
    assert choice.settings.width >= 16
    assert choice.settings.gradient_width >= 16
