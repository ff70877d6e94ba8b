from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

Maker = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV cohort on the 4 mm grid: 3 sites of 6, 5 and 4 people; a bright ball grows with age."""
    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(7)
    axes = np.ogrid[:46, :55, :46]
    distance = np.sqrt(
        sum((axis - middle) ** 2 for axis, middle in zip(axes, (23, 27, 23), strict=True))
    )
    lines = ["path,age,site,participant"]
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    for site, people in (("a", 6), ("b", 5), ("c/d", 4)):
        for person in range(people):
            age = 45 + 35 * random.random()
            brain = np.where(distance < 18, 400 + 20 * random.standard_normal(distance.shape), 0)
            brain[distance < 3 + (age - 45) / 7] = 150
            name = f"{site.replace('/', '-')}{person}"
            image = nibabel.Nifti1Image(np.clip(brain, 0, None).astype(np.int16), affine)
            nibabel.save(image, root / f"{name}.nii.gz")
            lines.append(f"{name}.nii.gz,{age:.2f},{site},{name}")
    path = root / "people.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
