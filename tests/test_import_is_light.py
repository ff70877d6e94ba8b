"""``import sparsekit`` must not pay for what it may never use."""

import subprocess
import sys

import pytest

HEAVY = ("triton", "numba", "nibabel", "matplotlib", "nvflare", "flwr")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import sparsekit", "from sparsekit import *"])
def test_import_loads_nothing_heavy(statement: str) -> None:
    assert loaded_by(statement) == set()


def test_the_check_can_fail() -> None:
    assert loaded_by("import sparsekit.fed.cohort.volume") == {"nibabel"}
