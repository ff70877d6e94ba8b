import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsekit.codec import decode, encode, inspect
from sparsekit.codec.core import Values
from sparsekit.fed import messages
from sparsekit.fed.algorithm import (
    ServerState,
    aggregate,
    initial_state,
    plan_round,
    read_update,
    whole_order,
)
from sparsekit.fed.config import RunConfig
from sparsekit.fed.engines.base import Answered, Failure, Reply
from sparsekit.fed.merging import Update
from sparsekit.fed.plan import Hello, Report, TrainPlan, from_control, to_control
from sparsekit.fed.rounds import QuorumError, play_round
from tests.fed.test_merging import added

CONFIG = RunConfig(cohort="unused", rounds=4, width=0.05, sparsity=0.5, quorum=0.5)
SHAPE = (12, 12, 12)


def report(site: str, round_number: int, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "round": round_number,
        "site": site,
        "n_train": 10,
        "samples": 10,
        "steps": 5,
        "train_loss": 1.0,
        "test_n": 2,
        "test_abs_error_sum": 3.0,
        "flops_counted": 7,
        "flops_executed": 9,
    }
    return fields | changes


class Scripted:
    """An engine whose sites answer what the test says."""

    travels = True
    frame_bytes = 0

    def __init__(self, replies: Mapping[str, bytes | Failure]) -> None:
        self.replies = replies

    def hello(self) -> dict[str, bytes]:
        return {}

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        del answered
        return {
            site: one if isinstance(one, Failure) else Reply(one, 0.5)
            for site, one in ((site, self.replies[site]) for site in requests)
        }

    def close(self) -> None:
        pass


@pytest.fixture
def state() -> ServerState:
    return initial_state(CONFIG, in_shape=SHAPE, mean_age=60.0)


def hellos(*sites: str) -> dict[str, Hello]:
    return {
        site: Hello(
            site=site, n_train=10 * i, n_test=2, age_sum=0.0, preprocessing_id="x", content="y"
        )
        for i, site in enumerate(sites, start=1)
    }


@pytest.mark.parametrize("values", ["lossless", "bf16", "fp16"])
def test_the_base_of_replies_is_what_the_sites_decode(state: ServerState, values: Values) -> None:
    order = plan_round(state, dataclasses.replace(CONFIG, values=values))
    decoded = decode(order.payload)
    assert set(decoded) == set(order.sent.weights)
    assert all(torch.equal(order.sent.weights[name], w) for name, w in decoded.items())
    exact = all(torch.equal(state.weights[name], w) for name, w in decoded.items())
    assert exact == (values == "lossless")


@pytest.mark.parametrize(("values", "number"), [("fp16", 1e5), ("bf16", 3.4e38)])
def test_what_16_bits_cannot_hold_travels_losslessly(
    state: ServerState, values: Values, number: float
) -> None:
    name = next(iter(state.weights))
    state.weights[name].view(-1)[0] = number
    order = plan_round(state, dataclasses.replace(CONFIG, values=values))
    assert all(torch.equal(state.weights[n], w) for n, w in decode(order.payload).items())


def good(state: ServerState, site: str, shift: float) -> bytes:
    weights = {name: tensor + shift for name, tensor in state.weights.items()}
    return messages.pack(report(site, state.round + 1), encode(weights, round=1))


def test_average_is_weighted_by_scans(state: ServerState) -> None:
    engine = Scripted({"a": good(state, "a", 0.0), "b": good(state, "b", 3.0)})
    outcome = play_round(state, CONFIG, engine, hellos("a", "b"), lambda _: None)
    assert outcome.state.round == 1
    for name, before in state.weights.items():
        expected = before.double() / 3 + (before + 3.0).double() * 2 / 3
        torch.testing.assert_close(
            outcome.state.weights[name].double(), expected, rtol=1e-6, atol=1e-6
        )


def damaged(state: ServerState) -> dict[str, tuple[bytes | Failure, str]]:
    fine = good(state, "b", 1.0)
    nan = {name: t.clone() for name, t in state.weights.items()}
    next(iter(nan.values())).view(-1)[3] = float("nan")
    wrong = dict(state.weights) | {"out.bias": torch.zeros(2)}
    other_base = {name: torch.where(t > 0, t, 0.0) for name, t in state.weights.items()}
    masks = {name: t != 0 for name, t in other_base.items() if t.ndim == 5}
    flipped = bytearray(fine)
    flipped[-1] ^= 64
    return {
        "flipped byte": (bytes(flipped), "corrupt"),
        "cut short": (fine[:-5], "corrupt"),
        "no message": (b"hello", "corrupt"),
        "not JSON": (messages._HEADER.pack(b"SPKM", 2, 0) + b"{]", "corrupt"),
        "missing fields": (messages.pack({"round": 1}), "corrupt"),
        "no payload": (messages.pack(report("b", 1)), "corrupt"),
        "other shape": (messages.pack(report("b", 1), encode(wrong)), "shape"),
        "NaN": (messages.pack(report("b", 1), encode(nan)), "nan"),
        "other round": (messages.pack(report("b", 2), encode(state.weights)), "wrong-round"),
        "other site": (messages.pack(report("a", 1), encode(state.weights)), "wrong-round"),
        "other base": (
            messages.pack(report("b", 1), encode(other_base, masks=masks, base=other_base)),
            "stale-base",
        ),
        "dead": (Failure("dead", "connection closed"), "dead"),
    }


@pytest.mark.parametrize("kind", list(damaged(initial_state(CONFIG, in_shape=SHAPE, mean_age=1))))
def test_a_bad_reply_costs_its_site_the_round_only(state: ServerState, kind: str) -> None:
    reply, outcome_name = damaged(state)[kind]
    engine = Scripted({"a": good(state, "a", 0.25), "b": reply})
    outcome = play_round(state, CONFIG, engine, hellos("a", "b"), lambda _: None)
    assert outcome.failures["b"].outcome == outcome_name
    assert outcome.failures["b"].detail
    up = {row.client: row for row in outcome.rows if row.direction == "up"}
    assert up["b"].outcome == outcome_name
    assert up["b"].flops_counted == 0
    assert up["a"].outcome == "ok"
    for name, before in state.weights.items():
        assert torch.equal(outcome.state.weights[name], before + 0.25)


def test_the_norm_of_an_update_is_that_of_its_change(state: ServerState) -> None:
    count = sum(tensor.numel() for tensor in state.weights.values())
    # Each weight moves by 0.25: the distance is 0.25 * sqrt(count), up to the sums' rounding.
    distance = 0.25 * math.sqrt(count)
    replies: dict[str, bytes | Failure] = {
        "a": good(state, "a", 0.25), "b": good(state, "b", 0.2), "c": good(state, "c", -0.25)
    }  # fmt: skip
    for bound, out in ((1.001 * distance, set()), (0.999 * distance, {"a", "c"})):
        config = dataclasses.replace(CONFIG, max_update_norm=bound, quorum=0.1)
        outcome = play_round(state, config, Scripted(replies), hellos(*"abc"), lambda _: None)
        assert set(outcome.failures) == out
        assert {failure.outcome for failure in outcome.failures.values()} <= {"norm"}
    up = {row.client: row.outcome for row in outcome.rows if row.direction == "up"}
    assert up == {"a": "norm", "b": "ok", "c": "norm"}


def test_a_failure_has_its_time(state: ServerState) -> None:
    engine = Scripted({"a": good(state, "a", 0.1), "b": Failure("late", "slow", seconds=7.5)})
    outcome = play_round(state, CONFIG, engine, hellos("a", "b"), lambda _: None)
    seconds = {row.client: row.seconds for row in outcome.rows if row.direction == "up"}
    assert seconds == {"a": 0.5, "b": 7.5}


def test_weights_outside_the_masks_are_refused(state: ServerState) -> None:
    masks = {
        n: torch.ones_like(t, dtype=torch.bool) for n, t in state.weights.items() if t.ndim == 5
    }
    first = next(iter(masks))
    masks[first].view(-1)[0] = False
    pruned = dict(state.weights) | {first: torch.where(masks[first], state.weights[first], 0.0)}
    masked = dataclasses.replace(state, masks=masks, weights=pruned)
    engine = Scripted(
        {
            "a": good(masked, "a", 0.5),
            "b": messages.pack(report("b", 1), encode(pruned, masks=masks, base=pruned)),
        }
    )
    outcome = play_round(masked, CONFIG, engine, hellos("a", "b"), lambda _: None)
    assert outcome.failures["a"].outcome == "shape"
    assert set(outcome.answers) == {"b"}


def test_too_few_replies_end_the_round_with_its_account(state: ServerState) -> None:
    bad = Failure("dead", "connection closed")
    engine = Scripted({"a": good(state, "a", 0.0), "b": bad, "c": bad})
    with pytest.raises(QuorumError, match=r"1 of 3 sites.*quorum is 2.*b: dead") as caught:
        play_round(state, CONFIG, engine, hellos("a", "b", "c"), lambda _: None)
    assert len(caught.value.rows) == 6


def test_global_pruning_starts_after_the_start_round(state: ServerState) -> None:
    plan = plan_round(state, CONFIG).plan
    update = read_update(encode(state.weights), plan=plan, sent=state, n_train=5)
    first = aggregate(state, added({"a": update}), CONFIG)
    assert first.masks is None
    second = aggregate(first, added({"a": update}), CONFIG)
    assert second.masks is not None
    # s_2 = 0.5 - 0.5 * (1 - 1/3)**3
    total = sum(mask.numel() for mask in second.masks.values())
    kept = sum(int(mask.sum()) for mask in second.masks.values())
    assert kept == total - int((0.5 - 0.5 * (2 / 3) ** 3) * total)


def test_local_votes_decide(state: ServerState) -> None:
    config = dataclasses.replace(CONFIG, strategy="fedsparsify-local")
    state = dataclasses.replace(state, round=1)
    plan = plan_round(state, config).plan
    assert plan.local_sparsity is not None
    names = [name for name, t in state.weights.items() if t.ndim == 5]
    random = np.random.default_rng(1)
    updates = {}
    kept: dict[str, list[npt.NDArray[np.bool_]]] = {name: [] for name in names}
    for site in "abcd":
        weights = dict(state.weights)
        masks = {}
        for name in names:
            mask = random.random(tuple(weights[name].shape)) < 0.4
            kept[name].append(mask)
            masks[name] = torch.from_numpy(mask)
            weights[name] = torch.where(masks[name], weights[name] + 1.0, 0.0)
        payload = encode(weights, masks=masks, base=state.weights)
        updates[site] = read_update(payload, plan=plan, sent=state, n_train=10)
    merged = aggregate(state, added(updates), config)
    assert merged.masks is not None
    for name in names:
        votes = np.sum(kept[name], axis=0)
        assert np.array_equal(merged.masks[name].numpy(), votes >= 2)
        expected = np.where(votes >= 2, votes / 4 * (state.weights[name].numpy() + 1.0), 0.0)
        np.testing.assert_allclose(merged.weights[name].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_a_vote_leaves_no_filter_empty(state: ServerState) -> None:
    config = dataclasses.replace(CONFIG, strategy="fedsparsify-local")
    state = dataclasses.replace(state, round=1)
    plan = plan_round(state, config).plan
    name = "blocks.0.conv.weight"
    updates = {}
    for number, site in enumerate("abcdef"):
        # Every site keeps another weight of the first filter: none has a majority.
        weights = dict(state.weights)
        masks = {n: torch.ones_like(t, dtype=torch.bool) for n, t in weights.items() if t.ndim == 5}
        masks[name][0] = False
        masks[name][0].view(-1)[number] = True
        weights[name] = torch.where(masks[name], 1.0 + number, 0.0)
        payload = encode(weights, masks=masks, base=state.weights)
        updates[site] = read_update(payload, plan=plan, sent=state, n_train=10)
    merged = aggregate(state, added(updates), config).masks
    assert merged is not None
    # The largest average of the filter is that of the last site's weight.
    assert merged[name][0].view(-1).nonzero().tolist() == [[5]]
    assert bool(merged[name][1:].all())
    unguarded = aggregate(
        state, added(updates), dataclasses.replace(config, min_per_filter=0)
    ).masks
    assert unguarded is not None
    assert not bool(unguarded[name][0].any())


def test_records_survive_json() -> None:
    plan = plan_round(initial_state(CONFIG, in_shape=SHAPE, mean_age=61.5), CONFIG).plan
    again = from_control(TrainPlan, messages.unpack(messages.pack(to_control(plan))).control)
    assert again == plan
    one = from_control(Report, report("a", 1))
    assert from_control(Report, to_control(one)) == one


def test_what_was_never_sent_counts_no_bytes(state: ServerState) -> None:
    order = plan_round(state, CONFIG)
    whole = len(messages.pack(to_control(order.plan), order.payload))
    engine = Scripted(
        {
            "a": good(state, "a", 0.1),
            "b": Failure("dead", "gone", sent_bytes=0),
            "c": Failure("late", "slow"),
            "d": Failure("dead", "gone", sent_bytes=200, received_bytes=7),
            "e": Failure("corrupt", "odd", received_bytes=30),
            "f": Failure("late", "slow", sent_bytes=whole - 10),
        }
    )
    config = dataclasses.replace(CONFIG, quorum=0.1)
    outcome = play_round(state, config, engine, hellos(*"abcdef"), lambda _: None)
    down, up = (
        {row.client: row for row in outcome.rows if row.direction == direction}
        for direction in ("down", "up")
    )
    assert [down[site].transport_bytes for site in "abcdef"] == [
        whole, 0, whole, 200, whole, whole - 10,
    ]  # fmt: skip
    assert [up[site].transport_bytes for site in "bcdef"] == [0, 0, 7, 30, 0]
    payload = down["a"].payload_bytes
    assert [down[site].payload_bytes for site in "abcdef"] == [
        payload, 0, payload, max(0, payload - whole + 200), payload, payload - 10,
    ]  # fmt: skip
    for row in outcome.rows:
        assert row.framing_bytes is not None
        assert min(row.payload_bytes, row.control_bytes, row.framing_bytes) >= 0
        levels = row.payload_bytes + row.control_bytes + row.framing_bytes
        assert levels == row.transport_bytes
    assert [down[site].outcome for site in "abcdef"] == ["ok", "dead", "ok", "ok", "ok", "ok"]
    assert [bool(down[site].dense_equivalent_bytes) for site in "ab"] == [True, False]
    assert [bool(up[site].dense_equivalent_bytes) for site in "ab"] == [True, False]


class Forgetful(Scripted):
    """An engine of which some sites have lost the model that they held."""

    def __init__(self, replies: Mapping[str, bytes | Failure], lost: set[str]) -> None:
        super().__init__(replies)
        self.lost = lost
        self.requests: list[dict[str, bytes]] = []

    def exchange(
        self, requests: Mapping[str, bytes], answered: Answered
    ) -> dict[str, Reply | Failure]:
        self.requests.append(dict(requests))
        replies = super().exchange(requests, answered)
        for site, request in requests.items():
            if site in self.lost and inspect(messages.unpack(request).payload).base_digest:
                replies[site] = Failure("stale-base", "not held", received_bytes=30)
        return replies


def test_a_site_that_lost_its_model_gets_it_whole_in_the_same_round(state: ServerState) -> None:
    sites = ("a", "b", "c")
    first = play_round(
        state, CONFIG, Scripted({s: good(state, s, 0.1) for s in sites}), hellos(*sites),
        lambda _: None,
    ).state  # fmt: skip
    engine = Forgetful({s: good(first, s, 0.01) for s in sites}, {"b", "c"})
    outcome = play_round(first, CONFIG, engine, hellos(*sites), lambda _: None, {"a", "b"})
    assert set(outcome.answers) == set(sites)
    assert [sorted(requests) for requests in engine.requests] == [["a", "b", "c"], ["b"]]
    sizes = [{s: len(r) for s, r in requests.items()} for requests in engine.requests]
    assert sizes[0]["a"] == sizes[0]["b"] < sizes[0]["c"] == sizes[1]["b"]
    down, up = (
        [(r.client, r.outcome, r.transport_bytes) for r in outcome.rows if r.direction == d]
        for d in ("down", "up")
    )
    assert sorted(down) == sorted(
        [*((s, "ok", n) for s, n in sizes[0].items()), ("b", "ok", sizes[1]["b"])]
    )
    assert ("b", "stale-base", 30) in up
    assert sorted(o for s, o, _ in up if s == "b") == ["ok", "stale-base"]
    plain = Scripted({s: good(first, s, 0.01) for s in sites})
    whole = play_round(first, CONFIG, plain, hellos(*sites), lambda _: None)
    for name, tensor in whole.state.weights.items():
        assert torch.equal(outcome.state.weights[name], tensor)


def test_a_site_that_cannot_decode_the_whole_model_is_out(state: ServerState) -> None:
    engine = Scripted({"a": good(state, "a", 0.1), "b": Failure("stale-base", "never")})
    config = dataclasses.replace(CONFIG, quorum=0.5)
    outcome = play_round(state, config, engine, hellos("a", "b"), lambda _: None, {"a", "b"})
    assert outcome.failures["b"].outcome == "stale-base"


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_what_rounding_took_away_is_sent_later(state: ServerState, values: Values) -> None:
    config = dataclasses.replace(CONFIG, values=values, strategy="fedavg")
    target = {
        name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.weights.items()
    }
    for number in range(6):
        order = plan_round(state, config)
        assert order.based == (number > 0)
        whole = decode(whole_order(order).payload)
        assert all(torch.equal(whole[name], w) for name, w in order.sent.weights.items())
        # The sites send back what they got: all that changes is what had been rounded.
        update = Update(dict(order.sent.weights), None, 1)
        merged = aggregate(state, added({"a": update}), config, order.sent.weights)
        if number == 0:
            merged = dataclasses.replace(merged, weights=target)
        state = dataclasses.replace(merged, sent=dict(order.sent.weights))
    for name, tensor in plan_round(state, config).sent.weights.items():
        assert torch.allclose(tensor, target[name], atol=1e-4), name


@pytest.mark.parametrize(
    "changes",
    [{"test_abs_error_sum": 1.7e308}, {"test_abs_error_sum": -1.0}, {"train_loss": 1e200},
     {"test_n": 3}],
)  # fmt: skip
def test_a_report_that_cannot_be_costs_its_site_the_round(
    state: ServerState, changes: dict[str, Any]
) -> None:
    bad = messages.pack(report("b", 1) | changes, encode(state.weights, round=1))
    engine = Scripted({"a": good(state, "a", 0.1), "b": bad})
    config = dataclasses.replace(CONFIG, quorum=0.5)
    outcome = play_round(state, config, engine, hellos("a", "b"), lambda _: None)
    assert outcome.failures["b"].outcome == "corrupt"
    assert set(outcome.answers) == {"a"}
