"""A small cohort with awkward names, and the command line called in this process."""

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from sparsekit.cli import main

Command = Callable[..., tuple[int, str, str]]

SITES = ("Köln/1", "a b")
PEOPLE = 3
SMALL = (
    *("--rounds", "3", "--epochs", "1", "--batch", "3", "--threads", "1"),
    *("--width", "0.05", "--sparsity", "0.6", "--engine", "inprocess"),
)


def write_cohort(root: Path) -> Path:
    random = np.random.default_rng(7)
    axes = np.ogrid[:46, :55, :46]
    middle = (23, 27, 23)
    distance = np.sqrt(sum((axis - m) ** 2 for axis, m in zip(axes, middle, strict=True)))
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    lines = ["path,age,site,participant"]
    for number in range(len(SITES) * PEOPLE):
        brain = np.where(distance < 18, 400 + 20 * random.standard_normal(distance.shape), 0)
        brain[distance < 3 + number] = 150
        nibabel.save(
            nibabel.Nifti1Image(brain.clip(0).astype(np.int16), affine),
            root / f"Person {number}.nii.gz",
        )
        site = SITES[number // PEOPLE]
        lines.append(f"Person {number}.nii.gz,{45 + 5 * number},{site},p{number}")
    path = root / "my people.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 2 sites with 3 people each; no test may change it."""
    return write_cohort(tmp_path_factory.mktemp("with spaces"))


@pytest.fixture
def own_people(tmp_path: Path) -> Path:
    """The same cohort, for tests that spoil it."""
    root = tmp_path / "own cohort"
    root.mkdir()
    return write_cohort(root)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def whole(people: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of `people` with the settings SMALL; no test may change it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    line = ["fed", "run", "--cohort", str(people), "--out", str(out), "--cache", str(cache)]
    with pytest.raises(SystemExit) as exited:
        main([*line, *SMALL])
    assert not exited.value.code
    return out


@pytest.fixture
def sparsekit(capsys: pytest.CaptureFixture[str]) -> Command:
    """Call the command line; returns exit code, standard output and standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        code = exited.value.code
        assert code is None or isinstance(code, int)
        printed = capsys.readouterr()
        return code or 0, printed.out, printed.err

    return call


@pytest.fixture
def small() -> list[str]:
    return list(SMALL)
