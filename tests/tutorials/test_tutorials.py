"""The pages of docs/tutorials, block by block, as their reader would run them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from sparsekit.cli.main import app
from tests.tutorials.player import PageError, blocks_of, play

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def test_all_pages_are_found() -> None:
    assert [page.stem for page in PAGES] == ["benchmark", "federation", "kernels"]


def played(page: Path, folder: Path, *language: str) -> int:
    scripts = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    player = Path(__file__).with_name("player.py")
    done = subprocess.run(
        [sys.executable, str(player), str(page), *language],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-2])


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_a_page_runs_as_it_stands(page: Path, tmp_path: Path) -> None:
    assert played(page, tmp_path) >= 10


def test_the_code_of_the_readme_runs(tmp_path: Path) -> None:
    assert played(ROOT / "README.md", tmp_path, "python") == 4


def test_the_commands_of_the_pages_exist() -> None:
    pages = [ROOT / "README.md", *PAGES, *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^(?:\$ )?sparsekit ([a-z][^#\n|&>]*)", "".join(blocks), re.MULTILINE)
    assert len(lines) >= 20
    for line in lines:
        command: Any = get_command(app)
        words = shlex.split(line)
        while isinstance(command, TyperGroup):
            command = command.commands[words.pop(0)]
        # Raises what a reader would see: an option or argument that is not there.
        command.make_context("sparsekit", words)


def test_links_of_the_pages_lead_to_files() -> None:
    pages = [ROOT / "README.md", *PAGES, *(ROOT / "docs").glob("*.md")]
    missing = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert missing == []


def fenced(language: str, text: str, comment: str = "") -> str:
    return f"{comment}\n```{language}\n{text}\n```\n".lstrip("\n")


def test_blocks_are_played_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (
        fenced("csv some/people.csv", "a,b")
        + fenced("python", "from pathlib import Path\nx = len(Path('some/people.csv').read_text())")
        + fenced("python", "print('read', x, 3.5)")
        + fenced("text", "read 4 ...")
        + fenced("bash", "cat some/people.csv; exit 3", "<!-- ci: exit 3 -->")
        + fenced("text", "│ a,b │")
        + fenced("bash", "exit 1", "<!-- ci: skip, another machine -->")
    )
    assert play(page) == 6


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(fenced("bash", "exit 1"), id="failure"),
        pytest.param(fenced("bash", "true", "<!-- ci: exit 1 -->"), id="no-failure"),
        pytest.param(fenced("bash", "echo a") + fenced("text", "b"), id="output"),
        pytest.param(fenced("bash", "echo a b") + fenced("text", "a"), id="more-output"),
        pytest.param(fenced("bash", "echo a c") + fenced("text", "a ... b"), id="after-dots"),
        pytest.param(fenced("bash", "true", "<!-- ci: 40 => 2 -->"), id="replacement"),
        pytest.param(fenced("bash", "true", "<!-- ci: skip -->"), id="no-reason"),
        pytest.param(fenced("pascal", "begin"), id="language"),
    ],
)
def test_what_is_not_as_shown_is_noticed(page: str) -> None:
    with pytest.raises(PageError):
        play(page)


def test_an_error_of_python_code_stops_a_page() -> None:
    with pytest.raises(ZeroDivisionError):
        play(fenced("python", "1 / 0"))


def test_a_replacement_reaches_the_block() -> None:
    (block,) = blocks_of(fenced("bash", "run --rounds 40", "<!-- ci: rounds 40 => rounds 2 -->"))
    assert block.text == "run --rounds 2\n"
    assert block.line == 1


def test_every_fence_of_a_page_is_seen() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(blocks_of(text)), page.name
