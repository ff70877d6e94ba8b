import base64
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparsekit.errors import MissingExtraError
from sparsekit.fed.config import RunConfig
from sparsekit.fed.report import write_report
from sparsekit.fed.runner import start_run

HEADINGS = (
    "Error against rounds, bytes and computation",
    "Sparsity by layer",
    "Error by site",
    "Predicted against true age",
)


@pytest.fixture(scope="module")
def runs(
    tiny_cohort: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    made = []
    for strategy in ("fedavg", "fedsparsify-global"):
        config = RunConfig(
            cohort=str(tiny_cohort),
            strategy=strategy,
            sparsity=0.5,
            rounds=2,
            epochs=1,
            batch=3,
            width=0.05,
            threads=1,
            engine="inprocess",
        )
        start_run(config, folder / strategy, cache=tiny_cache)
        made.append(folder / strategy)
    return made


def images(page: str) -> list[str]:
    found = re.findall(r"<img alt='([^']*)' src='data:image/svg\+xml;base64,([^']*)'>", page)
    assert tuple(alt for alt, _ in found) == HEADINGS
    return [base64.b64decode(data).decode("utf-8") for _, data in found]


def text_of(image: str) -> str:
    root = ElementTree.fromstring(image)
    return " ".join(
        "".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")
    )


@pytest.mark.parametrize("count", [1, 2])
def test_page_is_self_contained(runs: list[Path], tmp_path: Path, count: int) -> None:
    write_report(runs[:count], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert page.count("<img") == 4
    for image in images(page):
        assert "<script" not in image
        assert "<image" not in image
        outside = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", image)
        assert not re.search(r"https?://", outside)
        for target in re.findall(r'href="([^"]*)"', outside):
            assert target.startswith("#")


def test_two_runs_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<th>fedavg</th><th>fedsparsify-global</th>" in page
    row = re.search(r"<tr><td>MAE minus the first.*</tr>", page)
    assert row is not None
    assert row[0].count("<td class='number'>") == 2
    assert re.search(r"[+-]\d+\.\d\d \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\] years", row[0])
    progress, layers, sites, scatter = map(text_of, images(page))
    for name in ("fedavg", "fedsparsify-global"):
        assert name in progress
        assert name in sites
        assert name in scatter
    assert "mean predictor" in progress
    assert "all prunable weights" in layers
    assert "blocks.0.conv.weight" in layers
    assert "c/d" in sites


def test_same_runs_give_the_same_bytes(runs: list[Path], tmp_path: Path) -> None:
    for name in ("1.html", "2.html"):
        write_report(runs, tmp_path / name)
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()


@pytest.mark.parametrize(
    "name", ["<script>alert('x')<", "a & 'b' \"c\"", "$\\frac$ 100%", "_hidden", "北京 Köln"]
)
def test_names_are_shown_as_they_are(runs: list[Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(runs[0], tmp_path / name)
    write_report([tmp_path / name, runs[1]], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert name in "".join(ElementTree.fromstring(table_of(page)).itertext())
    progress, _, sites, scatter = map(text_of, images(page))
    for text in (progress, sites, scatter):
        assert name in text


def table_of(page: str) -> str:
    start = page.index("<table>")
    return page[start : page.index("</table>") + len("</table>")]


def test_missing_matplotlib_is_named(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsekit3d\[report\]'"):
        write_report(runs, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
