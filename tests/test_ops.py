"""What the ops accept and refuse; their values are tested in tests/kernels."""

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError, ArgumentTypeError, BackendError
from sparsekit.ops import conv_norm_pool_relu, masked_conv3d, topk_mask


def conv_arguments(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "x": torch.ones(2, 4, 5, 6, 7),
        "weight": torch.ones(6, 2, 3, 3, 3),
        "mask": torch.ones(6, 2, 3, 3, 3, dtype=torch.bool),
        "bias": torch.ones(6),
        "groups": 2,
    }
    return arguments | changes


def test_the_arguments_that_the_refusals_below_change_are_fine() -> None:
    assert masked_conv3d(**conv_arguments()).shape == (2, 6, 3, 4, 5)


def bools(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


CONV_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, ArgumentTypeError, "x: expected a Tensor, got list"),
    ({"x": torch.ones(4, 5, 6)}, ArgumentError, r"x: expected .* got shape \(4, 5, 6\)"),
    ({"x": torch.ones(2, 3, 5, 6, 7)}, ArgumentError, r"x: expected 4 channels .* got 3"),
    ({"x": torch.ones(2, 4, 5, 6, 7).int()}, ArgumentTypeError, r"x: expected a real floating"),
    ({"x": torch.ones(2, 4, 5, 6, 7) + 0j}, ArgumentTypeError, r"x: .* got torch\.complex64"),
    ({"x": torch.ones(2, 4, 2, 6, 7)}, ArgumentError, r"x: a \(2, 6, 7\) grid .* smaller than"),
    ({"x": torch.ones(2, 4, 5, 6, 7).double()}, ArgumentTypeError, "weight: expected the dtype"),
    ({"weight": torch.ones(6, 2, 3, 3)}, ArgumentError, r"weight: expected .* got shape \(6, 2"),
    ({"weight": torch.ones(6, 2, 3, 0, 3)}, ArgumentError, "weight: expected .* without empty"),
    ({"mask": bools(6, 2, 3, 3, 1)}, ArgumentError, "mask: expected the weight's shape"),
    ({"mask": torch.ones(6, 2, 3, 3, 3)}, ArgumentTypeError, r"mask: .* use mask\.bool\(\)"),
    ({"mask": bools(6, 2, 3, 3, 3).to("meta")}, ArgumentError, r"mask: .*mask\.to\(x\.device\)"),
    ({"bias": torch.ones(5)}, ArgumentError, r"bias: expected shape \(6,\), got \(5,\)"),
    ({"bias": torch.ones(6).double()}, ArgumentTypeError, "bias: expected the weight's dtype"),
    ({"groups": 0}, ArgumentError, "groups: expected a divisor of the 6 output channels, got 0"),
    ({"groups": 4}, ArgumentError, "groups: expected a divisor of the 6 output channels, got 4"),
    ({"stride": 0}, ArgumentError, "stride: expected an int >= 1 or 3 of them, got 0"),
    ({"stride": (1, 2)}, ArgumentError, r"stride: expected .* got \(1, 2\)"),
    ({"padding": -1}, ArgumentError, "padding: expected an int >= 0 or 3 of them, got -1"),
    ({"padding": "full"}, ArgumentError, "padding: expected 'same', 'valid' or numbers"),
    ({"padding": "same", "stride": 2}, ArgumentError, "padding: 'same' needs stride 1"),
    ({"dilation": 0}, ArgumentError, "dilation: expected an int >= 1"),
    ({"dilation": 3}, ArgumentError, r"kernel with dilation \(3, 3, 3\)"),
    ({"voxel_mask": bools(3, 4, 4)}, ArgumentError, r"output's grid \(3, 4, 5\)"),
    ({"voxel_mask": bools(3, 1, 3, 4, 5)}, ArgumentError, r"got \(3, 1, 3, 4, 5\)"),
    ({"voxel_mask": torch.ones(3, 4, 5)}, ArgumentTypeError, "voxel_mask: expected dtype bool"),
    ({"voxel_mask": bools(3, 4, 5).to("meta")}, ArgumentError, "voxel_mask: expected the device"),
    ({"precision": "fp8"}, ArgumentError, "precision: expected one of 'auto', 'ieee', 'tf32'"),
    ({"backend": "cuda"}, ArgumentError, "backend: expected 'auto', 'reference', 'cpu', 'triton'"),
    ({"backend": "triton"}, BackendError, "Triton kernels need tensors on a GPU"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), CONV_REFUSALS)
def test_masked_conv3d_refuses(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        masked_conv3d(**conv_arguments(**changes))


@pytest.mark.parametrize("op", [masked_conv3d, conv_norm_pool_relu])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "groups"])
@pytest.mark.parametrize("wrong", [1.0, True, (1.0, 1, 1), (True, 1, 1), None, torch.tensor(1)])
def test_what_only_equals_an_int_is_refused_always(op: Any, name: str, wrong: Any) -> None:
    """Also after a call with the int that it equals, which is kept."""
    x, weight = torch.ones(1, 2, 5, 6, 7), torch.ones(6, 2, 3, 3, 3)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for right in (1,) if name == "groups" else (1, (1, 1, 1), [1, np.int64(1), 1]):
        op(x, weight, mask, **{name: right})
        with pytest.raises(ArgumentTypeError, match=f"{name}: expected an int"):
            op(x, weight, mask, **{name: wrong})


@pytest.mark.parametrize("precision", ["auto", "ieee", "tf32", "tf32x3", "bf16x3"])
def test_every_precision_runs_in_float32_on_a_cpu(precision: str) -> None:
    expected = masked_conv3d(**conv_arguments())
    assert torch.equal(masked_conv3d(**conv_arguments(precision=precision)), expected)


def test_a_precision_for_another_dtype_is_refused() -> None:
    doubles: dict[str, Any] = {n: torch.ones(1, 1, 1, 1, 1).double() for n in ("x", "weight")}
    with pytest.raises(ArgumentError, match=r"precision: 'tf32' is for float32, but x is torch\.f"):
        masked_conv3d(**doubles, mask=bools(1, 1, 1, 1, 1), precision="tf32")


def test_shapes_pass_through_without_values() -> None:
    meta: dict[str, Any] = {
        n: t.to("meta") if isinstance(t, Tensor) else t for n, t in conv_arguments().items()
    }
    y = masked_conv3d(**meta)
    assert y.is_meta
    assert y.shape == (2, 6, 3, 4, 5)


def test_topk_mask_answers_in_the_container_it_was_given() -> None:
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([[2.0]])
    as_list = topk_mask([a, b], 2)
    as_tuple = topk_mask((a, b), 2)
    as_dict = topk_mask({"z": a, "a": b}, 2)
    ordered = topk_mask(OrderedDict(z=a, a=b), 2)
    assert isinstance(as_list, list)
    assert isinstance(as_tuple, tuple)
    assert isinstance(as_dict, dict)
    assert list(as_dict) == list(ordered) == ["z", "a"]
    for masks in (as_list, as_tuple, list(as_dict.values()), list(ordered.values())):
        assert [m.tolist() for m in masks] == [[False, True], [[True]]]
    assert topk_mask({}, 0) == {}
    assert topk_mask([], 0) == []


def test_within_is_matched_by_name() -> None:
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    within = {"b": torch.tensor([False]), "a": torch.tensor([True, True])}
    masks = topk_mask(tensors, 1, within=within)
    assert {n: m.tolist() for n, m in masks.items()} == {"a": [False, True], "b": [False]}


ONES = torch.ones(3)
TOPK_REFUSALS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (ONES, 1, {}, ArgumentTypeError, "tensors: .* got Tensor; put a single tensor into a list"),
    ([1.0], 1, {}, ArgumentTypeError, "tensors: expected tensors, but number 0 is float"),
    ({"w": ONES.double()}, 1, {}, ArgumentTypeError, r"'w' is torch\.float64"),
    ([ONES.int()], 1, {}, ArgumentTypeError, r"number 0 is torch\.int32"),
    ([ONES.to_sparse()], 1, {}, ArgumentTypeError, r"expected dense .*sparse_coo"),
    ([ONES.to("meta")], 1, {}, ArgumentTypeError, "number 0 is a meta tensor and has no values"),
    ([ONES], 4, {}, ArgumentError, r"keep: expected 0 to 3 \(the entries to choose from\), got 4"),
    ([ONES], -1, {}, ArgumentError, "keep: expected 0 to 3"),
    ([ONES], 1.0, {}, ArgumentTypeError, r"keep: expected an int, got 1\.0"),
    ([ONES], True, {}, ArgumentTypeError, "keep: expected an int, got True"),
    ([ONES], 2, {"within": [torch.tensor([True, False, False])]}, ArgumentError, "0 to 1 "),
    ([ONES], 1, {"within": [ONES]}, ArgumentTypeError, "within: expected dtype bool, but number 0"),
    ([ONES], 1, {"within": [bools(2)]}, ArgumentError, r"within: expected shape \(3,\) for number"),
    ([ONES], 1, {"within": []}, ArgumentError, r"without a partner: \['number 0'\]"),
    ([ONES], 1, {"within": {"w": bools(3)}}, ArgumentTypeError, "a mapping or a sequence, as"),
    ({"w": ONES}, 1, {"within": {"v": bools(3)}}, ArgumentError, "without a partner"),
    ({"w": ONES * float("nan")}, 1, {}, ArgumentError, "tensors: 'w' holds NaN"),
    ([ONES, -ONES * float("nan")], 0, {}, ArgumentError, "tensors: number 1 holds NaN"),
    ([ONES], 1, {"backend": "triton"}, BackendError, "Triton kernels need tensors on"),
    ([ONES], 1, {"backend": "numpy"}, ArgumentError, "backend: expected 'auto'"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "keep", "options", "error", "text"), TOPK_REFUSALS)
def test_topk_mask_refuses(
    tensors: Any, keep: Any, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        topk_mask(tensors, keep, **options)
