import dataclasses
import platform
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sparsekit.fed.allocator import keep_freed_memory
from sparsekit.fed.config import RunConfig
from sparsekit.fed.plan import TASK_TRAIN, TrainPlan, build_model, plan_for
from sparsekit.fed.training import Cancelled, augment, load_batch, predict, train_locally

GRID = (10, 12, 9)
CPU = torch.device("cpu")


class Random:
    """Scans of noise around the age."""

    def __init__(self, people: int, grid: tuple[int, int, int] = GRID) -> None:
        random = np.random.default_rng(5)
        self.ages: npt.NDArray[np.float32] = random.uniform(45, 80, people).astype(np.float32)
        self.data = random.standard_normal((people, *grid)).astype(np.float32)
        self.participants = tuple(f"p{i}" for i in range(people))
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.ages)

    def volume(self, index: int) -> npt.NDArray[np.float32]:
        self.asked.append(index)
        return np.asarray(self.data[index])


def make_plan(**changes: Any) -> TrainPlan:
    config = RunConfig(cohort="unused", width=0.05, epochs=2, batch=3)
    plan = plan_for(
        config,
        round_number=1,
        task=TASK_TRAIN,
        first_voxel=(0, 0, 0),
        in_shape=GRID,
        mean_age=60.0,
        masked=False,
        local_sparsity=None,
    )
    return dataclasses.replace(plan, **changes)


def train(plan: TrainPlan, scans: Random, site: str = "a") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(plan)
    train_locally(model, scans, plan, site=site, device=CPU)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_every_scan_is_seen_once_an_epoch() -> None:
    scans = Random(7)
    model = build_model(make_plan())
    outcome = train_locally(model, scans, make_plan(), site="a", device=CPU)
    assert (outcome.samples, outcome.steps) == (14, 6)
    assert sorted(scans.asked[:7]) == list(range(7)) == sorted(scans.asked[7:])
    assert scans.asked[:7] != scans.asked[7:]


@pytest.mark.parametrize(
    ("max_steps", "samples", "steps"), [(1, 3, 1), (3, 7, 3), (4, 10, 4), (6, 14, 6), (9, 14, 6)]
)
def test_steps_can_be_capped(max_steps: int, samples: int, steps: int) -> None:
    plan = make_plan(max_steps=max_steps)
    outcome = train_locally(build_model(plan), Random(7), plan, site="a", device=CPU)
    assert (outcome.samples, outcome.steps) == (samples, steps)
    assert outcome.last_epoch_loss is not None


def test_training_is_a_function_of_plan_scans_and_site() -> None:
    plan = make_plan(dropout=0.5, shift=1)
    first = train(plan, Random(7))
    # The global generator must not matter: sites share it on threads.
    torch.manual_seed(99)
    torch.rand(3)
    again = train(plan, Random(7))
    other_site = train(plan, Random(7), site="b")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other_site[name]) for name in first)


def test_the_network_sees_the_box_of_the_plan() -> None:
    scans = Random(3, grid=(14, 15, 11))
    plan = make_plan(first_voxel=[2, 3, 1])
    x, ages = load_batch(scans, np.array([2, 0]), plan, CPU)
    assert x.shape == (2, 1, *GRID)
    assert np.array_equal(x[0, 0].numpy(), scans.data[2, 2:12, 3:15, 1:10])
    assert np.array_equal(ages.numpy(), scans.ages[[2, 0]])


def test_augment_mirrors_left_and_right_and_moves_whole_voxels() -> None:
    volume = torch.arange(24.0).reshape(1, 4, 3, 2)
    mirrored = augment(volume, True, np.array([0, 0, 0]))
    assert torch.equal(mirrored[0, 0], volume[0, 3])
    assert torch.equal(mirrored[0, 1], volume[0, 2])
    moved = augment(volume, False, np.array([1, 0, -1]))
    assert moved[0, 1, 2, 0] == volume[0, 0, 2, 1]
    assert torch.equal(augment(volume, False, np.array([0, 0, 0])), volume)


def test_prediction_keeps_the_order_of_people() -> None:
    plan = make_plan()
    scans = Random(19)
    model = build_model(plan).eval()
    found = predict(model, scans, plan, device=CPU)
    assert found.shape == (19,)
    with torch.no_grad():
        for i in (0, 8, 18):
            alone = model(torch.from_numpy(scans.data[i])[None, None])
            assert float(alone) == pytest.approx(found[i], abs=1e-3)


def test_cancelling_stops_between_steps() -> None:
    calls = iter([False, False, True])
    plan = make_plan()
    with pytest.raises(Cancelled):
        train_locally(
            build_model(plan), Random(9), plan, site="a", device=CPU, cancelled=lambda: next(calls)
        )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_allocator_setting_is_taken_by_glibc() -> None:
    assert keep_freed_memory()
