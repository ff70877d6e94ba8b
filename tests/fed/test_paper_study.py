"""The grid of runs: what it holds, that it goes on when interrupted, and what its page says."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekit.fed.config import RunConfig
from tools import paper_study
from tools.paper_study import Cell, grid, is_done, main, settings

TOOLS = Path(paper_study.__file__).parent


def test_the_grid_has_each_cell_once_and_a_dense_run_beside_each() -> None:
    for small in (True, False):
        cells = grid(small=small)
        assert len({cell.name for cell in cells}) == len(cells)
        for cell in cells:
            reference = "centralized" if cell.strategy == "centralized" else "fedavg"
            assert Cell(cell.environment, cell.seed, reference, 0.0, "dense") in cells
            config = RunConfig(cohort="unused", **settings(cell, threads=2))
            assert (config.initial_sparsity == 0.95) == (cell.recipe == "sparse-start")
    whole = grid(small=False)
    # Cohort by cohort, so that the scans of one are prepared once.
    cohorts = [cell.cohort for cell in whole]
    assert len(set(cohorts)) == 9
    assert sorted(cohorts, key=cohorts.index) == cohorts
    for environment in paper_study.ENVIRONMENTS:
        for strategy in ("fedsparsify-global", "fedsparsify-local"):
            found = {
                (cell.sparsity, cell.seed)
                for cell in whole
                if (cell.environment, cell.strategy) == (environment, strategy)
            }
            assert found >= {(s, seed) for s in (0.85, 0.9, 0.95, 0.99) for seed in (0, 1, 2)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that take seconds."""
    monkeypatch.setattr(paper_study, "COHORT", ("--subjects", "16", "--sites", "2"))
    whole = paper_study.settings
    small = {"rounds": 2, "width": 0.05, "max_steps": 2, "evaluate_every": 1}
    small |= {"prune_end": 2}
    monkeypatch.setattr(paper_study, "settings", lambda *args: whole(*args) | small)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_runs_are_played_once_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(tmp_path), "--small", "--only", "uniform-iid-0"]
    assert main(line) == 0
    done = {path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()}
    names = [f"uniform-iid-0-{one}" for one in ("fedavg-0-dense", "fedsparsify-global-95-early")]
    assert len(done) == 2
    assert all(file.startswith(name) for file, name in zip(sorted(done), names, strict=True))
    assert not list((tmp_path / "cache").iterdir())
    capsys.readouterr()
    assert main(line) == 0
    assert capsys.readouterr().out == "2 of 2 runs are done\n"
    # As after an interruption: the run is there, without its result.
    file = next(name for name in done if "early" in name)
    run = tmp_path / "runs" / Path(file).stem
    (tmp_path / "results" / file).unlink()
    (run / "result.json").unlink()
    assert main(line) == 0
    again = json.loads((tmp_path / "results" / file).read_text())
    before = json.loads(done[file])
    assert again["errors"] == before["errors"]
    assert again["bytes"]["up"]["payload"] == before["bytes"]["up"]["payload"]
    assert again["settings"]["sparsity"] == again["cell"]["sparsity"] == 0.95
    assert again["mean_density"] == 1.0
    assert len(again["errors"]) == len(again["participants"]) == again["data"]["test_n"]
    # Made halfway by an interruption.
    shutil.rmtree(tmp_path / "cohorts")
    (tmp_path / "cohorts" / ".uniform-iid-0.half").mkdir(parents=True)
    (tmp_path / "results" / file).unlink()
    shutil.rmtree(run)
    assert main(line) == 0
    assert json.loads((tmp_path / "results" / file).read_text())["errors"] == before["errors"]


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    cell = grid(small=True)[0]
    path = paper_study.result_file(tmp_path, cell)
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": settings(cell, 2)}))
    assert is_done(tmp_path, cell, 2)
    path.write_text(json.dumps({"settings": settings(cell, 2) | {"rounds": 7}}))
    with pytest.raises(SystemExit, match="was made with other settings; remove it"):
        is_done(tmp_path, cell, 2)


def page_tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the script that writes the page, which finds its neighbours beside itself."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("tools.paper_table")


def result(cell: Cell, errors: list[float], times: float) -> dict[str, Any]:
    both = {"payload": int(8000 / times), "transport": int(9000 / times)}
    both["dense_equivalent"] = 40500
    return {
        "cell": {
            "environment": cell.environment,
            "seed": cell.seed,
            "strategy": cell.strategy,
            "sparsity": cell.sparsity,
            "recipe": cell.recipe,
        },
        "settings": {"rounds": 2, "seed": cell.seed},
        "accuracy": {"test_mae": float(np.mean(errors))},
        "yardsticks": {"mean predictor": {"test_mae": 6.0}},
        "data": {
            "test_n": len(errors),
            "train_n": 9,
            "age_min": 45,
            "age_max": 80,
            "synthetic": True,
        },
        "sparsity": {"prunable": cell.sparsity},
        "bytes": {"down": both, "up": both},
        "flops": {"counted": int(1e9 / times), "executed": int(2e9 / times)},
        "seconds": 10.0,
        "machine": {"cores": 2, "processor": "x", "torch": "y"},
        "mean_density": 1 - cell.sparsity,
        "participants": [f"p{i}" for i in range(len(errors))],
        "errors": errors,
    }


@pytest.mark.parametrize(
    ("shift", "people", "seeds", "verdict"),
    [
        (0.1, 400, 3, True),
        (0.29, 400, 3, True),
        (0.31, 400, 3, False),
        (0.1, 300, 3, None),
        (0.1, 600, 2, None),
    ],
)
def test_equal_needs_the_whole_interval_people_and_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, people: int, seeds: int,
    verdict: bool | None,
) -> None:  # fmt: skip
    paper_table = page_tool(monkeypatch)
    random = np.random.default_rng(0)
    (tmp_path / "results").mkdir()
    for cell in (one for one in grid(small=True) if one.seed < seeds):
        errors = np.random.default_rng(cell.seed).random(people) * 4
        if cell.recipe != "dense":
            noise = random.standard_normal(people) * 0.05
            errors = errors + shift + noise - noise.mean()
        kept = result(cell, errors.tolist(), 1.0 if cell.recipe == "dense" else 5.0)
        (tmp_path / "results" / f"{cell.name}.json").write_text(json.dumps(kept))
    results = paper_table.collect(tmp_path)
    row = next(row for row in results["rows"] if row["recipe"] != "dense")
    assert paper_table.is_equal(row) is verdict
    assert row["difference"]["mean"] == pytest.approx(shift, abs=1e-9)
    assert row["difference"]["people"] == people * seeds
    assert row["difference"]["transport_times"] == pytest.approx([5.0] * seeds, rel=1e-3)
    text = paper_table.page(results)
    word = {None: "no verdict", True: "yes", False: "no"}[verdict]
    assert f"| {word} | 5.0x / 22.5x | 5.0x / 5.0x |" in text
    assert (
        "bytes 22.5x under plain float32 (meets 20x), 5.0x under the coded dense run (mis" in text
    )
    assert "executed FLOPs 5.0x (meets 4x)" in text


def test_runs_over_other_people_are_not_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper_table = page_tool(monkeypatch)
    (tmp_path / "results").mkdir()
    for cell in grid(small=True)[:2]:
        kept = result(cell, [1.0, 2.0], 1.0)
        if cell.recipe == "dense":
            kept["participants"] = ["q", "r"]
        (tmp_path / "results" / f"{cell.name}.json").write_text(json.dumps(kept))
    with pytest.raises(SystemExit, match="held out different people"):
        paper_table.collect(tmp_path)
    with pytest.raises(SystemExit, match="holds no result"):
        paper_table.collect(tmp_path / "elsewhere")
