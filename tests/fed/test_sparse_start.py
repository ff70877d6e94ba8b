"""Schedules, sparse starts, the scope of work and regrowth in whole runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import flops, nn
from sparsekit.codec import decode, decode_masks, encode
from sparsekit.codec.core import Values
from sparsekit.errors import TemplateError, UsageError
from sparsekit.fed import rounds, runner
from sparsekit.fed.algorithm import (
    aggregate,
    initial_state,
    is_prunable,
    plan_round,
    read_update,
)
from sparsekit.fed.config import RunConfig
from sparsekit.fed.ledger import Ledger
from sparsekit.fed.merging import Update
from sparsekit.fed.plan import build_model, work_per_weight
from sparsekit.fed.pruning import regrown_share, scheduled_sparsity
from sparsekit.fed.regrow import exchange, exchanged, gradient_flops, propose
from sparsekit.fed.runner import resume_run, start_run
from sparsekit.masks import is_nested
from tests.fed.test_merging import added

SMALL: dict[str, Any] = {
    "rounds": 4, "epochs": 1, "batch": 3, "width": 0.05, "sparsity": 0.8, "threads": 2,
    "seed": 3, "engine": "inprocess", "resolution": 4,
}  # fmt: skip
SPARSE: dict[str, Any] = {"scope": "flops", "initial_sparsity": 0.8}
REGROWING: dict[str, Any] = SPARSE | {
    "regrow": 0.5, "regrow_every": 1, "regrow_end": 4, "regrow_scans": 4,
}  # fmt: skip


def make(cohort: Path | str, **changes: Any) -> RunConfig:
    return RunConfig(cohort=str(cohort), **(SMALL | changes))


def checkpoint(run: Path, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    payload = (run / f"checkpoints/round-{number:05d}/model.spu").read_bytes()
    weights = decode(payload)
    kept = decode_masks(payload)
    return weights, {name: kept[name] for name, w in weights.items() if is_prunable(name, w)}


def wanted(masks: dict[str, Tensor], sparsity: float) -> int:
    total = sum(mask.numel() for mask in masks.values())
    return total - int(sparsity * total)


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def test_schedules_of_a_run() -> None:
    def values(**changes: Any) -> list[float | None]:
        config = make("unused", rounds=6, sparsity=0.9, **changes)
        return [scheduled_sparsity(config, t) for t in range(1, 7)]

    cubic = [None, *(0.9 * (1 - (1 - (t - 1) / 5) ** 3) for t in range(2, 7))]
    assert values() == pytest.approx(cubic, abs=1e-12)
    early = [None, 0.9 * (1 - 0.5**3), 0.9, 0.9, 0.9, 0.9]
    assert values(prune_end=3) == pytest.approx(early, abs=1e-12)
    factor = [None, 1 - math.sqrt(0.1), 0.9, 0.9, 0.9, 0.9]
    assert values(schedule="exponential", prune_end=3) == pytest.approx(factor, abs=1e-12)
    assert values(schedule="one-shot", prune_start=2) == [None, None, 0.9, 0.9, 0.9, 0.9]
    assert values(initial_sparsity=0.9) == [None] * 6
    grown = [None, 0.9 - 0.4 * 0.5**3, 0.9, 0.9, 0.9, 0.9]
    assert values(initial_sparsity=0.5, prune_end=3) == pytest.approx(grown, abs=1e-12)


def test_share_of_regrowth_falls_along_half_a_cosine() -> None:
    config = make("unused", rounds=12, regrow=0.4, regrow_every=2)
    found = [regrown_share(config, t) for t in range(1, 13)]
    shares = {t: 0.2 * (1 + math.cos(math.pi * t / 9)) for t in (2, 4, 6, 8)}
    assert found == pytest.approx([shares.get(t) for t in range(1, 13)], abs=1e-12)
    assert regrown_share(make("unused", strategy="fedavg", regrow=0.4), 10) is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"schedule": "cubic"}, "schedule: expected one of polynomial, exponential, one-shot"),
    ({"scope": "work"}, "scope: expected one of global, layer, erk, flops"),
    ({"initial_sparsity": 0.9}, "initial_sparsity: expected at most sparsity = 0.8, got 0.9"),
    ({"prune_end": 5}, r"prune_end: expected a number in \[0, 4\], got 5"),
    ({"prune_end": 1}, "prune_end: expected more than prune_start = 1"),
    ({"regrow": 1.0}, r"regrow: expected a number in \[0.0, 1.0\)"),
    ({"regrow_scans": 0}, "regrow_scans: expected"),
    ({"regrow": 0.2, "strategy": "fedsparsify-local"}, "regrow: not with fedsparsify-local"),
    ({"regrow": 0.2, "paper": True}, "paper: the released code starts dense"),
    ({"initial_sparsity": 0.2, "paper": True}, "paper: the released code starts dense"),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make("unused", **changes)


@pytest.mark.parametrize("strategy", ["fedsparsify-global", "fedsparsify-local", "centralized"])
def test_a_sparse_start_is_sparse_from_the_first_byte_and_operation(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, strategy: str
) -> None:
    config = make(tiny_cohort, strategy=strategy, keep_checkpoints=0, **SPARSE)
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    _, first = checkpoint(tmp_path / "r", 0)
    assert kept(first) == wanted(first, 0.8)
    for number in range(1, 5):
        _, masks = checkpoint(tmp_path / "r", number)
        assert all(torch.equal(masks[name], first[name]) for name in first)
    assert result["sparsity"]["prunable"] == 1 - kept(first) / sum(
        m.numel() for m in first.values()
    )
    trained = {entry["round"]: entry["flops_counted"] for entry in result["history"]}
    assert trained[1] == trained[4] > 0
    if strategy != "centralized":
        dense = 3 * 4 * result["model"]["parameters"]
        down = {entry["round"]: entry["payload_down"] for entry in result["history"]}
        assert down[1] < 0.35 * dense


def test_a_warm_up_is_dense_and_what_follows_is_not(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    config = make(tiny_cohort, schedule="one-shot", prune_start=1, scope="flops")
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    sparsity = [entry["sparsity_prunable"] for entry in result["history"]]
    assert sparsity[:2] == [0.0, 0.0]
    assert sparsity[2:] == pytest.approx([0.8] * 3, abs=1e-3)


RUNS = {
    "flops": {"scope": "flops"},
    "flops-local": {"scope": "flops", "strategy": "fedsparsify-local", "values": "int8"},
    "start": SPARSE | {"values": "int4"},
    "regrow": REGROWING,
    "regrow-int8": REGROWING | {"initial_sparsity": 0.5, "values": "int8"},
    "regrow-centralized": REGROWING | {"strategy": "centralized"},
}


@pytest.mark.parametrize("name", [n for n in RUNS if n != "regrow-centralized"])
def test_sites_in_processes_give_the_same_bits(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, name: str
) -> None:
    for engine in ("inprocess", "processes"):
        config = make(tiny_cohort, engine=engine, rounds=3, **RUNS[name])
        start_run(config, tmp_path / engine, cache=tiny_cache)
    one, many = (tmp_path / engine / "model.spu" for engine in ("inprocess", "processes"))
    assert one.read_bytes() == many.read_bytes()
    counts = [
        [(r.payload_bytes, r.flops_counted) for r in Ledger(tmp_path / engine / "ledger.jsonl")]
        for engine in ("inprocess", "processes")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", RUNS)
def test_resume_ends_bit_identical(
    tiny_cohort: Path,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    config = make(tiny_cohort, **RUNS[name])
    start_run(config, tmp_path / "whole", cache=tiny_cache)
    play_round = rounds.play_round

    def failing(state: Any, *args: Any) -> Any:
        if state.round == 2:
            raise KeyboardInterrupt
        return play_round(state, *args)

    monkeypatch.setattr("sparsekit.fed.runner.play_round", failing)
    with pytest.raises(runner.InterruptedRunError):
        start_run(config, tmp_path / "broken", cache=tiny_cache)
    monkeypatch.undo()
    resume_run(tmp_path / "broken", cache=tiny_cache)
    whole, broken = (tmp_path / run / "model.spu" for run in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("values", ["lossless", "int8"])
@pytest.mark.parametrize("initial", [0.8, 0.3])
def test_regrowth_moves_weights_and_keeps_counts(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, values: Values, initial: float
) -> None:
    changes = REGROWING | {"initial_sparsity": initial, "values": values, "keep_checkpoints": 0}
    config = make(tiny_cohort, **changes)
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    before = checkpoint(tmp_path / "r", 0)[1]
    for number in range(1, 5):
        weights, masks = checkpoint(tmp_path / "r", number)
        sparsity = scheduled_sparsity(config, number) or initial
        assert kept(masks) == wanted(masks, sparsity)
        share = regrown_share(config, number)
        grown = {name: masks[name] & ~before[name] for name in masks}
        assert is_nested(masks, before) == (share is None)
        for name, back in grown.items():
            assert int(back.sum()) <= exchanged(masks[name], share)
            # They start at 0, and belong to the mask all the same.
            assert not weights[name][back].any()
            assert int(masks[name].flatten(1).any(1).sum()) == len(masks[name])
        before = masks
    # What the sites evaluated in the end is what the file holds.
    final = (tmp_path / "r" / "model.spu").read_bytes()
    final_masks = decode_masks(final)
    assert all(torch.equal(final_masks[name], mask) for name, mask in before.items())
    rows = list(Ledger(tmp_path / "r" / "ledger.jsonl"))
    assert {row.outcome for row in rows} == {"ok"}
    for row in rows:
        parts = row.payload_bytes + row.control_bytes + (row.framing_bytes or 0)
        assert row.transport_bytes == parts
    assert result["flops"]["counted"] == sum(row.flops_counted for row in rows)


def test_regrowth_pays_for_dense_gradients(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    runs = {"with": REGROWING, "without": SPARSE}
    history = {
        name: start_run(make(tiny_cohort, **changes), tmp_path / name, cache=tiny_cache)["history"]
        for name, changes in runs.items()
    }
    state = initial_state(make(tiny_cohort, **SPARSE), in_shape=(46, 55, 46), mean_age=60.0)
    order = plan_round(state, make(tiny_cohort, **REGROWING))
    assert state.masks is not None
    model = nn.sparsify(build_model(order.plan), state.masks)
    needed, done = gradient_flops(model, order.plan)
    report = flops.count(model, (1, 1, 46, 55, 46))
    assert report.train_step < needed < done == report.dense_train_step
    # Training people by site are 4, 4 and 3, of which each shows up to 4 scans.
    people = json.loads((tmp_path / "with" / "result.json").read_text())["data"]["train_n"]
    scans = sum(min(4, n) for n in _trained(tmp_path / "with"))
    assert sum(_trained(tmp_path / "with")) == people
    for level, more in (("flops_counted", needed), ("flops_executed", done)):
        extra = history["with"][1][level] - history["without"][1][level]
        assert extra == more * scans
    # The last round regrows nothing, and its masks have the same counts.
    assert history["with"][4]["flops_counted"] == history["without"][4]["flops_counted"]


def _trained(run: Path) -> list[int]:
    """Training people of each site."""
    state = json.loads((run / "result.json").read_text())
    tested = state["accuracy"]["site_n"]
    return [people - tested[site] for site, people in (("a", 6), ("b", 5), ("c/d", 4))]


def test_what_comes_back_has_the_largest_gradients() -> None:
    mask = {"w": torch.tensor([[True, True, True, True], [False, False, False, False]])}
    received = {"w": torch.tensor([[1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0]])}
    updated = {"w": torch.tensor([[1.5, 2.0, 3.0, 4.0], [0, 0, 0, 0]])}
    gradients = {"w": torch.tensor([[9.0, 9.0, 9.0, 9.0], [1.0, -4.0, 0.0, 2.0]])}
    weights, masks = propose(updated, received, mask, gradients, 0.5)
    assert masks["w"].tolist() == [[True] * 4, [False, True, False, True]]
    # Steps against the gradient; the largest is the layer's largest change, 0.5.
    assert weights["w"].tolist() == [[1.5, 2.0, 3.0, 4.0], [0.0, 0.5, 0.0, -0.25]]
    changed = exchange(weights, mask, mask, 0.25, min_per_filter=0)
    assert changed["w"].tolist() == [[False, True, True, True], [False, True, False, False]]
    # Without proposals nothing is dropped.
    assert torch.equal(exchange(updated, mask, mask, 0.5, min_per_filter=0)["w"], mask["w"])
    # A filter does not lose its last weight to another.
    one = {"w": torch.tensor([[True, False], [True, False]])}
    lone = {"w": torch.tensor([[0.1, 5.0], [3.0, 0.0]])}
    guarded = exchange(lone, one, one, 0.5, min_per_filter=1)
    assert kept(guarded) == 2


def test_a_site_may_bring_back_what_the_round_allows_and_no_more() -> None:
    config = make("unused", **REGROWING)
    state = initial_state(config, in_shape=(12, 12, 12), mean_age=60.0)
    order = plan_round(state, config)
    assert state.masks is not None
    assert order.plan.regrow is not None
    name = "blocks.0.conv.weight"
    allowed = exchanged(state.masks[name], order.plan.regrow)
    assert allowed >= 1
    for more, fine in ((0, True), (1, False)):
        weights = {n: w.clone() for n, w in state.weights.items()}
        free = (~state.masks[name]).flatten().nonzero().flatten()[: allowed + more]
        weights[name].view(-1)[free] = 1.0
        payload = encode(weights, round=1)
        if fine:
            update = read_update(payload, plan=order.plan, sent=order.sent, n_train=3)
            after = aggregate(state, added({"a": update}), config)
            assert after.masks is not None
            grown = after.masks[name] & ~state.masks[name]
            assert int(grown.sum()) == exchanged(after.masks[name], order.plan.regrow)
        else:
            with pytest.raises(TemplateError, match=f"{allowed + 1} weights where the model is pr"):
                read_update(payload, plan=order.plan, sent=order.sent, n_train=3)
    quiet = plan_round(state, make("unused", **SPARSE))
    with pytest.raises(TemplateError, match="weights where the model is pruned"):
        read_update(payload, plan=quiet.plan, sent=quiet.sent, n_train=3)


def test_a_round_without_masks_regrows_nothing() -> None:
    config = make("unused", regrow=0.5, regrow_every=1, regrow_end=4)
    state = initial_state(config, in_shape=(12, 12, 12), mean_age=60.0)
    assert state.masks is None
    assert plan_round(state, config).plan.regrow is None
    after = aggregate(state, added({"a": Update(state.weights, None, 3)}), config)
    assert after.masks is None
    later = aggregate(after, added({"a": Update(after.weights, None, 3)}), config)
    assert later.masks is not None
    assert plan_round(later, config).plan.regrow is not None


def test_work_of_a_plan_is_that_of_its_network() -> None:
    config = make("unused", **SPARSE)
    state = initial_state(config, in_shape=(12, 14, 12), mean_age=60.0)
    model = build_model(plan_round(state, config).plan)
    expected = flops.work_per_weight(model, (1, 1, 12, 14, 12))
    assert work_per_weight(config.width, (12, 14, 12)) == expected
