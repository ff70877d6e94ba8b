import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsekit import masked_conv3d
from sparsekit.kernels import dispatch, implementations
from sparsekit.kernels.masked_conv3d import cost, geometry, selector
from sparsekit.kernels.masked_conv3d.cost import Call, Gradients
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.nn import MaskedConv3d
from sparsekit.ops import conv_norm_pool_relu, explain

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/selector.json"
SHAPES = {
    "conv2": Shape(32, 64, (45, 54, 45), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "conv4": Shape(128, 256, (11, 13, 11), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "first": Shape(1, 8, (46, 55, 46), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "narrow": Shape(8, 16, (23, 27, 23), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "tiny": Shape(4, 8, (4, 4, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "neck": Shape(256, 64, (2, 3, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1),
    "strided": Shape(16, 32, (20, 21, 22), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1), 1),
    "dilated": Shape(16, 32, (20, 21, 22), (3, 2, 3), (1, 1, 1), (2, 1, 2), (2, 1, 2), 1),
    "grouped": Shape(16, 32, (20, 21, 22), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 4),
    "depthwise": Shape(32, 32, (20, 21, 22), (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 32),
}
EVERY_GRADIENTS: tuple[Gradients, ...] = ("none", "weight", "input", "both")


@pytest.fixture
def forget() -> Iterator[None]:
    """Decisions under other coefficients must not stay."""
    yield
    selector.forget()


def _favour(monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """Make one side look 1e6 times cheaper."""
    scaled = {
        model: {
            name: value * (1e-6 if model.startswith(side) else 1.0)
            for name, value in work.items()
        }
        for model, work in cost.coefficients().items()
    }  # fmt: skip
    monkeypatch.setattr(cost, "coefficients", lambda: scaled)
    selector.forget()


def _calls() -> Iterator[Call]:
    for name, shape in SHAPES.items():
        ops: list[cost.Op] = ["masked_conv3d"]
        if min(shape.out) >= 2 and name != "neck":
            ops.append("conv_norm_pool_relu")
        yield from (
            Call(op, shape, samples, gradients, threads)
            for op, samples, gradients, threads in itertools.product(
                ops, (1, 4), EVERY_GRADIENTS, (1, 2)
            )
        )


def test_a_sparser_mask_never_goes_back_to_the_dense_path() -> None:
    densities = [0.0, 1e-3, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0]
    kinds = set()
    for call in _calls():
        seconds = [cost.kernel_seconds(call, density) for density in densities]
        assert seconds == sorted(seconds), call
        dense = [selector.decide(call, density).dense for density in densities]
        assert dense == sorted(dense), call
        kinds.add(tuple(dense))
    # All dense, all kernels, and something between.
    assert len(kinds) > 2


def test_predictions_are_positive_and_follow_the_work() -> None:
    for call in _calls():
        assert cost.kernel_seconds(call, 0.1) > 0
        assert cost.dense_seconds(call, 0.1) > 0
        if call.gradients != "none":
            forward = replace(call, gradients="none")
            assert cost.dense_seconds(call, 0.1) > cost.dense_seconds(forward, 0.1), call
        assert cost.dense_seconds(call, 1.0) <= cost.dense_seconds(call, 0.99), call
        if call.samples == 4:
            one = replace(call, samples=1)
            assert cost.kernel_seconds(call, 0.1) > cost.kernel_seconds(one, 0.1), call


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_takes_the_convolution_that_the_model_thinks(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {
            (path, backend)
            for shape in _around_the_rule()
            for samples in (1, 2, 16)
            for path, backend in [_paths_of(shape, samples, threads)]
        }
    finally:
        torch.set_num_threads(before)
    assert {path for path, _ in found} == {"own", "onednn"}
    for path, backend in found:
        assert (backend == "Mkldnn") == (path == "onednn"), (path, backend)


def _around_the_rule() -> Iterator[Shape]:
    yield from SHAPES.values()
    # 20 * 32 * 32 = 20480 exactly, and one more plane.
    for c_in, kernel, stride, groups in itertools.product((20, 21), (1, 3, 5), (1, 2), (1,)):
        k, s, p = kernel, stride, kernel // 2
        yield Shape(
            c_in, 24, (32, 32, 3), (k, k, k), (s, s, s), (p, p, p), (1, 1, 1), groups
        )  # fmt: skip
    yield Shape(8, 8, (6, 6, 6), (1, 5, 5), (1, 1, 1), (0, 2, 2), (1, 1, 1), 1)
    yield Shape(8, 8, (6, 6, 6), (5, 1, 1), (1, 1, 1), (2, 0, 0), (1, 1, 1), 1)
    yield Shape(8, 8, (6, 6, 6), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 8)
    yield Shape(40, 8, (32, 32, 4), (3, 3, 3), (1, 1, 1), (2, 2, 2), (2, 2, 2), 1)


def _paths_of(shape: Shape, samples: int, threads: int) -> tuple[str, str]:
    x = torch.empty(samples, shape.c_in, *shape.size)
    weight = torch.empty(shape.c_out, shape.c_in // shape.groups, *shape.kernel)
    taken = torch._C._select_conv_backend(
        x, weight, None, list(shape.stride), list(shape.padding), list(shape.dilation), False,
        [0, 0, 0], shape.groups, None,
    )  # fmt: skip
    return cost.torch_path(shape, samples, threads, True), str(taken).rpartition(".")[2]


def _layer(density: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 9, 8, 7, generator=random)
    weight = torch.randn(6, 3, 3, 3, 3, generator=random)
    mask = torch.rand(weight.shape, generator=random) < density
    return x, weight, mask, torch.randn(6, generator=random)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize(("side", "taken"), [("dense", "dense"), ("kernels", "cpu")])
@pytest.mark.parametrize("op", [masked_conv3d, conv_norm_pool_relu])
def test_auto_follows_the_coefficients_and_says_why(
    monkeypatch: pytest.MonkeyPatch, side: str, taken: str, op: Any
) -> None:
    _favour(monkeypatch, side)
    dispatch.clear_records()
    x, weight, mask, bias = _layer()
    y = op(x, weight, mask, bias, padding=1)
    call = explain().calls[0]
    assert (call.op, call.backend) == (op.__name__, taken)
    assert call.reason.startswith("forward predicted at density 0.")
    assert "kernels" in call.reason
    assert "dense" in call.reason
    expected = op(x, weight, mask, bias, padding=1, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("side", ["dense", "kernels"])
def test_a_training_step_takes_one_path_both_ways(
    monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    _favour(monkeypatch, side)
    x, weight, mask, bias = (t.requires_grad_(t.is_floating_point()) for t in _layer())
    y = masked_conv3d(x, weight, mask, bias, padding=1)
    assert explain().calls[0].reason.startswith("forward and both gradients predicted")
    # The model turns round between the passes; the backward pass belongs to its forward pass.
    _favour(monkeypatch, "kernels" if side == "dense" else "dense")
    assert y.grad_fn is not None
    assert ("MaskedConv3d" in y.grad_fn.name()) == (side == "kernels")
    expected = masked_conv3d(x, weight, mask, bias, padding=1, backend="reference")
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(y, (x, weight, bias), seed)
    theirs = torch.autograd.grad(expected, (x, weight, bias), seed)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert not ours[1][~mask].any()


@pytest.mark.usefixtures("forget")
def test_named_kernels_always_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _favour(monkeypatch, "dense")
    x, weight, mask, bias = _layer()
    masked_conv3d(x, weight, mask, bias, backend="cpu")
    assert (explain().calls[0].backend, explain().calls[0].reason) == ("cpu", "named by the caller")


@pytest.mark.usefixtures("forget")
def test_a_changed_mask_is_decided_anew() -> None:
    layer = MaskedConv3d(16, 32, 3, padding=1)
    x = torch.randn(1, 16, 24, 24, 24)
    ones = (1, 1, 1)
    shape = Shape(16, 32, (24, 24, 24), (3, 3, 3), ones, ones, ones, 1)
    call = Call("masked_conv3d", shape, 1, "weight", torch.get_num_threads())
    for density in (1.0, 0.02):
        mask = torch.rand(layer.weight.shape) < density
        layer.set_mask(mask)
        decision = selector.decide(call, layer.density)
        layer(x)
        assert explain().calls[0].reason == decision.reason
        assert explain().calls[0].backend == ("dense" if decision.dense else "cpu")


@pytest.mark.parametrize(
    ("needs", "expected"),
    [((0, 0, 0), "none"), ((1, 0, 0), "input"), ((0, 1, 0), "weight"), ((0, 0, 1), "weight"),
     ((1, 1, 1), "both")],
)  # fmt: skip
def test_gradients_that_will_be_computed(needs: tuple[int, ...], expected: str) -> None:
    tensors = [torch.zeros(1, requires_grad=bool(need)) for need in needs]
    assert selector.gradients_of(*tensors) == expected
    with torch.no_grad():
        assert selector.gradients_of(*tensors) == "none"


@pytest.mark.usefixtures("forget")
@pytest.mark.parametrize("side", ["dense", "kernels"])
@pytest.mark.parametrize("with_voxels", [False, True])
def test_compiled_code_chooses_when_it_runs(
    monkeypatch: pytest.MonkeyPatch, side: str, with_voxels: bool
) -> None:
    _favour(monkeypatch, side)
    ran: list[tuple[str, str]] = []
    x, weight, mask, bias = _layer()
    voxels = torch.ones(9, 8, 7, dtype=torch.bool)
    voxels[:4] = not with_voxels
    decide = selector.decide_for

    def noted(*arguments: Any, **settings: Any) -> selector.Decision:
        decision = decide(*arguments, **settings)
        ran.append(("dense" if decision.dense else "kernels", arguments[4]))
        return decision

    monkeypatch.setattr(selector, "decide_for", noted)

    def step(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        return masked_conv3d(
            x, weight, mask, bias, padding=1, voxel_mask=voxels if with_voxels else None
        )

    weight.requires_grad_()
    bias.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    y = compiled(x, weight, mask, bias)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(y, (weight, bias), seed)
    assert ran == [(side, "weight")] * 2
    expected = masked_conv3d(
        x, weight, mask, bias, padding=1, voxel_mask=voxels if with_voxels else None,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(ours, torch.autograd.grad(expected, (weight, bias), seed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert not ours[0][~mask].any()


def test_a_mask_that_keeps_all_needs_no_selection() -> None:
    x, weight, _, bias = _layer()
    weight[0, 0, 0, 0, 0] = float("nan")
    dense = implementations.DENSE["masked_conv3d"].load()
    every = torch.ones_like(weight, dtype=torch.bool)
    shape = geometry.shape_of(x, weight, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    settings: dict[str, Any] = {"precision": "auto", "voxel_mask": None}
    y = dense(x, weight, every, bias, shape, **settings)
    assert torch.equal(y.isnan(), functional.conv3d(x, weight, bias, padding=1).isnan())
    every[0, 0, 0, 0, 0] = False
    assert not dense(x, weight, every, bias, shape, **settings).isnan().any()


def test_recorded_regret_is_within_five_percent() -> None:
    results = json.loads(RESULTS.read_text())
    for part in ("held_out", "fitted"):
        assert results["regret"][part]["median"] <= 0.05
    assert results["regret"]["held_out"]["choices"] >= 100
    shipped = json.loads(cost.COEFFICIENTS.read_text())
    # One command writes both files.
    for key, value in shipped.items():
        assert results[key] == value, key
    for case in results["worst"]:
        layer, gradients, threads, density = case["case"]
        k, s = layer["kernel"], layer["stride"]
        shape = Shape(
            layer["c_in"], layer["c_out"], tuple(layer["size"]), (k, k, k), (s, s, s),
            (k // 2,) * 3, (1, 1, 1), layer["groups"],
        )  # fmt: skip
        call = Call(layer["op"], shape, layer["samples"], gradients, threads)
        assert selector.decide(call, density).dense == (case["picked"] == "dense")


def test_a_network_of_others_is_decided_layer_by_layer() -> None:
    model = nn.Sequential(MaskedConv3d(1, 4, 3), nn.ReLU(), MaskedConv3d(4, 2, 1))
    dispatch.clear_records()
    with torch.no_grad():
        model(torch.randn(1, 1, 8, 8, 8))
    details = {call.detail: call for call in explain().calls}
    assert set(details) == {"(4, 1, 3, 3, 3) float32", "(2, 4, 1, 1, 1) float32"}
    assert all("predicted at density 1:" in call.reason for call in details.values())
