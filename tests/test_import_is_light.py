"""`import sparsekit` stays fast: what only some users need is imported at its first use."""

import subprocess
import sys

import pytest

HEAVY = {"triton", "numba", "nibabel", "matplotlib", "nvflare", "flwr"}


def imported_by(code: str) -> set[str]:
    report = f"import sys; print(*({HEAVY} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(result.stdout.split())


def test_the_package() -> None:
    assert imported_by("import sparsekit") == set()


@pytest.mark.parametrize(
    "module", ["sparsekit.models", "sparsekit.ops", "sparsekit.kernels.dispatch"]
)
def test_its_modules(module: str) -> None:
    assert imported_by(f"import {module}") == set()


def test_this_check_can_fail() -> None:
    assert imported_by("import nibabel") == {"nibabel"}


def test_numba_comes_with_the_first_call_that_needs_it() -> None:
    call = "import sparsekit, torch\nsparsekit.norm_pool_relu(torch.ones(1, 1, 2, 2, 2{}))"
    assert imported_by(call.format(", dtype=torch.float64")) == set()
    assert imported_by(call.format("")) == {"numba"}
