"""No test, and no Python process that one starts, connects to another machine."""

import os
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "guard"


@pytest.fixture(scope="session", autouse=True)
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Guard this process and its children; the file holds what was refused."""
    path = tmp_path_factory.mktemp("network") / "refusals.txt"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEKIT_TEST_REFUSALS", str(path))
        patch.setenv("PYTHONPATH", str(GUARD), prepend=os.pathsep)
        runpy.run_path(str(GUARD / "sitecustomize.py"))
        yield path


@pytest.fixture(autouse=True)
def _stays_on_this_machine(refusals: Path) -> Iterator[None]:
    before = refusals.read_text(encoding="utf-8")
    yield
    assert refusals.read_text(encoding="utf-8") == before
