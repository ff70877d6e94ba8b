import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.codec import decode, decode_masks, inspect
from sparsekit.codec.core import Values
from sparsekit.errors import CohortError, RunError, UsageError
from sparsekit.fed import rounds, runner
from sparsekit.fed.config import RunConfig
from sparsekit.fed.ledger import Ledger, LedgerRow
from sparsekit.fed.runner import Silent, resume_run, start_run

SMALL: dict[str, Any] = {
    "rounds": 3,
    "epochs": 1,
    "batch": 3,
    "width": 0.05,
    "sparsity": 0.8,
    "threads": 2,
    "seed": 3,
    "engine": "inprocess",
}


def make(cohort: Path, **changes: Any) -> RunConfig:
    return RunConfig(cohort=str(cohort), **(SMALL | changes))


def rows(run: Path) -> list[LedgerRow]:
    return list(Ledger(run / "ledger.jsonl"))


def without_times(run: Path) -> list[LedgerRow]:
    return [dataclasses.replace(row, seconds=0.0) for row in rows(run)]


def assert_same_but_for_whole_models(run: Path, whole: Path, number: int) -> None:
    """After a resumption in a round the sites hold nothing, and get that round's model whole."""
    for ours, theirs in zip(without_times(run), without_times(whole), strict=True):
        if (ours.direction, ours.round) == ("down", number):
            assert ours.payload_bytes >= theirs.payload_bytes
            assert ours.transport_bytes - ours.payload_bytes == (
                theirs.transport_bytes - theirs.payload_bytes
            )
            same: dict[str, Any] = {"payload_bytes": 0, "transport_bytes": 0}
            ours, theirs = (dataclasses.replace(row, **same) for row in (ours, theirs))
        assert ours == theirs


@pytest.fixture(scope="module")
def finished(tiny_cohort: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "global"
    start_run(make(tiny_cohort), run, cache=tiny_cache)
    return run


def test_result_adds_up(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    account = rows(finished)
    assert result["data"]["sites"] == 3
    for direction in ("down", "up"):
        for level in ("payload", "control", "framing", "transport", "dense_equivalent"):
            expected = sum(
                getattr(r, f"{level}_bytes") for r in account if r.direction == direction
            )
            assert result["bytes"][direction][level] == expected
    for row in account:
        parts = row.payload_bytes + row.control_bytes + row.framing_bytes
        assert row.transport_bytes == parts
        assert row.kernel_bytes is None
    counted = sum(row.flops_counted for row in account)
    executed = sum(row.flops_executed for row in account)
    assert result["flops"] == {"counted": counted, "executed": executed}
    assert 0 < counted < executed
    # Introductions, 3 rounds both ways, and the final model with its reports.
    assert len(account) == 3 + 3 * 3 * 2 + 3 * 2
    assert set(result["accuracy"]["site_mae"]) == {"a", "b", "c/d"}
    assert set(result["yardsticks"]) == {
        "mean predictor",
        "ventricle count",
        "ridge on 8 mm voxels",
    }


def test_final_sparsity_is_exact_and_in_the_file(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    payload = (finished / "model.spu").read_bytes()
    weights, masks = decode(payload), decode_masks(payload)
    prunable = [name for name, w in weights.items() if name.endswith(".weight") and w.ndim == 5]
    total = sum(weights[name].numel() for name in prunable)
    kept = sum(int(masks[name].sum()) for name in prunable)
    assert kept == total - int(0.8 * total)
    assert result["sparsity"]["prunable"] == pytest.approx(1 - kept / total, abs=1e-15)
    assert all(bool((weights[name][~masks[name]] == 0).all()) for name in prunable)


def test_masks_are_nested_from_round_to_round(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    start_run(make(tiny_cohort, rounds=4, keep_checkpoints=0), tmp_path / "r", cache=tiny_cache)
    previous: dict[str, torch.Tensor] | None = None
    for number in range(2, 5):
        payload = (tmp_path / "r" / f"checkpoints/round-{number:05d}/model.spu").read_bytes()
        masks = decode_masks(payload)
        if previous is not None:
            assert all(bool((previous[name] | ~masks[name]).all()) for name in masks)
        previous = masks


@pytest.mark.parametrize("values", ["bf16", "fp16"])
def test_weights_travel_in_16_bits(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path, values: Values
) -> None:
    run = tmp_path / "r"
    result = start_run(make(tiny_cohort, values=values), run, cache=tiny_cache)
    lossless = json.loads((finished / "result.json").read_text())
    for direction in ("down", "up"):
        ours, theirs = (r["bytes"][direction]["payload"] for r in (result, lossless))
        assert ours < 0.75 * theirs
    payload = (run / "model.spu").read_bytes()
    assert inspect(payload).round == 3
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[values]
    weights, masks = decode(payload), decode_masks(payload)
    for name, tensor in weights.items():
        assert torch.equal(tensor, tensor.to(kind).float())
        assert not tensor[~masks[name]].any()
    assert result["sparsity"]["prunable"] == lossless["sparsity"]["prunable"]
    assert 0 < result["accuracy"]["test_mae"] < 60


def test_a_fast_level_costs_bytes_and_changes_nothing_else(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path
) -> None:
    start_run(make(tiny_cohort, level="fast"), tmp_path / "r", cache=tiny_cache)
    fast, balanced = ((p / "model.spu").read_bytes() for p in (tmp_path / "r", finished))
    assert len(fast) > len(balanced)
    wanted = decode(balanced)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in decode(fast).items())


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "fedsparsify-global",
        "fedsparsify-local",
        "fedsparsify-global bf16",
        "fedsparsify-global int8",
        "fedsparsify-local int4",
    ],
)
@pytest.mark.parametrize("crash_after", [0, 1, 2])
def test_resume_ends_bit_identical(
    tiny_cohort: Path,
    tiny_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    crash_after: int,
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    name, *values = strategy.split()
    config = make(tiny_cohort, strategy=name, values=values[0] if values else "lossless")
    start_run(config, whole, cache=tiny_cache)

    play_round = rounds.play_round

    def failing(state: Any, *args: Any) -> Any:
        outcome = play_round(state, *args)
        if state.round == crash_after:
            # The rows are on disk, the checkpoint is not: the worst moment to die.
            Ledger(broken / "ledger.jsonl").append(outcome.rows)
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr("sparsekit.fed.runner.play_round", failing)
    with pytest.raises(runner.InterruptedRunError, match="sparsekit fed resume"):
        start_run(config, broken, cache=tiny_cache)
    monkeypatch.undo()
    assert not (broken / "result.json").exists()
    resume_run(broken, cache=tiny_cache)

    assert (broken / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    assert_same_but_for_whole_models(broken, whole, crash_after + 1)


def test_result_does_not_depend_on_the_order_of_replies(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path
) -> None:
    # One worker instead of two, with as many torch threads each: another order, the same bits.
    config = make(tiny_cohort, threads=1)
    start_run(config, tmp_path / "one", cache=tiny_cache)
    assert (tmp_path / "one/model.spu").read_bytes() == (finished / "model.spu").read_bytes()


def test_another_seed_gives_another_model(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path
) -> None:
    start_run(make(tiny_cohort, seed=4), tmp_path / "r", cache=tiny_cache)
    assert (tmp_path / "r/model.spu").read_bytes() != (finished / "model.spu").read_bytes()


def test_centralized_sends_nothing_and_tests_the_same_people(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "central"
    result = start_run(make(tiny_cohort, strategy="centralized"), run, cache=tiny_cache)
    assert all(row.transport_bytes == 0 and row.payload_bytes == 0 for row in rows(run))
    federated = json.loads((finished / "result.json").read_text())
    assert result["accuracy"]["site_n"] == federated["accuracy"]["site_n"]
    assert result["yardsticks"] == federated["yardsticks"]
    assert result["sparsity"]["prunable"] == federated["sparsity"]["prunable"]


def test_local_strategy_keeps_what_a_majority_keeps(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    result = start_run(
        make(tiny_cohort, strategy="fedsparsify-local"), tmp_path / "r", cache=tiny_cache
    )
    # The union of what 1 of 3 sites keeps is at most as sparse as each site.
    assert 0.3 < result["sparsity"]["prunable"] <= 0.8


def test_paper_mode_prunes_biases_too(tiny_cohort: Path, tiny_cache: Path, tmp_path: Path) -> None:
    result = start_run(
        make(tiny_cohort, paper=True, min_per_filter=0, optimizer="sgd", lr=1e-3, age_scale=1.0),
        tmp_path / "r",
        cache=tiny_cache,
    )
    layers = result["sparsity"]["layers"]
    assert any(name.endswith(".bias") for name in layers)
    # Every bias but the last starts at exactly 0, so ties and zeros may prune a little more.
    assert result["sparsity"]["all"] >= 0.8 - 1e-3


def test_a_used_folder_is_refused(tiny_cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds something"):
        start_run(make(tiny_cohort), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_server_killed_as_it_begins_leaves_a_folder_that_can_be_used(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.toml.123.tmp").write_text("half a li")
    start_run(make(tiny_cohort, rounds=2), tmp_path / "r", cache=tiny_cache)
    assert not list((tmp_path / "r").rglob("*.tmp"))


def test_resume_of_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no config\.toml"):
        resume_run(tmp_path)


def test_damaged_checkpoint_is_named(tiny_cohort: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    start_run(make(tiny_cohort, rounds=2), run, cache=tiny_cache)
    model = run / "checkpoints/round-00002/model.spu"
    data = bytearray(model.read_bytes())
    data[-3] ^= 1
    model.write_bytes(data)
    with pytest.raises(RunError, match=r"round-00002 is damaged.*Remove that folder"):
        resume_run(run, cache=tiny_cache)


def test_resume_of_a_finished_run_changes_nothing(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    start_run(make(tiny_cohort, rounds=2), run, cache=tiny_cache)
    shutil.copytree(run, tmp_path / "before")
    resume_run(run, cache=tiny_cache)
    assert (run / "model.spu").read_bytes() == (tmp_path / "before/model.spu").read_bytes()
    assert_same_but_for_whole_models(run, tmp_path / "before", 3)


def test_a_second_process_is_kept_out(tiny_cohort: Path, tiny_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"

    class Intruder(Silent):
        def round_started(self, number: int, rounds: int, sites: Sequence[str]) -> None:
            del number, rounds, sites
            with pytest.raises(RunError, match="another process"):
                resume_run(run, cache=tiny_cache)
            seen.append(True)

    seen: list[bool] = []
    start_run(make(tiny_cohort, rounds=2), run, cache=tiny_cache, watcher=Intruder())
    assert seen


def rewrite(cohort: Path, target: Path, change: Callable[[list[str]], list[str]]) -> Path:
    lines = cohort.read_text().splitlines()
    full = [lines[0], *(f"{cohort.parent}/{line}" for line in lines[1:])]
    target.write_text("\n".join(change(full)) + "\n")
    return target


def test_a_copied_scan_is_refused_or_left_out(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    def copy_first(lines: list[str]) -> list[str]:
        source, age, _, _ = lines[1].split(",")
        shutil.copy(source, tmp_path / "copy.nii.gz")
        return [*lines, f"copy.nii.gz,{age},b,somebody-else"]

    cohort = rewrite(tiny_cohort, tmp_path / "copied.csv", copy_first)
    with pytest.raises(CohortError, match=r"a0 of a, somebody-else of b.*--on-problem skip"):
        start_run(make(cohort, rounds=2), tmp_path / "r", cache=tiny_cache)
    assert not (tmp_path / "r").exists()
    config = make(cohort, rounds=2, on_problem="skip")
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    assert result["data"]["skipped"] == 1
    assert result["data"]["train_n"] + result["data"]["test_n"] == 14


def test_resume_needs_the_same_people(tiny_cohort: Path, tiny_cache: Path, tmp_path: Path) -> None:
    cohort = rewrite(tiny_cohort, tmp_path / "people.csv", lambda lines: lines)
    run = tmp_path / "r"
    start_run(make(cohort, rounds=2), run, cache=tiny_cache)
    rewrite(tiny_cohort, cohort, lambda lines: lines[:-1])
    with pytest.raises(RunError, match=r"scans of c/d are not those"):
        resume_run(run, cache=tiny_cache)


def test_fewer_evaluations_change_nothing_else(
    tiny_cohort: Path, tiny_cache: Path, tmp_path: Path, finished: Path
) -> None:
    config = make(tiny_cohort, evaluate_every=2)
    result = start_run(config, tmp_path / "r", cache=tiny_cache)
    assert (tmp_path / "r/model.spu").read_bytes() == (finished / "model.spu").read_bytes()
    assert [entry["test_n"] > 0 for entry in result["history"]] == [True, False, True, True]
    assert result["accuracy"] == json.loads((finished / "result.json").read_text())["accuracy"]
