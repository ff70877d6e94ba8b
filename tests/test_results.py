import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit.bench.figures import figures
from sparsekit.bench.pages import rows_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "tool",
    [
        *("demo_table.py", "cpu_table.py", "values_table.py", "codec_table.py"),
        *("soak_table.py", "bandwidth_table.py", "kernels_table.py"),
        "validation_table.py",
    ],
)
def test_tables_are_those_of_the_results_files(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}", "write", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_cohort_study_is_that_of_its_results_file() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.cohort_study", "write", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tool", ["formats_table.py", "which_table.py"])
def test_tables_within_a_page_are_those_of_their_tool(tool: str) -> None:
    done = subprocess.run(
        [sys.executable, f"tools/{tool}", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_figures_are_those_of_the_rows() -> None:
    results = json.loads((ROOT / "docs" / "results" / "cpu.json").read_text(encoding="utf-8"))
    assert results["figures"] == [figure.as_json() for figure in figures(rows_of(results))]
