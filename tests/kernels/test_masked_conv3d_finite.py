"""What is not finite: where the CPU kernels of the masked convolution may and must pass it on."""

import pytest
import torch
from torch import Tensor

from sparsekit.ops import masked_conv3d
from tests.kernels.convolutions import Case, operands, run_op


def reached(case: Case, mask: Tensor, x: Tensor) -> Tensor:
    """Output voxels that an unpruned weight connects with a number that is not finite."""
    y: Tensor = torch.nn.functional.conv3d(
        (~x.isfinite()).double(), mask.double(), None, *case.options.values()
    )
    return y > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("density", ["half", "all"])
def test_the_output_is_not_finite_where_it_must_be(value: float, stride: int, density: str) -> None:
    """And nowhere else: neighbours in memory are not neighbours in space."""
    case = Case(2, 3, 4, (5, 6, 17), padding=(1, 0, 2), stride=(stride, stride, stride))
    leaves, mask, _ = operands(case, density)
    for place in [(0, 0, 0, 0, 0), (0, 2, 4, 5, 16), (1, 1, 2, 3, 8), (0, 1, 3, 5, 0)]:
        x = leaves[0].detach().clone()
        x[place] = value
        y, plain = (
            masked_conv3d(t, leaves[1], mask, leaves[2], backend=backend, **case.options).detach()
            for t, backend in ((x, "cpu"), (leaves[0], "cpu"))
        )
        wanted = reached(case, mask, x)
        assert torch.equal(~y.isfinite(), wanted)
        assert torch.equal(y[~wanted], plain[~wanted])
        if density == "all":
            # Without pruned weights, torch has the same to say about every voxel.
            with torch.no_grad():
                same = masked_conv3d(
                    x, leaves[1], mask, leaves[2], backend="reference", **case.options
                )
            torch.testing.assert_close(y, same, equal_nan=True)


def agree_where_finite(found: Tensor, plain: Tensor) -> None:
    """Weight gradients multiply zeros with numbers of the channel that comes next in memory."""
    fine = found.isfinite()
    assert float(fine.float().mean()) > 0.5
    assert torch.equal(found[fine], plain[fine])


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_not_finite_where_torch_says_so(stride: int) -> None:
    """The weight's may be so at more taps of the same filters: border taps multiply zeros."""
    case = Case(2, 3, 4, (5, 6, 17), padding=(1, 0, 2), stride=(stride, stride, stride))
    leaves, mask, grad = operands(case, "half")
    full = torch.ones_like(mask)
    plain = run_op(leaves, mask, grad, case)
    for place in [(0, 0, 0, 0, 0), (1, 1, 1, 1, 3)]:
        dirty = grad.clone()
        dirty[place] = float("nan")
        found = run_op(leaves, full, dirty, case)
        wanted = run_op(leaves, full, dirty, case, "reference")
        assert torch.equal(found[1].isnan(), wanted[1].isnan())
        assert torch.equal(found[3].isnan(), wanted[3].isnan())
        assert bool((found[2].isnan() | ~wanted[2].isnan()).all())
        found = run_op(leaves, mask, dirty, case)
        assert not bool(found[2][~mask].any())
        others = [o for o in range(4) if o != place[1]]
        agree_where_finite(found[2][others], plain[2][others])
    x = leaves[0].detach().clone()
    x[1, 2, 2, 3, 8] = float("nan")
    found = run_op([x, *leaves[1:]], mask, grad, case)
    wanted = run_op([x, *leaves[1:]], mask, grad, case, "reference")
    assert torch.equal(found[1], plain[1])
    assert bool((found[2].isnan() | ~wanted[2].isnan()).all())
    assert not bool(found[2][~mask].any())
    agree_where_finite(found[2][:, :2], plain[2][:, :2])
