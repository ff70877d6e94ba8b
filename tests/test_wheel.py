"""What a user installs: the wheel holds everything, and works away from the checkout."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparsekit import __all__ as public_names
from sparsekit import __version__

ROOT = Path(__file__).resolve().parents[1]
DIST_INFO = f"sparsekit3d-{__version__}.dist-info"

pytestmark = pytest.mark.slow


def run(command: Sequence[str | Path], cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    # From a copy: the build leaves folders behind, and would take up what an older one left.
    source = tmp_path_factory.mktemp("source") / "checkout"
    out = tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("sparsekit", "kernels", "fed", "bench"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".*"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy2(ROOT / name, source / name)
    python = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run([*python, "--outdir", out, source], out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel and, on its path only, the dependencies of this one."""
    home = tmp_path_factory.mktemp("env")
    run([sys.executable, "-m", "venv", "--without-pip", home], home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], home)
    (packages,) = home.glob("lib/python*/site-packages")
    # A line of a .pth file adds a folder without running that folder's own .pth files, such as
    # the one by which an editable installation finds the checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"sparsekit3d-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
    assert {name.split("/")[0] for name in found} == {"sparsekit", DIST_INFO}
    expected = {
        f"{prefix}{path.relative_to(ROOT)}"
        for top, prefix in zip(
            ("sparsekit", "kernels", "fed", "bench"), ("", *["sparsekit/"] * 3), strict=True
        )
        for path in (ROOT / top).rglob("*.py")
        if path.resolve() == path
    }
    assert len(expected) > 60
    assert {name for name in found if name.endswith(".py")} == expected
    assert {
        "sparsekit/py.typed",
        "sparsekit/fed/cohort/data/template-2mm.npz",
        "sparsekit/fed/cohort/data/NOTICE.md",
        f"{DIST_INFO}/licenses/LICENSE",
        f"{DIST_INFO}/licenses/NOTICE",
    } <= found


def test_public_names_come_from_the_wheel(installed: Path) -> None:
    code = (
        "import sparsekit, sparsekit.fed.runner, sparsekit.kernels.dispatch\n"
        f"print(all(hasattr(sparsekit, name) for name in {list(public_names)!r}))\n"
        "print(sparsekit.__file__)\n"
        "print(sparsekit.fed.runner.__file__)\n"
    )
    complete, *files = run([installed / "bin" / "python", "-c", code], installed).splitlines()
    assert complete == "True"
    for file in files:
        assert Path(file).is_relative_to(installed / "lib")


def test_the_command_works(installed: Path) -> None:
    sparsekit = installed / "bin" / "sparsekit"
    version = run([sparsekit, "--version"], installed).strip()
    assert version == __version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", version)
    # Needs the template that travels as package data.
    run([sparsekit, "cohort", "make", "c", "--subjects", "4", "--sites", "1"], installed)
    assert len(list((installed / "c").glob("sub-*/anat/*_T1w.nii.gz"))) == 4
