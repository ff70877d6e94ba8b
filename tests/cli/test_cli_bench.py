import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.bench import speedup
from sparsekit.bench.figures import FORWARD, GRADIENTS
from sparsekit.bench.steps import LEFT_DENSE, STEP

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up times: what is measured is for bench/, what is printed is for here."""

    def measure(wanted: speedup.Plan) -> Iterator[dict[str, Any]]:
        for sparsity in wanted.sparsities:
            masks = {"sparsity": sparsity, "masks": "uniform random"}
            for what, ours in ((STEP, 40.0), (LEFT_DENSE, 50.0)):
                yield {"what": what, **masks, "milliseconds": {"stock": [500.0], "ours": [ours]}}
            for name in wanted.layers:
                for what in (FORWARD, GRADIENTS):
                    sides = {"stock": [9.0], "channels_last_3d": [6.0], "ours": [8.0]}
                    yield {"what": what, "layer": name, **masks, "milliseconds": sides}

    monkeypatch.setattr(speedup, "measure", measure)


def test_the_table_compares_with_the_best_dense_path(sparsekit: Command) -> None:
    code, out, _ = sparsekit("bench", "kernels")
    assert code == 0
    assert "12.5x" in out
    assert "10x" in out
    # Slower than the faster dense side, though not than the other.
    assert "0.75x !" in out
    assert "99 %" in out


def test_quick_measures_less(sparsekit: Command, tmp_path: Path) -> None:
    code, out, _ = sparsekit("bench", "kernels", "--quick", "--json", tmp_path / "x.json")
    assert code == 0
    assert "99 %" not in out
    found = json.loads((tmp_path / "x.json").read_text())
    assert len(found["rows"]) == speedup.plan(quick=True).steps
    assert found["machine"]["threads"] >= 1


def test_a_file_is_not_replaced_unless_told(sparsekit: Command, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("mine")
    code, _, err = sparsekit("bench", "kernels", "--json", file)
    assert code == 2
    assert "--force" in err
    assert file.read_text() == "mine"
    assert sparsekit("bench", "kernels", "--json", file, "--force")[0] == 0
    assert json.loads(file.read_text())["rows"]


def test_codecs_of_a_file(sparsekit: Command, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    torch.save({"w": torch.ones(30, 30).tril(), "steps": torch.tensor(3)}, state)
    code, out, _ = sparsekit("bench", "codec", "--quick", "--state", state)
    assert code == 0
    assert "48.3 %: bits" in out
    assert "packbits + values" in out


def test_a_state_without_weights_is_refused(sparsekit: Command, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    torch.save({"steps": torch.tensor(3)}, state)
    code, _, err = sparsekit("bench", "codec", "--state", state)
    assert code == 1
    assert "float32" in err


def test_a_layer_that_cannot_be_read_is_a_mistake_of_usage(sparsekit: Command) -> None:
    code, _, err = sparsekit("bench", "kernels", "--layer", "3,4")
    assert code == 2
    assert "32,64,24x24x24" in err
