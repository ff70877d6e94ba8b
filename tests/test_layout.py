"""The house: linked folders, layers, public names, sizes of files."""

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsekit

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "fed", "bench")
MOST_LINES = 420


def python_files() -> Iterator[Path]:
    for top in ("sparsekit", *LINKED, "tests", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            # Not a second time through the links.
            if path.resolve() == path:
                yield path


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders_are_no_packages_of_their_own(name: str) -> None:
    link = ROOT / "sparsekit" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists()
    spec = importlib.util.find_spec(name)
    # Another distribution may own the name; this checkout must not.
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT / name)
    inside = importlib.util.find_spec(f"sparsekit.{name}")
    assert inside is not None
    assert inside.submodule_search_locations


def test_every_public_name_is_there() -> None:
    assert sorted(sparsekit.__all__) == list(sparsekit.__all__)
    for name in sparsekit.__all__:
        assert getattr(sparsekit, name) is not None


@pytest.mark.parametrize("name", ["fed.runner", "kernels.dispatch", "cli", "errors", "types"])
def test_every_layer_is_found_in_the_package(name: str) -> None:
    module = importlib.import_module(f"sparsekit.{name}")
    assert module.__name__ == f"sparsekit.{name}"
    assert Path(str(module.__file__)).resolve().is_relative_to(ROOT)


def test_files_are_short() -> None:
    files = list(python_files())
    assert ROOT / "fed" / "runner.py" in files
    long = {
        str(path.relative_to(ROOT)): count
        for path in files
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_imports_are_absolute_and_go_through_the_package() -> None:
    wrong = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            else:
                continue
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
                for name in names
                if name.startswith(".") or name.split(".")[0] in LINKED
            ]
    assert wrong == []


def test_every_public_module_is_closed_to_kernels() -> None:
    allowed = {"types", "errors", "kernels", "_version"}
    above = {
        path.stem
        for path in (ROOT / "sparsekit").iterdir()
        if (path.is_dir() or path.suffix == ".py") and not path.name.startswith((".", "__"))
    }
    rules = tomllib.loads((ROOT / "kernels" / "ruff.toml").read_text(encoding="utf-8"))
    banned = rules["lint"]["flake8-tidy-imports"]["banned-api"]
    assert {f"sparsekit.{name}" for name in above - allowed} <= set(banned)


def ruff(path: str, code: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ruff")
    return subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID"),
            *("--stdin-filename", path, "-"),
        ],
        input=code,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize(
    ("path", "code"),
    [
        pytest.param("kernels/x.py", "from sparsekit import nn\n", id="kernels-nn"),
        pytest.param("kernels/x.py", "from sparsekit.fed import site\n", id="kernels-fed"),
        pytest.param("kernels/op/x.py", "import sparsekit.masks\n", id="kernels-masks"),
        pytest.param("kernels/x.py", "from kernels import dispatch\n", id="kernels-absolute"),
        pytest.param("sparsekit/x.py", "from sparsekit.fed import site\n", id="public-fed"),
        pytest.param("sparsekit/codec/x.py", "import sparsekit.cli\n", id="public-cli"),
        pytest.param("sparsekit/x.py", "import fed\n", id="public-absolute"),
        pytest.param("fed/x.py", "from sparsekit import cli\n", id="fed-cli"),
        pytest.param("fed/cohort/x.py", "from sparsekit.bench import tables\n", id="fed-bench"),
        pytest.param("bench/x.py", "from sparsekit.fed import site\n", id="bench-fed"),
        pytest.param("tests/x.py", "import kernels.dispatch\n", id="tests-absolute"),
        pytest.param("fed/x.py", "from .site import Site\n", id="relative"),
    ],
)
def test_the_layering_rules_fire(path: str, code: str) -> None:
    done = ruff(path, code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "TID25" in done.stdout


@pytest.mark.parametrize(
    ("path", "code"),
    [
        pytest.param("kernels/x.py", "from sparsekit.errors import BackendError\n", id="kernels"),
        pytest.param("sparsekit/x.py", "from sparsekit.kernels import dispatch\n", id="public"),
        pytest.param("fed/x.py", "from sparsekit import nn\n", id="fed"),
        pytest.param("sparsekit/cli/x.py", "from sparsekit.fed import site\n", id="cli"),
    ],
)
def test_the_layering_rules_let_the_right_way_pass(path: str, code: str) -> None:
    done = ruff(path, code)
    assert done.returncode == 0, done.stdout + done.stderr
