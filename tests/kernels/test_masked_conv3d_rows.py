"""Plans from a payload's CSR masks equal those from dense masks."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from sparsekit import codec
from sparsekit.errors import ArgumentError, BackendError, FormatError
from sparsekit.kernels.masked_conv3d import geometry, run
from sparsekit.kernels.masked_conv3d.plan import Plan, build, build_rows
from sparsekit.kernels.vector import LANES, REGISTERS
from tests.codec.test_codec_hostile import ROWS, Payload
from tests.kernels.convolutions import CASES, DENSITIES, Case, operands


def rows_of(mask: torch.Tensor) -> codec.MaskRows:
    payload = codec.encode({"w": mask.float()}, masks={"w": mask}, mask_encoding="csr")
    found = codec.decode_rows(payload)
    if "w" in found:
        return found["w"]
    # No CSR for a mask that keeps all or nothing.
    flat = mask.reshape(len(mask), -1).numpy()
    return codec.MaskRows(tuple(mask.shape), flat.sum(axis=1), np.nonzero(flat)[1])


def same(found: Plan, expected: Plan) -> None:
    assert found.geometry == expected.geometry
    assert found.density == expected.density
    for name in ("forward", "backward"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours.blocks, ours.rows) == (theirs.blocks, theirs.rows)
        for field in ("starts", "offsets", "index"):
            a, b = getattr(ours, field), getattr(theirs, field)
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), (name, field)
    assert torch.equal(found.mask, expected.mask)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("case", CASES)
def test_plan_from_rows_is_that_from_the_mask(case: Case, density: str) -> None:
    leaves, mask, _ = operands(case, density)
    shape = geometry.shape_of(
        leaves[0], leaves[1], case.stride, case.padding, case.dilation, case.groups
    )
    rows = rows_of(mask)
    same(run.plan_of_rows(rows.counts, rows.columns, shape), run.plan_of(mask.clone(), shape))
    layout = geometry.geometry(shape, LANES, REGISTERS)
    for blocks in ((1, 1), (3, 2)):
        same(
            build_rows(rows.counts, rows.columns, layout, *blocks),
            build(mask.contiguous(), layout, *blocks),
        )


def small() -> tuple[geometry.Geometry, codec.MaskRows]:
    mask = torch.arange(2 * 3 * 27).view(2, 3, 3, 3, 3) % 5 == 0
    shape = geometry.shape_of(
        torch.ones(1, 3, 4, 4, 4), mask.float(), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1
    )
    return geometry.geometry(shape, LANES, REGISTERS), rows_of(mask)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"counts": np.array([1, 2, 3])}, "expected 2 counts", id="rows"),
        pytest.param({"counts": np.array([1, 2])}, "expected 33 in all, got 3", id="sum"),
        pytest.param({"counts": np.array([-1, 34])}, "in all", id="negative"),
        pytest.param({"columns": np.arange(33)[::-1]}, "increasing", id="order"),
        pytest.param({"columns": np.arange(33) + 70}, "below 81", id="range"),
        pytest.param({"columns": np.arange(33) - 1}, "below 81", id="negative-column"),
        pytest.param({"columns": np.zeros((33, 1), int)}, "flat columns", id="dimensions"),
    ],
)
def test_rows_that_no_weight_has_are_refused(change: dict[str, Any], match: str) -> None:
    layout, rows = small()
    wrong = dataclasses.replace(rows, **change)
    with pytest.raises(ArgumentError, match=match):
        build_rows(wrong.counts, wrong.columns, layout, 1, 1)


def test_too_large_scans_are_refused() -> None:
    layout, rows = small()
    large = dataclasses.replace(layout.shape, size=(2000, 2000, 2000))
    with pytest.raises(BackendError, match="too large"):
        build_rows(rows.counts, rows.columns, dataclasses.replace(
            layout, shape=large, source=dataclasses.replace(layout.source, sample=1 << 31)
        ), 1, 1)  # fmt: skip


def test_rows_of_a_payload_are_checked() -> None:
    good = codec.decode_rows(Payload((ROWS,)).bytes())["w"]
    assert good.counts.tolist() == [2, 0, 1]
    assert good.columns.tolist() == [1, 4, 0]
    assert good.shape == (3, 5)
    damaged = dataclasses.replace(ROWS, mask=ROWS.mask[:6] + b"\4\0\1\0" + ROWS.mask[10:])
    with pytest.raises(FormatError, match=r"'w'.*increasing"):
        codec.decode_rows(Payload((damaged,)).bytes())
    assert codec.decode_rows(codec.encode({"w": torch.eye(3)}, mask_encoding="bitmap")) == {}
