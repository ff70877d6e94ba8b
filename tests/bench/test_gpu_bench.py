"""The GPU benchmark where there is no GPU: what it computes, what it writes, what it refuses."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.bench.gpu import cases, pages
from sparsekit.bench.gpu.cases import Layer

SMALL = (Layer("small", 5, 7, (3, 4, 3)),)


def test_reference_agrees_with_itself() -> None:
    names = [n for n in cases.modes("cpu") if n not in ("tf32", "tf32x3", "bf16x3", "ieee")]
    assert names == ["fp16", "bf16"]
    assert not list(cases.disagreements("cpu", SMALL, "reference"))


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cases.step

    def wrong(*arguments: Any) -> Any:
        y, dx, dw = plain(*arguments)
        return y, dx, torch.zeros_like(dw)

    monkeypatch.setattr(cases, "step", wrong)
    found = list(cases.disagreements("cpu", SMALL, "reference"))
    assert found
    assert all("dw is off by" in text for text in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparsekit.bench.gpu", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no GPU that torch can use" in done.stderr
    assert not (tmp_path / "out").exists()


def test_pages_and_plot(tmp_path: Path) -> None:
    times = {"sparsekit": [1.0, 1.2, 1.1], "dense": [2.2, 2.0, 2.4]}
    row = {
        "what": "convolution", "layer": "blocks.1", "mode": "bf16", "format": "block:16x16",
        "sparsity": 0.9, "samples": 8, "density": 0.1, "auto": "triton", "milliseconds": times,
    }  # fmt: skip
    selection = {"what": "selection", "weights": 10, "sparsity": 0.5, "milliseconds": times}
    results = {"machine": {"device": "none"}, "rounds": 3, "rows": [row, selection]}
    text = pages.page(results)
    assert "| blocks.1 | bf16 | block:16x16 | 0.9 | 1.100 [1.050, 1.150] |" in text
    assert "| 2.00 | triton |" in text
    assert "## Selection" in text
    assert pages.speedup(row) == 2.0
    assert "90% pruned: 1.100" in pages.line(row)
    pages.plot(results, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 1000
