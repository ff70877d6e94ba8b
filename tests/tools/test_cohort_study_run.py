"""The study as a whole, on a handful of people: jobs, going on, results, page."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparsekit.errors import RunError
from sparsekit.fed.cohort.make.cohort import make_cohort
from sparsekit.fed.config import RunConfig
from sparsekit.fed.prepare import prepare_sites
from tools.cohort_study import simple
from tools.cohort_study.network import Recipe, predict, train
from tools.cohort_study.page import claims, collect, curve_claim, page
from tools.cohort_study.people import load, render_chunk, split
from tools.cohort_study.plan import FULL, SIMPLE, SMALL, Draw, Job, Study, jobs
from tools.cohort_study.running import run

TINY = Study(
    seeds=(0, 1),
    scales=(0.5, 1.0),
    curve=(16, 24),
    held_out=8,
    sites=2,
    chunk=20,
    small=Recipe(width=0.05, updates=2),
    full=Recipe(width=0.1, updates=1),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simple, "_TREES", simple._TREES[:1])
        patch.setattr(simple, "_MOST_TREES", 2)
        run(TINY, root, lambda _: None)
    return root


def test_people_come_before_what_is_fitted_to_them() -> None:
    order = list(jobs(TINY))
    assert len(set(order)) == len(order)
    for place, job in enumerate(order):
        if job.kind != "render":
            before = {j.number for j in order[:place] if j.draw == job.draw and j.kind == "render"}
            assert before == {0, 20}


def test_every_predictor_is_fitted_to_every_draw(finished: Path) -> None:
    for scale in TINY.scales:
        for seed in TINY.seeds:
            for kind in (*SIMPLE, SMALL, FULL):
                job = Job(Draw(seed, scale), kind, 24)
                result = json.loads(job.target(finished).read_text())
                assert len(result["errors"]) == 8
                assert np.isfinite(result["errors"]).all()


def test_a_study_goes_on_with_what_is_missing(finished: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}
    gone = Job(Draw(1, 0.5), SMALL, 16).target(finished)
    before = json.loads(gone.read_text())
    gone.unlink()
    said: list[str] = []
    run(TINY, finished, said.append)
    assert any("small CNN, 16 people" in line for line in said)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*.json")}
    assert {path for path in files if files[path] != after[path]} == {gone}
    # Same seed, same bits: which process trains it does not matter.
    assert json.loads(gone.read_text())["errors"] == before["errors"]


def test_a_job_that_another_process_is_at_is_left_to_it(finished: Path) -> None:
    target = Job(Draw(0, 0.5), "mean predictor", 24).target(finished)
    content = target.read_bytes()
    target.unlink()
    with target.with_suffix(".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        said: list[str] = []

        def finish(_: float) -> None:
            assert said == []
            target.write_bytes(content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tools.cohort_study.running.time.sleep", finish)
            run(TINY, finished, said.append)
    assert said == []


def test_a_folder_of_other_settings_is_refused(finished: Path) -> None:
    with pytest.raises(RunError, match="other settings"):
        run(replace(TINY, held_out=16), finished, lambda _: None)


def test_more_seeds_and_sizes_may_be_asked_for_later() -> None:
    assert replace(TINY, seeds=(0, 1, 2), curve=(8, 24)).fingerprint() == TINY.fingerprint()
    assert replace(TINY, curve=(16, 32)).fingerprint() != TINY.fingerprint()
    assert replace(TINY, small=Recipe(updates=3)).fingerprint() != TINY.fingerprint()


def test_the_people_are_those_that_cohort_make_writes(tmp_path: Path) -> None:
    chunk = render_chunk(TINY, Draw(3, 0.5), 0)
    make_cohort(tmp_path / "cohort", subjects=32, sites=2, seed=3)
    config = RunConfig(cohort=str(tmp_path / "cohort"), test_fraction=0.2)
    scans = {}
    for site in prepare_sites(config, tmp_path / "cache").sites:
        for part in (site.train, site.test):
            for row, name in enumerate(part.participants):
                scans[name] = (part.ages[row], part.volume(row))
    for row in range(20):
        age, volume = scans[f"sub-{row + 1:05d}"]
        assert chunk["age"][row] == pytest.approx(age, abs=1e-3)
        inner = volume[2:44, 1:53, 0:42]
        np.testing.assert_allclose(chunk["image"][row], inner, atol=2e-3)


def test_held_out_people_are_the_same_for_all_sizes_and_sets_are_nested(finished: Path) -> None:
    few, many = (load(TINY, Draw(0, 0.5), finished, n, ()) for n in (16, 24))
    np.testing.assert_array_equal(few.test, many.test)
    assert set(few.train) < set(many.train)
    assert not set(many.train) & set(many.test)
    assert len(many.train) + len(many.test) == 32


def test_each_site_holds_out_its_own() -> None:
    sites = np.repeat([0, 1], 16)
    train_rows, test_rows = split(sites, TINY, 16)
    assert np.bincount(sites[train_rows]).tolist() == [8, 8]
    assert np.bincount(sites[test_rows]).tolist() == [4, 4]


def test_a_network_learns_a_size_and_mirrors_scans() -> None:
    random = np.random.default_rng(0)
    ages = random.uniform(45, 80, 48)
    images = random.normal(0, 0.1, (48, 16, 16, 16)).astype(np.float16)
    for image, age in zip(images, ages, strict=True):
        size = round((age - 40) / 5)
        image[8 - size // 2 : 8 - size // 2 + size, 2:14, 2:14] += 2
    rows = np.arange(48)
    recipe = Recipe(width=0.1, updates=150, lr=3e-3)
    said: list[int] = []
    model = train(images, ages, rows[:40], recipe, 0, lambda done, *_: said.append(done))
    assert said == [100]
    errors = np.abs(predict(model, images, rows[40:]) - ages[40:])
    assert errors.mean() < 0.6 * np.abs(ages[:40].mean() - ages[40:]).mean()
    mirrored = np.ascontiguousarray(images[:, ::-1])
    np.testing.assert_allclose(
        predict(model, mirrored, rows), predict(model, images, rows), atol=1e-3
    )


def test_the_page_says_what_does_not_hold_and_what_was_not_run(finished: Path) -> None:
    results = json.loads(json.dumps(collect(TINY, finished)))
    assert results["missing"] == []
    text = page(results)
    assert "**does not hold**" in text
    assert "nothing here says anything about real brains" in text
    for kind in (*SIMPLE, SMALL, FULL):
        assert f"| {kind} |" in text
    target = Job(Draw(0, 1.0), FULL, 24).target(finished)
    content = target.read_bytes()
    target.unlink()
    text = page(json.loads(json.dumps(collect(TINY, finished))))
    target.write_bytes(content)
    assert "Not run: scale 1, 24 people, seed 0: full CNN. " in text


def test_a_margin_holds_only_with_its_interval() -> None:
    row = {"scale": 0.5, "people": 24, "mae": {"0": 4.5}, "interval": {"mean": 4.5}}

    def held(mean: float, low: float, kind: str = "ridge on 8 mm voxels") -> list[bool | None]:
        gap = {"mean": mean, "low": low, "high": 1.0, "seeds": 2}
        rows = [{**row, "predictor": kind, "behind_small": gap}]
        results = {"study": {"curve": [16, 24]}, "rows": rows}
        return [holds for wanted, _, holds in claims(results, 0.5) if kind in wanted]

    assert held(0.41, 0.1) == [True]
    assert held(0.39, 0.1) == [False]
    assert held(0.41, -0.1) == [False]
    assert held(0.3, 0.1, "boosted trees") == [True]
    missing: dict[str, object] = {"study": {"curve": [16, 24]}, "rows": []}
    assert {holds for _, _, holds in claims(missing, 0.5)} == {None}


def test_a_curve_falls_only_with_its_interval() -> None:
    def falls(gain: dict[str, float] | None) -> bool | None:
        return curve_claim({"curve": [{"from": 16, "to": 24, "gain": gain}]})[2]

    assert falls({"mean": 0.2, "low": 0.05, "high": 0.3}) is True
    assert falls({"mean": 0.2, "low": -0.05, "high": 0.4}) is False
    assert falls(None) is None
