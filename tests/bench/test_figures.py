"""From samples to figures, bars and the roofline."""

from typing import Any

import pytest
import torch

from sparsekit.bench.agreement import check_close, check_near, check_zero_outside
from sparsekit.bench.blocks import IN_BLOCK, WITHOUT_CONVOLUTION
from sparsekit.bench.figures import FORWARD, Figure, best_dense, figures, geometric_mean
from sparsekit.bench.network import LAYERS, MEAN_LAYERS, random_mask
from sparsekit.bench.pages import page, rows_of
from sparsekit.bench.pairs import Case, Turns, quartiles, ratio, ratios
from sparsekit.bench.roofline import ceilings, points
from sparsekit.bench.steps import STEP
from sparsekit.errors import DisagreementError


def row(what: str, ours: list[float], **sides: Any) -> dict[str, Any]:
    labels: dict[str, Any] = {
        k: sides.pop(k) for k in ("layer", "sparsity", "masks", "notes") if k in sides
    }
    return {"what": what, **labels, "threads": 2, "milliseconds": {**sides, "ours": ours}}


def figure(rows: list[dict[str, Any]], what: str, case: str) -> Figure:
    (found,) = [f for f in figures(rows) if f.what == what and f.case == case]
    return found


def test_sides_take_turns_and_slow_ones_sit_out() -> None:
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in ("slow", "stock", "ours")}
    turns = Turns(Case({"what": "x"}, sides, every={"slow": 2}), warmup=1)
    turns.calls = dict.fromkeys(sides, 1)
    calls.clear()
    row_ = turns.run(3).row()
    assert calls == ["slow", "stock", "ours", "stock", "ours", "slow", "stock", "ours"]
    assert [v is None for v in row_["milliseconds"]["slow"]] == [False, True, False]
    assert len(ratios(row_, "stock")) == 3


def test_ratios_are_taken_within_each_round() -> None:
    # A machine that gets slower by half for all sides changes nothing.
    found = row("x", [1.0, 1.5, 2.0], stock=[4.0, 6.0, None])
    assert ratios(found, "stock") == [4.0, 4.0, None]
    assert ratio(found, "stock") == (4.0, 4.0, 4.0)


def test_quartiles() -> None:
    assert quartiles([5.0, None, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_geometric_mean_needs_every_layer() -> None:
    rows = [
        row(FORWARD, [1.0], stock=[2.0**i], layer=name, sparsity=0.95)
        for i, name in enumerate(MEAN_LAYERS)
    ]
    value = geometric_mean(rows, FORWARD, 0.95)
    assert value is not None
    assert value[1] == pytest.approx(2**1.5)
    assert geometric_mean(rows[1:], FORWARD, 0.95) is None


@pytest.mark.parametrize(("stock", "holds"), [(14.9, False), (15.0, True)])
def test_a_bar_holds_from_its_value_on(stock: float, holds: bool) -> None:
    rows = [row(STEP, [1.0], stock=[stock], sparsity=0.95, masks="uniform random")]
    assert figure(rows, "training step", "95 %").holds is holds


def test_what_was_not_measured_does_not_hold() -> None:
    found = figure([], "training step", "95 %")
    assert found.value is None
    assert found.holds is None


def test_a_bar_at_most() -> None:
    processes = {
        side: [{"resident_before_bytes": 100, "peak_bytes": 100 + peak}]
        for side, peak in (("ours", 41), ("stock", 100))
    }
    rows = [{"what": "memory of a step", "sparsity": 0.95, "processes": processes}]
    found = figure(rows, "peak memory of a step, ours over stock", "95 %")
    assert found.value == (0.41, 0.41, 0.41)
    assert found.holds is False


def test_the_best_dense_path_is_the_rival() -> None:
    found = row(FORWARD, [2.0], stock=[5.0], channels_last_3d=[3.0])
    assert best_dense(found) == ("channels_last_3d", (1.5, 1.5, 1.5))


def test_what_a_block_adds_to_its_convolution() -> None:
    rows = [
        row(IN_BLOCK, [3.0], stock=[8.0], layer=f"block {i}", **{WITHOUT_CONVOLUTION: [1.0]})
        for i in (2, 3, 4)
    ]
    found = figure(rows, f"{IN_BLOCK}, forward + gradients", "blocks 2 to 4 together, 95 %")
    assert found.value == (4.0, 4.0, 4.0)


def test_roofline() -> None:
    name = "forward, 2 threads"
    loads = row("ceiling: loads from the first cache", [1.0], **{name: [1.0]})
    loads["milliseconds"]["backward, 2 threads"] = [1.0]
    loads["notes"] = {"multiply_adds": {name: 10**6, "backward, 2 threads": 2 * 10**6}}
    stream = row("ceiling: memory", [1.0], read=[1.0], notes={"bytes": {"read": 10**6}})
    del stream["milliseconds"]["ours"]
    kept = 1000
    conv = row(
        FORWARD, [100.0], stock=[1.0], layer="conv2", sparsity=0.95, notes={"unpruned": kept}
    )
    limits = ceilings([loads, stream], {"caches": {"L3": "32M"}})
    assert limits is not None
    assert (limits.forward, limits.backward, limits.stream) == (1e9, 2e9, 1e9)
    assert limits.cache_bytes == 32 << 20
    (point,) = points([conv], limits)
    layer = LAYERS["conv2"]
    assert point.loads_seconds == pytest.approx(kept * layer.voxels / 1e9)
    assert point.bytes == 4 * (32 + 64) * layer.voxels
    assert point.memory_seconds == pytest.approx(point.bytes / 1e9)
    assert point.limit == "loads"


def test_a_page_of_nothing_says_so() -> None:
    machine = dict.fromkeys(("processor", "instructions", "cores", "threads", "torch", "numba"), 1)
    results = {
        "machine": {**machine, "caches": {"L1": "48K"}},
        "files": {"x": {"measured": "2026-01-01", "rows": []}},
    }
    assert rows_of(results) == []
    text = page(results)
    assert "0 of " in text
    assert "not measured" in text


def test_masks_have_exact_counts_and_stay_the_same() -> None:
    mask = random_mask("neck", 0.9)
    assert int(mask.sum()) == mask.numel() - int(0.9 * mask.numel())
    assert torch.equal(mask, random_mask("neck", 0.9))


def test_disagreements_raise() -> None:
    want = torch.arange(10.0)
    check_close("same", want + 1e-6, want, 1e-6)
    check_close("one flip", want + torch.eye(10)[3], want, 1e-6, flips=0.1)
    check_near("near", want * 1.01, want, 0.02)
    with pytest.raises(DisagreementError, match="other"):
        check_close("other", want + torch.eye(10)[3], want, 1e-6)
    with pytest.raises(DisagreementError, match="nan"):
        check_close("nan", want * float("nan"), want, 1e-6)
    with pytest.raises(DisagreementError, match="far"):
        check_near("far", want * 1.1, want, 0.02)
    with pytest.raises(DisagreementError, match="pruned"):
        check_zero_outside("weight", want, torch.zeros(10, dtype=torch.bool))


def test_every_figure_has_a_name_of_its_own() -> None:
    names = [(f.what, f.case) for f in figures([]) if f.case != "any"]
    assert len(names) == len(set(names))
    assert all(f.value is None for f in figures([]))
