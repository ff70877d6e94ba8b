"""A run that knows its members by heart: noise has no age, so that all it can do is remember."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from sparsekit.fed.config import RunConfig, make_config
from sparsekit.fed.runner import start_run

SITES = ("a", "b/c")
PEOPLE = 24


@pytest.fixture(scope="session")
def noise_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 2 sites with 24 people each, whose scans say nothing about their ages."""
    root = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(3)
    axes = np.ogrid[:46, :55, :46]
    middle = (23, 27, 23)
    distance = np.sqrt(sum((axis - m) ** 2 for axis, m in zip(axes, middle, strict=True)))
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    lines = ["path,age,site,participant"]
    for number in range(len(SITES) * PEOPLE):
        noise = random.standard_normal((12, 14, 12)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
        brain = np.where(distance < 20, 400 + 60 * noise[:46, :55, :46], 0).clip(0)
        image = nibabel.Nifti1Image(brain.astype(np.int16), affine)
        nibabel.save(image, root / f"{number}.nii.gz")
        age = 45 + 35 * random.random()
        lines.append(f"{number}.nii.gz,{age:.2f},{SITES[number // PEOPLE]},p{number}")
    path = root / "people.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(cohort: Path, **changes: object) -> RunConfig:
    settings: dict[str, object] = {
        "cohort": str(cohort),
        "strategy": "fedavg",
        "rounds": 6,
        "epochs": 6,
        "batch": 2,
        "lr": 2e-3,
        "width": 0.2,
        "crop": True,
        "flips": False,
        "weight_decay": 0.0,
        "lr_schedule": "constant",
        "test_fraction": 0.5,
        "evaluate_every": 6,
        "threads": 1,
        "engine": "inprocess",
        "keep_checkpoints": 0,
    }
    return make_config(settings, changes)


@pytest.fixture(scope="session")
def noise_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("noise-cache")


@pytest.fixture(scope="session")
def leaky(noise_cohort: Path, noise_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run that has learned its people by heart; no test may change it."""
    run = tmp_path_factory.mktemp("runs") / "leaky"
    start_run(config_of(noise_cohort), run, cache=noise_cache)
    return run
