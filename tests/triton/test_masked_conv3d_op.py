"""masked_conv3d with backend "triton" and "auto": the public op over the kernels."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsekit import explain, masked_conv3d, sparsify
from sparsekit.errors import BackendError
from sparsekit.kernels import dispatch
from sparsekit.kernels.masked_conv3d import gpu_autograd, gpu_cost, gpu_plans
from sparsekit.kernels.masked_conv3d.gpu_plans import GpuPlans
from sparsekit.nn import MaskedConv3d

CUDNN: Any = torch.backends.cudnn
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def no_records() -> Iterator[None]:
    dispatch.clear_records()
    yield
    dispatch.clear_records()


@pytest.fixture(autouse=True)
def all_bits() -> Iterator[None]:
    """Ask torch not to round float32 to tf32; put back what it was asked before."""
    before = CUDNN.conv.fp32_precision
    CUDNN.conv.fp32_precision = "ieee"
    yield
    CUDNN.conv.fp32_precision = before


@pytest.fixture
def kernels_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model find the kernels faster: what is small enough to test never is."""
    monkeypatch.setattr(gpu_cost, "_MARGIN", 1e-9)
    monkeypatch.setattr(gpu_cost, "_MARGIN_OTHER", 1e-9)


@pytest.fixture
def inputs(device: str) -> Inputs:
    random = torch.Generator().manual_seed(2)
    x = torch.randn((1, 3, 4, 3, 5), generator=random)
    weight = torch.randn((5, 3, 3, 3, 3), generator=random)
    mask = torch.rand(weight.shape, generator=random) < 0.3
    bias = torch.randn(5, generator=random)
    x, weight, bias = (t.to(device).requires_grad_() for t in (x, weight, bias))
    return x, weight, mask.to(device), bias


def gradients(y: Tensor, inputs: Inputs) -> list[Tensor]:
    x, weight, _, bias = inputs
    random = torch.Generator().manual_seed(4)
    g = torch.randn(y.shape, generator=random).to(y)
    return list(torch.autograd.grad(y, (x, weight, bias), g))


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("kernels_chosen")
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_values_gradients_and_what_explain_says(backend: str, inputs: Inputs, device: str) -> None:
    if backend == "auto" and device == "cpu":
        pytest.skip("auto takes Numba's kernels on a CPU; ttsem runs this case")
    y = masked_conv3d(*inputs, padding=1, precision="auto", backend=backend)
    right = masked_conv3d(*inputs, padding=1, backend="reference")
    same([y, *gradients(y, inputs)], [right, *gradients(right, inputs)])
    (found,) = [r for r in explain().calls if r.backend != "reference"]
    assert found.backend == "triton"
    assert ("named by the caller" if backend == "triton" else "modelled for") in found.reason


@pytest.mark.usefixtures("kernels_chosen")
def test_a_call_compares_the_mask_once(
    inputs: Inputs, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        pytest.skip("auto takes Numba's kernels on a CPU; ttsem runs this case")
    masked_conv3d(*inputs)
    equal, compared = torch.equal, []

    def counting(a: Tensor, b: Tensor) -> bool:
        compared.append(a.shape)
        return equal(a, b)

    monkeypatch.setattr(torch, "equal", counting)
    masked_conv3d(*inputs)
    assert len(compared) == 1
    # The next call looks again.
    inputs[2].data.logical_not_()
    y = masked_conv3d(*inputs)
    torch.testing.assert_close(y, masked_conv3d(*inputs, backend="reference"), rtol=1e-5, atol=1e-5)


def test_auto_precision_follows_torch(
    inputs: Inputs, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_plans.kind_of(inputs[0], "auto").precision == "ieee"
    assert gpu_plans.kind_of(inputs[0], "tf32x3").precision == "tf32x3"
    assert gpu_plans.kind_of(inputs[0].half(), "auto").precision == "ieee"
    CUDNN.conv.fp32_precision = "tf32"
    expected = "tf32" if device == "cuda" else "ieee"
    assert gpu_plans.kind_of(inputs[0], "auto").precision == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    mi300 = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: mi300)
    assert gpu_plans.kind_of(inputs[0], "auto").precision == "ieee"
    with pytest.raises(BackendError, match="no 'tf32' on AMD GPUs; use 'bf16x3'"):
        masked_conv3d(*inputs, precision="tf32", backend="triton")


def test_auto_leaves_small_layers_to_the_dense_path(inputs: Inputs, device: str) -> None:
    if device == "cpu":
        pytest.skip("auto takes Numba's kernels on a CPU; ttsem runs this case")
    masked_conv3d(*inputs, padding=1)
    (found,) = explain().calls
    assert found.backend == "dense"
    assert "dense" in found.reason


@pytest.mark.parametrize("choose", [False, True])
@pytest.mark.parametrize("voxels", [False, True])
def test_opcheck(choose: bool, voxels: bool, device: str) -> None:
    if device != "cpu":
        pytest.skip("torch's checks of operators need real devices; the interpreter runs this case")
    x = torch.randn(1, 2, 3, 2, 3, requires_grad=True)
    weight = torch.randn(2, 2, 3, 1, 1, requires_grad=True)
    mask = torch.rand(weight.shape) < 0.5
    voxel_mask = torch.rand(1, 1, 3, 2, 3) < 0.5 if voxels else None
    sizes = [1, 1, 1], [1, 0, 0], [1, 1, 1], 1
    arguments = x, weight, mask, None, *sizes, voxel_mask, "auto", True, choose
    torch.library.opcheck(torch.ops.sparsekit.triton_masked_conv3d, arguments)


@pytest.mark.usefixtures("kernels_chosen")
@pytest.mark.parametrize("choose", [False, True])
def test_operator_equals_the_eager_function(choose: bool, inputs: Inputs) -> None:
    x, weight, mask, bias = inputs
    y = torch.ops.sparsekit.triton_masked_conv3d(
        x, weight, mask, bias, [1, 1, 1], [1, 1, 1], [1, 1, 1], 1, None, "auto", True, choose
    )
    right = masked_conv3d(*inputs, padding=1, backend="reference")
    same([y, *gradients(y, inputs)], [right, *gradients(right, inputs)])


def test_operator_may_take_the_dense_path(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cost, "_MARGIN", 1e9)
    monkeypatch.setattr(gpu_cost, "_MARGIN_OTHER", 1e9)
    monkeypatch.delattr(gpu_autograd, "launches")
    x, weight, mask, bias = inputs
    y = torch.ops.sparsekit.triton_masked_conv3d(
        x, weight, mask, bias, [1, 1, 1], [1, 1, 1], [1, 1, 1], 1, None, "auto", True, True
    )
    right = masked_conv3d(*inputs, padding=1, backend="reference")
    same([y, *gradients(y, inputs)], [right, *gradients(right, inputs)])


def test_torch_compile_sees_an_operator(inputs: Inputs, device: str) -> None:
    if device != "cpu":
        pytest.skip("torch.compile needs real devices; the interpreter runs this case")

    def block(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return masked_conv3d(x, weight, mask, bias, padding=1, backend="triton").relu()

    torch.compiler.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    y, right = compiled(*inputs), block(*inputs)
    same([y, *gradients(y, inputs)], [right, *gradients(right, inputs)])


def test_a_changed_mask_gets_new_lists(inputs: Inputs) -> None:
    x, weight, mask, bias = (t.detach() for t in inputs)
    masked_conv3d(x, weight, mask, bias, backend="triton")
    plans = GpuPlans.of(mask)
    assert GpuPlans.of(mask) is plans
    # Past the count of changes that torch keeps.
    mask.data.copy_(~mask)
    assert GpuPlans.of(mask) is not plans
    y = masked_conv3d(x, weight, mask, bias, backend="triton")
    right = masked_conv3d(x, weight, mask, bias, backend="reference")
    torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)


def test_a_mask_changed_before_the_backward_pass_is_refused(inputs: Inputs) -> None:
    y = masked_conv3d(*inputs, backend="triton")
    inputs[2].logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_computes_in_the_lower_type(inputs: Inputs, device: str) -> None:
    if device == "cpu":
        pytest.skip("Triton's interpreter computes bfloat16 wrongly; ttsem runs this case")
    with torch.autocast("cuda", dtype=torch.float16):
        y = masked_conv3d(*inputs, padding=1, backend="triton")
    assert y.dtype == torch.float16
    right = masked_conv3d(*inputs, padding=1, backend="reference")
    torch.testing.assert_close(y.float(), right, rtol=5e-3, atol=5e-3)


def test_float64_is_for_the_reference(inputs: Inputs) -> None:
    x, weight, mask, bias = inputs
    wide = x.double(), weight.double(), mask, bias.double()
    with pytest.raises(BackendError, match="are for float32, float16 and bfloat16"):
        masked_conv3d(*wide, backend="triton")


def test_volumes_beyond_the_offsets_are_refused(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plans, "MOST_ELEMENTS", 1000)
    with pytest.raises(BackendError, match="offsets reach 1000; cut the volume into blocks"):
        masked_conv3d(*inputs, backend="triton")


def test_an_empty_mask_and_an_empty_batch(inputs: Inputs) -> None:
    x, weight, mask, bias = inputs
    y = masked_conv3d(x, weight, torch.zeros_like(mask), bias, backend="triton")
    assert torch.equal(y, bias.view(1, -1, 1, 1, 1).expand_as(y))
    empty = masked_conv3d(x[:0], weight, mask, bias)
    assert empty.shape == (0, 5, 2, 1, 3)


@pytest.mark.usefixtures("kernels_chosen")
def test_a_sparsified_module_runs_the_kernels(device: str) -> None:
    if device == "cpu":
        pytest.skip("auto takes Numba's kernels on a CPU; ttsem runs this case")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 1)).to(device)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.ndim == 5}
    right = nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 1))
    with torch.no_grad():
        for (name, to), value in zip(
            right.named_parameters(), model.state_dict().values(), strict=True
        ):
            to.copy_(value * masks[name] if name in masks else value)
    sparse = sparsify(model)
    for name, mask in masks.items():
        layer = sparse.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, MaskedConv3d)
        layer.set_mask(mask.to(device))
    x = torch.randn(1, 2, 3, 4, 3).to(device)
    torch.testing.assert_close(sparse(x), right.to(device)(x), rtol=1e-5, atol=1e-5)
    assert {r.backend for r in explain().calls} == {"triton"}
