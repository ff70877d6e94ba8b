"""Timed choices of tiles, by a clock that needs no GPU."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import explain, masked_conv3d
from sparsekit.fed.site import Site
from sparsekit.kernels import dispatch, tuning
from sparsekit.kernels.masked_conv3d import autotune, gpu_cost
from sparsekit.kernels.masked_conv3d.geometry import Shape
from sparsekit.kernels.masked_conv3d.gpu_cost import Decision
from sparsekit.kernels.masked_conv3d.gpu_plans import GpuPlans
from sparsekit.kernels.masked_conv3d.tiles import Kind

ONES = (1, 1, 1)
SHAPE = Shape(4, 6, (3, 4, 5), (3, 3, 3), ONES, ONES, ONES, 1)
KIND = Kind("other", torch.float32, "ieee")


class Clock:
    """Says what it was told to about one run after the other, which it runs or not."""

    def __init__(self, *seconds: float, runs: bool = False) -> None:
        self.seconds, self.runs, self.asked = seconds, runs, 0

    def __call__(self, run: Callable[[], object]) -> float:
        if self.runs:
            run()
        self.asked += 1
        return self.seconds[(self.asked - 1) % len(self.seconds)]


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.clear_records()
    yield
    dispatch.clear_records()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    # The third of the tiles is the fastest, and the dense convolution slower.
    made = Clock(5e-6, 4e-6, 1e-6, 3e-6, 6e-6, 7e-6, 9e-6)
    monkeypatch.setattr(autotune, "timer", made)
    return made


def mask_of(device: str, density: float = 0.3, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (torch.rand((6, 4, 3, 3, 3), generator=random) < density).to(device)


def decide(mask: Tensor, *, train: bool = True, samples: int = 1) -> Decision:
    return GpuPlans.of(mask).decide(SHAPE, samples, KIND, train=train)


def modelled(mask: Tensor) -> Decision:
    listed = gpu_cost.count_columns(mask, 1)
    return gpu_cost.decide(SHAPE, 1, KIND, listed, train=True)


def test_the_fastest_by_the_clock_is_taken(clock: Clock, device: str) -> None:
    mask = mask_of(device)
    listed = gpu_cost.count_columns(mask, 1)
    every = autotune.candidates(SHAPE, 1, KIND, listed, train=True)
    assert every[0] == modelled(mask).settings
    assert len(every) == len(set(every)) == autotune.FORWARD * autotune.BACKWARD
    found = decide(mask)
    assert clock.asked == len(every) + 1
    assert found.settings == every[2]
    assert (found.dense, found.kernel_seconds, found.dense_seconds) == (False, 1e-6, 9e-6)
    assert found.reason.startswith("autotuned on ")


def test_each_kind_of_call_is_timed_once(clock: Clock, device: str) -> None:
    mask = mask_of(device)
    first, again = decide(mask), decide(mask)
    asked = clock.asked
    assert first is again
    # Of another tensor with about as many weights: from the file.
    assert decide(mask_of(device, seed=2)).settings == first.settings
    assert clock.asked == asked
    decide(mask, train=False)
    assert clock.asked > asked
    asked = clock.asked
    decide(mask_of(device, density=0.01))
    assert clock.asked > asked
    asked = clock.asked
    decide(mask, samples=2)
    assert clock.asked > asked
    kept = json.loads(tuning.path().read_text())
    assert len(kept["choices"]) == tuning.count() == 4
    assert set(kept["versions"]) == {"sparsekit", "triton", "torch", "driver"}
    assert os.listdir(tuning.path().parent) == [tuning.path().name]


def test_the_dense_path_can_be_the_fastest(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(autotune, "timer", Clock(*[5e-6] * 6, 2e-6))
    found = decide(mask_of(device))
    assert (found.dense, found.kernel_seconds, found.dense_seconds) == (True, 5e-6, 2e-6)


def test_other_versions_are_timed_anew(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    decide(mask_of(device))
    asked = clock.asked
    monkeypatch.setattr(autotune, "_versions", lambda: {"driver": "another"})
    decide(mask_of(device))
    assert clock.asked == 2 * asked
    assert json.loads(tuning.path().read_text())["versions"] == {"driver": "another"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"versions": {}, "choices": [1]}'])
def test_a_damaged_file_is_ignored_with_a_warning(clock: Clock, content: str, device: str) -> None:
    tuning.path().parent.mkdir(parents=True)
    tuning.path().write_text(content)
    with pytest.warns(UserWarning, match="holds no timed tiles that can be read"):
        found = decide(mask_of(device))
    assert found.reason.startswith("autotuned")
    asked = clock.asked
    decide(mask_of(device))
    assert clock.asked == asked


def test_a_damaged_choice_is_ignored_with_a_warning(clock: Clock, device: str) -> None:
    decide(mask_of(device))
    stored = json.loads(tuning.path().read_text())
    (key,) = stored["choices"]
    for damaged in ({}, {"settings": {"rows": 1}}, {"settings": {}, "kernels": "x", "dense": 1}):
        stored["choices"][key] = damaged
        tuning.path().write_text(json.dumps(stored))
        mask = mask_of(device)
        with pytest.warns(UserWarning, match="is damaged"):
            assert decide(mask) == modelled(mask)
    assert clock.asked


def test_a_folder_that_cannot_be_written(clock: Clock, tmp_path: Path, device: str) -> None:
    (tmp_path / "sparsekit").write_text("a file")
    with pytest.warns(UserWarning, match=r"are not kept|can be read"):
        found = decide(mask_of(device))
    assert clock.asked
    assert found.reason.startswith("autotuned")


def test_too_little_memory_leaves_the_choice_to_the_model(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def full(_: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(autotune, "timer", full)
    mask = mask_of(device)
    with pytest.warns(UserWarning, match="memory"):
        assert decide(mask) == modelled(mask)


@pytest.mark.parametrize("why", ["unset", "zero", "distributed", "federation", "no-gpu"])
def test_it_is_off(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, why: str, device: str, sanitized: bool
) -> None:
    mask = mask_of(device)
    timed = decide(mask)
    asked = clock.asked
    if why == "unset":
        monkeypatch.delenv(tuning.VARIABLE)
    elif why == "zero":
        monkeypatch.setenv(tuning.VARIABLE, "0")
    elif why == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    elif why == "no-gpu":
        if sanitized:
            pytest.skip("ttsem lets every tensor be on a GPU")
        monkeypatch.setattr(autotune, "timer", None)
    if why == "federation":
        with tuning.forbidden("a federation"):
            assert tuning.why_off() == "a federation"
            found = decide(mask)
        assert decide(mask) is timed
    else:
        found = decide(mask)
    # Not by what was timed before, either: all processes are to choose alike.
    assert found == modelled(mask)
    assert clock.asked == asked


def test_a_site_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(request: bytes) -> None:
        seen.append(tuning.why_off())
        raise KeyError(request)

    monkeypatch.setattr("sparsekit.fed.site.messages.unpack", stop)
    with pytest.raises(KeyError):
        Site.handle(object.__new__(Site), b"")
    assert seen == ["never within a federation"]
    assert tuning.why_off() == ""


def test_a_recorded_graph_keeps_what_was_timed(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    mask = mask_of("cpu")
    timed = decide(mask)
    plans, asked = GpuPlans.of(mask), clock.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plans._mask = plans._mask.as_subclass(OnGpu)
    assert plans.decide(SHAPE, 1, KIND, train=True) is timed
    assert plans.decide(SHAPE, 3, KIND, train=True).reason.startswith("modelled")
    assert clock.asked == asked


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_timed_runs(monkeypatch: pytest.MonkeyPatch, groups: int, device: str) -> None:
    """All candidates, forward and backward, and then the call itself with the fastest."""
    monkeypatch.setattr(autotune, "timer", Clock(3e-6, 1e-6, 2e-6, runs=True))
    monkeypatch.setattr(autotune, "FORWARD", 2)
    monkeypatch.setattr(autotune, "BACKWARD", 1)
    random = torch.Generator().manual_seed(3)
    x = torch.randn((1, 2 * groups, 3, 2, 4), generator=random).to(device).requires_grad_()
    weight = torch.randn((2 * groups, 2, 2, 1, 3), generator=random).to(device).requires_grad_()
    mask = (torch.rand(weight.shape, generator=random) < 0.4).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision = GpuPlans.of(mask).decide(
            Shape(2 * groups, 2 * groups, (3, 2, 4), (2, 1, 3), ONES, (1, 0, 1), ONES, groups),
            1, Kind("other", torch.float32, "ieee"), train=True,
        )  # fmt: skip
        y = masked_conv3d(
            x, weight, mask, padding=(1, 0, 1), groups=groups, backend="triton", precision="ieee"
        )
    assert (decision.kernel_seconds, decision.dense_seconds) == (1e-6, 2e-6)
    own = torch.autograd.grad(y.square().sum(), (x, weight))
    expected = masked_conv3d(x, weight, mask, padding=(1, 0, 1), groups=groups, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(own, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("clock")
def test_explain_says_so(device: str) -> None:
    choice = dispatch.resolve("masked_conv3d", "cuda", decision=decide(mask_of(device)))
    dispatch.record(choice, "cuda", "(6, 4, 3, 3, 3) float32")
    assert ": triton (autotuned on" in str(explain())


def test_density_classes_are_half_octaves(device: str) -> None:
    def key(kept: int) -> Any:
        mask = torch.zeros(6 * 4 * 27, dtype=torch.bool)
        mask[:kept] = True
        mask = mask.view(6, 4, 3, 3, 3).to(device)
        listed = gpu_cost.count_columns(mask, 1)
        return json.loads(autotune.key_of(mask, SHAPE, 1, KIND, listed, train=True))["classes"][0]

    assert key(100) == key(105) == round(2 * math.log2(100))
    assert key(200) == key(100) + 2
