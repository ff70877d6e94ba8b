"""Tests with whole frameworks; `make test-engines` runs them, `make test` leaves them out."""

from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.engines.machines import Network, why_no_namespaces


@pytest.fixture(scope="module", autouse=True)
def _networks_of_their_own() -> Iterator[None]:
    """Let these tests use the addresses of the network namespaces that they make.

    NVIDIA FLARE also connects a datagram socket to 10.255.255.255 to learn its own address, which
    sends nothing; its tests have no network but loopback where namespaces are permitted.
    """
    with pytest.MonkeyPatch.context() as patch:
        networks = "127.0.0.0/8 ::1/128 192.0.2.0/24 10.255.255.255/32"
        patch.setenv("SPARSEKIT_TEST_NETWORKS", networks)
        yield


@pytest.fixture(scope="session")
def two_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 2 sites with 4 people each on the 4 mm grid, and one of each site alone."""
    root = tmp_path_factory.mktemp("two")
    random = np.random.default_rng(11)
    axes = np.ogrid[:46, :55, :46]
    middle = (23, 27, 23)
    distance = np.sqrt(sum((axis - m) ** 2 for axis, m in zip(axes, middle, strict=True)))
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-90, -126, -72)
    head = "path,age,site,participant"
    lines: dict[str, list[str]] = {"a": [], "b": []}
    for number in range(8):
        brain = np.where(distance < 18, 400 + 20 * random.standard_normal(distance.shape), 0)
        brain[distance < 3 + number] = 150
        name = f"person{number}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(brain.clip(0).astype(np.int16), affine), root / name)
        site = "ab"[number % 2]
        lines[site].append(f"{root / name},{45 + 4 * number},{site},p{number}")
    for name, own in (("people", lines["a"] + lines["b"]), *lines.items()):
        (root / f"{name}.csv").write_text("\n".join([head, *own]) + "\n")
    return root / "people.csv"


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    why = why_no_namespaces()
    if why is not None:
        pytest.skip(why)
    network = Network(["server", "site-a", "site-b", "stranger"], tmp_path)
    try:
        yield network
    finally:
        network.close()
