"""The frameworks on one machine: the same bits as in one process, without the internet."""

import json
import os
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparsekit.fed.config import make_config
from sparsekit.fed.runner import start_run
from tests.engines.machines import why_no_namespaces

SETTINGS = """
resolution = 4
rounds = 2
epochs = 1
batch = 2
width = 0.05
sparsity = 0.8
granularity = "vector:2"
threads = 2
seed = 5
"""
PACKAGES = {"flare": "nvflare", "flower": "flwr"}
# Long beyond all doubt; a run takes about half a minute.
DEADLINE_SECONDS = 400.0


@pytest.fixture(scope="module")
def models(two_sites: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The final model of our own engines."""
    root = tmp_path_factory.mktemp("own")
    found = {}
    for engine in ("inprocess", "processes"):
        config = make_config(tomllib.loads(SETTINGS), {"cohort": str(two_sites), "engine": engine})
        start_run(config, root / engine, cache=root / "cache")
        found[engine] = (root / engine / "model.spu").read_bytes()
    return found


def ours(mark: str) -> list[str]:
    """Processes that carry the mark which this test put into the environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                command = (path.parent / "cmdline").read_bytes()
                found.append(command.replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def skip_without(engine: str) -> None:
    if find_spec(PACKAGES[engine]) is None:
        pytest.skip(f"{PACKAGES[engine]} is not installed: pip install 'sparsekit3d[{engine}]'")


def check(
    engine: str, table: str, cohort: Path, models: dict[str, bytes], folder: Path
) -> dict[str, object]:
    """Run one command where there is no network but loopback, and compare."""
    skip_without(engine)
    (folder / "c.toml").write_text(SETTINGS + table)
    for name in ("home", "temporary"):
        (folder / name).mkdir()
    mark = f"SPARSEKIT_TEST={folder}"
    words = [
        *(str(Path(sys.executable).parent / "sparsekit"), "fed", "run", "--engine", engine),
        *("--cohort", str(cohort), "--config", str(folder / "c.toml"), "--out", str(folder / "r")),
    ]
    if why_no_namespaces() is None:
        words = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words]
    done = subprocess.run(
        words,
        env=os.environ
        | dict([mark.split("=", 1)])
        | {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    log = folder / "r" / "engine.log"
    assert done.returncode == 0, done.stderr + (log.read_text()[-5000:] if log.exists() else "")
    assert ours(mark) == []
    # Numba may have written its cache there; nothing of the frameworks stays.
    assert list((folder / "temporary").glob("sparsekit-*")) == []
    assert not any((folder / "home" / name).exists() for name in (".flwr", ".nvflare"))
    model = (folder / "r" / "model.spu").read_bytes()
    assert {name: other == model for name, other in models.items()} == dict.fromkeys(models, True)
    found: dict[str, object] = json.loads((folder / "r" / "result.json").read_text())
    return found


@pytest.mark.parametrize("engine", ["flare", "flower"])
def test_one_command_and_the_same_bits(
    engine: str, two_sites: Path, models: dict[str, bytes], tmp_path: Path
) -> None:
    result = check(engine, "", two_sites, models, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "r/ledger.jsonl").read_text().splitlines()]
    # Introductions, two rounds, the final hand-out; two sites; nobody was asked twice.
    assert len(rows) == 2 + 2 * 2 * 3
    for row in rows:
        assert row["outcome"] == "ok"
        assert row["transport_bytes"] is row["framing_bytes"] is row["kernel_bytes"] is None
        assert row["control_bytes"] > 0
    assert result["accuracy"]


@pytest.mark.engines
@pytest.mark.parametrize(
    ("engine", "table"),
    [
        pytest.param("flare", '[flare]\nmode = "poc"\n', id="flare-poc"),
        pytest.param("flower", "[flower]\ntls = true\n", id="flower-tls-and-node-keys"),
    ],
)
def test_with_certificates(
    engine: str, table: str, two_sites: Path, models: dict[str, bytes], tmp_path: Path
) -> None:
    check(engine, table, two_sites, models, tmp_path)
    log = (tmp_path / "r" / "engine.log").read_text(encoding="utf-8", errors="replace")
    if engine == "flower":
        assert "https://127.0.0.1" in log


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["flare", "flower"])
def test_a_killed_run_leaves_nothing_and_resumes(
    engine: str, two_sites: Path, models: dict[str, bytes], tmp_path: Path
) -> None:
    skip_without(engine)
    (tmp_path / "c.toml").write_text(SETTINGS)
    run, program = tmp_path / "r", str(Path(sys.executable).parent / "sparsekit")
    mark = ("SPARSEKIT_TEST", str(tmp_path))
    environment = os.environ | dict([mark])
    server = subprocess.Popen(
        [
            *(program, "fed", "run", "--engine", engine, "--cohort", str(two_sites)),
            *("--config", str(tmp_path / "c.toml"), "--out", str(run)),
        ],
        env=environment,
        start_new_session=True,
    )
    end = time.monotonic() + DEADLINE_SECONDS
    while not (run / "checkpoints" / "round-00001").exists():
        assert server.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    server.kill()
    server.wait()
    while left := ours("=".join(mark)):
        assert time.monotonic() < end, left
        time.sleep(0.2)
    subprocess.run(
        [program, "fed", "resume", str(run)], env=environment, check=True, timeout=DEADLINE_SECONDS
    )
    assert (run / "model.spu").read_bytes() == models["inprocess"]
    assert ours("=".join(mark)) == []
