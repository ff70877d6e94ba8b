import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparsekit import prune
from sparsekit.cli.main import app
from sparsekit.kernels import dispatch, implementations
from sparsekit.nn import MaskedConv3d, fused_block, sparsify
from sparsekit.ops import explain, topk_mask


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def no_earlier_calls() -> Iterator[None]:
    dispatch.clear_records()
    yield
    dispatch.clear_records()


def test_calls_are_listed_latest_first_with_the_reason() -> None:
    assert str(explain(nn.ReLU())) == "no calls yet"
    layer = MaskedConv3d(1, 2, 3)
    for _ in range(3):
        layer(torch.ones(1, 1, 3, 3, 3))
    topk_mask([torch.ones(2)], 1, backend="reference")
    first, second = explain().calls
    assert (first.op, first.backend, first.reason) == (
        "topk_mask", "reference", "named by the caller"
    )  # fmt: skip
    # Nothing is to be gained on a single voxel.
    assert (second.op, second.backend, second.device, second.calls) == (
        "masked_conv3d", "dense", "cpu", 3
    )  # fmt: skip
    assert second.detail == "(2, 1, 3, 3, 3) float32"
    assert re.fullmatch(
        r"forward and weight gradient predicted at density 1: kernels \d+ us, dense \d+ us",
        second.reason,
    )
    assert (
        f"  masked_conv3d (2, 1, 3, 3, 3) float32 on cpu: dense ({second.reason}), 3 calls"
        in str(explain()).splitlines()
    )


def test_masked_layers_that_stay_dense_are_listed() -> None:
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ConvTranspose3d(4, 2, 3), nn.Linear(4, 2))
    sparsify(model, prune.magnitude_masks(model, 0.5, scope="layer"))
    dense = explain(model).dense_layers
    assert [(d.layer, d.kind, d.parameter, d.density) for d in dense] == [
        ("1", "ConvTranspose3d", "weight", 0.5),
        ("2", "Linear", "weight", 0.5),
    ]
    assert set(dense) <= set(explain().dense_layers)
    assert "  2.weight (Linear), density 0.5000" in str(explain()).splitlines()
    del model
    assert not set(dense) & set(explain().dense_layers)


def test_a_convolution_with_masks_only_applied_is_listed_until_it_is_sparsified() -> None:
    model = nn.Sequential(nn.Conv3d(1, 2, 3))
    prune.apply_masks(model, prune.magnitude_masks(model, 0.5))
    assert [d.kind for d in explain(model).dense_layers] == ["Conv3d"]
    sparsify(model)
    assert explain(model).dense_layers == ()
    assert model[0].density == 0.5


def test_memory_is_bounded_and_the_oldest_kind_goes_first() -> None:
    choice = dispatch.resolve("topk_mask", "cpu")
    for i in range(dispatch.MAX_RECORDS + 10):
        dispatch.record(choice, "cpu", f"call {i}")
        dispatch.record(choice, "cpu", "often")
    records = dispatch.records()
    assert len(records) == dispatch.MAX_RECORDS
    assert (records[0].detail, records[0].calls) == ("often", dispatch.MAX_RECORDS + 10)
    assert records[-1].detail == "call 11"


def test_threads_lose_no_call() -> None:
    choice = dispatch.resolve("topk_mask", "cpu")

    def work() -> None:
        for i in range(500):
            dispatch.record(choice, "cpu", f"call {i % 7}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(r.calls for r in dispatch.records()) == 2000


def test_auto_takes_the_first_row_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, reference = implementations.available("topk_mask", "cuda")
    fast = implementations.Implementation("cpu", reference.load, follows_mask=False)
    monkeypatch.setitem(implementations.TABLE, ("topk_mask", "cpu"), (fast, reference))
    topk_mask([torch.ones(2)], 1)
    assert explain().calls[0].backend == "cpu"
    assert explain().calls[0].reason == "the first choice for cpu tensors"
    topk_mask([torch.ones(2)], 1, backend="reference")
    assert explain().calls[0].backend == "reference"
    assert dispatch.resolve("topk_mask", "cuda").implementation is triton


def test_doctor_says_what_each_op_takes_here(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for op in implementations.ops():
        taken = dispatch.resolve(op, "cpu")
        assert any(
            op in line and taken.implementation.backend in line and taken.reason in line
            for line in result.output.splitlines()
        )
    assert torch.__version__.split("+")[0] in result.output
    _check_predictions(result.output)
    assert "CPU cores usable" in result.output
    assert "off: SPARSEKIT_AUTOTUNE=1 turns it on" in result.output
    (tmp_path / "sparsekit").mkdir()
    (tmp_path / "sparsekit" / "autotune.json").write_text('{"choices": {"a": {}, "b": {}}}')
    wanted = {"SPARSEKIT_AUTOTUNE": "1", "XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "400"}
    result = CliRunner().invoke(app, ["doctor"], env=wanted)
    assert f"on, 2 choices in {tmp_path / 'sparsekit' / 'autotune.json'}" in result.output


def _check_predictions(output: str) -> None:
    """What doctor shows of a layer is what the layer does."""
    cells = [cell.strip() for line in output.splitlines() if "blocks.1.conv" in line
             for cell in line.split("│")]  # fmt: skip
    at_95 = cells[6]
    layer = MaskedConv3d(32, 64, 3, padding=1)
    mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
    mask[: round(0.05 * len(mask))] = True
    layer.set_mask(mask.view_as(layer.weight))
    x = torch.randn(1, 32, 45, 54, 45, requires_grad=True)
    fused_block(layer, x)
    reason = explain().calls[0].reason
    kernels, _, dense = at_95.replace("*", "").partition(" : ")
    assert f"kernels {kernels} ms, dense {dense} ms" in reason
    assert at_95.endswith("*") == (explain().calls[0].backend == "dense")
    assert "no part in the fit" in output
