"""The bridge to a framework, with one that breaks on demand in place of FLARE and Flower."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsekit.errors import MissingExtraError, RunError, UsageError
from sparsekit.fed.config import RunConfig, dump_config, load_config_file, make_config
from sparsekit.fed.engines import framed, minder, opening, options, relayed
from sparsekit.fed.engines.answers import UNTOLD
from sparsekit.fed.engines.base import Failure, Reply
from sparsekit.fed.engines.framed import Connection
from sparsekit.fed.engines.relayed import RelayedEngine
from sparsekit.fed.engines.site_app import SiteApp, introduction
from sparsekit.fed.ledger import Ledger, LedgerRow
from sparsekit.fed.report import write_report
from sparsekit.fed.runner import resume_run, start_run

SMALL: dict[str, Any] = {
    "resolution": 4, "rounds": 3, "epochs": 1, "batch": 2, "width": 0.05, "sparsity": 0.8,
    "threads": 2, "seed": 3,
}  # fmt: skip


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Put the fake framework in FLARE's place; the dictionary is what it is told beyond that."""
    more: dict[str, Any] = {}
    monkeypatch.setitem(opening.PROGRAMS, "flare", "tests.fed.fake_framework")

    def engine(program: str, job: dict[str, Any], *args: Any, **settings: Any) -> RelayedEngine:
        return RelayedEngine(program, job | more, *args, **settings)

    monkeypatch.setattr(opening, "RelayedEngine", engine)
    monkeypatch.chdir(Path(__file__).parents[2])
    yield more
    assert leftovers() == []


def leftovers() -> list[str]:
    """Processes of engines that this process started, now or before."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        parent = f"SPARSEKIT_TEST={os.getpid()}".encode() in environment.split(b"\0")
        if parent and (minder.MARK.encode() in environment or b"minder.py" in command):
            found.append(command.replace(b"\0", b" ").decode())
    return found


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_TEST", str(os.getpid()))


def make(cohort: Path, **changes: Any) -> RunConfig:
    return make_config(SMALL | {"cohort": str(cohort), "engine": "flare"} | changes)


def rows(run: Path) -> list[LedgerRow]:
    return list(Ledger(run / "ledger.jsonl"))


def test_the_same_bits_and_what_is_not_known_is_null(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    fake["leaves"] = True
    start_run(make(tiny_cohort, engine="inprocess"), tmp_path / "one", cache=tiny_cache)
    interface = {"flare": {"interface": "lo"}}
    result = start_run(make(tiny_cohort, **interface), tmp_path / "far", cache=tiny_cache)
    assert (tmp_path / "far/model.spu").read_bytes() == (tmp_path / "one/model.spu").read_bytes()
    for ours, theirs in zip(rows(tmp_path / "far"), rows(tmp_path / "one"), strict=True):
        hidden: dict[str, Any] = {"framing_bytes": None, "transport_bytes": None, "seconds": 0.0}
        assert ours == dataclasses.replace(theirs, **hidden | {"seconds": ours.seconds})
    assert result["bytes"]["down"]["transport"] is result["bytes"]["up"]["framing"] is None
    assert result["bytes"]["down"]["payload"] > 0
    exchanges = json.loads((tmp_path / "far/interface.json").read_text())
    # Three rounds and the final hand-out; over loopback both ends are one interface.
    assert len(exchanges) == 4
    for one in exchanges:
        assert one["interface_sent_bytes"] >= one["request_bytes"] + one["reply_bytes"]


def test_the_server_needs_no_scans_where_sites_have_their_own(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    # Each computes with one thread, as in the run in one process.
    own = make(tiny_cohort, engine="inprocess")
    expected = start_run(own, tmp_path / "one", cache=tiny_cache)
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    (tmp_path / "files").mkdir()
    for number, site in enumerate(("b", "c/d", "a"), start=1):
        (tmp_path / f"files/site-{number}.toml").write_text(
            f"cohort = {json.dumps(str(tiny_cohort))}\nsite = {json.dumps(site)}\n"
            f'folder = "results-{number}"\ncache = {json.dumps(str(tiny_cache))}\n'
        )
    fake["site_files"] = str(tmp_path / "files")
    far = {"mode": "production", "sites": ["a", "b", "c/d"], "admin": str(tmp_path / "kit")}
    config = make_config(SMALL | {"engine": "flare", "threads": 1, "flare": far})
    run = tmp_path / "far"
    result = start_run(config, run)
    assert (run / "model.spu").read_bytes() == (tmp_path / "one/model.spu").read_bytes()
    for name in ("site_mae", "site_n", "test_n"):
        assert result["accuracy"][name] == pytest.approx(expected["accuracy"][name])
    assert result["accuracy"]["test_mae"] == pytest.approx(expected["accuracy"]["test_mae"])
    for name in ("sites", "train_n", "test_n", "grid"):
        assert result["data"][name] == expected["data"][name]
    assert result["data"]["age_min"] is result["accuracy"]["test_r"] is None
    assert not (run / "sites").exists()
    assert (tmp_path / "files/results-3/predictions.csv").exists()
    write_report([run], run / "report.html")
    page = (run / "report.html").read_text()
    assert "of the sites, not seen here" in page
    assert "Predicted against true age" not in page
    write_report([tmp_path / "one", run], run / "both.html")
    assert resume_run(run)["accuracy"] == result["accuracy"]


def test_sites_that_fail_are_out_for_one_round(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    # Each is asked for its introduction first.
    fake["faults"] = {
        "site-1 2": "gone", "site-2 3": "late", "site-3 3": "other", "site-1 4": "cut",
        "site-3 4": "empty", "site-2 5": "huge",
    }  # fmt: skip
    config = make(tiny_cohort, quorum=0.3, deadline=2.0, rounds=4)
    start_run(config, tmp_path / "r", cache=tiny_cache)
    outcomes = {
        (row.client, row.round): row.outcome
        for row in rows(tmp_path / "r")
        if row.direction == "up" and row.outcome != "ok"
    }
    assert outcomes == {
        ("a", 1): "dead", ("b", 2): "late", ("c/d", 2): "corrupt", ("a", 3): "corrupt",
        ("c/d", 3): "corrupt", ("b", 4): "corrupt",
    }  # fmt: skip


def test_a_framework_that_dies_ends_the_run_which_resumes(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start_run(make(tiny_cohort, engine="inprocess"), whole, cache=tiny_cache)
    fake["faults"] = {"site-2 3": "server"}
    with pytest.raises(RunError, match="quorum"):
        start_run(make(tiny_cohort), broken, cache=tiny_cache)
    fake.clear()
    resume_run(broken, cache=tiny_cache)
    assert (broken / "model.spu").read_bytes() == (whole / "model.spu").read_bytes()
    assert len(rows(broken)) == len(rows(whole))


def test_a_framework_that_does_not_start_is_named(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    fake["ends"] = True
    with pytest.raises(RunError, match=r"the framework ended; see .*engine\.log"):
        start_run(make(tiny_cohort), tmp_path / "r", cache=tiny_cache)
    assert "no server today" in (tmp_path / "r/engine.log").read_text()


def test_nothing_is_left_when_the_server_loop_is_killed(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    del fake
    code = (
        "import sys; from pathlib import Path; from tests.fed.test_relayed import make\n"
        "from sparsekit.fed.engines import opening; from sparsekit.fed.runner import start_run\n"
        "known = opening.RelayedEngine\n"
        "opening.RelayedEngine = lambda _, job, *args, **settings: known(\n"
        "    'tests.fed.fake_framework', job | {'leaves': True}, *args, **settings)\n"
        "cohort, cache, run = map(Path, sys.argv[1:])\n"
        "start_run(make(cohort, rounds=40), run, cache=cache)\n"
    )
    run = tmp_path / "r"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tiny_cohort), str(tiny_cache), str(run)],
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and not any((run / "checkpoints").glob("round-00001*")):
        assert server.poll() is None
        time.sleep(0.05)
    folders = {Path(word) for text in leftovers() for word in text.split() if "/sparsekit-" in word}
    assert folders
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    while leftovers() or any(folder.exists() for folder in folders):
        assert time.monotonic() < end
        time.sleep(0.1)


def engine(run: Path, **changes: Any) -> RelayedEngine:
    given: dict[str, Any] = {
        "run": run, "introduction": b"", "sizes": {"a": 1}, "workers": 1, "deadline": 1.0,
        "start_seconds": 3.0,
    }  # fmt: skip
    return RelayedEngine("time", {}, {}, **(given | changes))


def test_strangers_on_this_machine_are_turned_away(tmp_path: Path) -> None:
    one = engine(tmp_path)
    try:
        address = one._listener.getsockname()
        assert address[0] == "127.0.0.1"
        assert (one.folder / "bridge.json").parent.stat().st_mode & 0o077 == 0
        peer = Connection(socket.create_connection(address))
        peer.send(framed.HELLO, b"0" * 32 + b"{}")
        with pytest.raises(RunError, match="framework"):
            one.hello()
        with pytest.raises((EOFError, ConnectionError)):
            peer.receive(most=100, until=time.monotonic() + 5)
        peer.close()
    finally:
        one.close()
    assert not one.folder.exists()


def test_who_comes_is_compared_with_who_is_expected(
    fake: dict[str, Any], tiny_cohort: Path, tiny_cache: Path, tmp_path: Path
) -> None:
    del fake
    config = make(tiny_cohort)
    cohort = json.dumps(str(tiny_cohort))
    files = {
        f"sites/site-{n}.toml": f'cohort = {cohort}\nsite = "{site}"\n'
        f"cache = {json.dumps(str(tiny_cache))}\nfolder = {json.dumps(str(tmp_path / site))}\n"
        for n, site in ((1, "a"), (2, "b"), (3, "a"))
    }
    for clients, sizes, match in (
        (["site-1", "site-2"], {"a": 1, "c": 1}, "sites: c did not come; site-2: .* 'b'"),
        (["site-1", "site-3"], {"a": 1}, "site-1 and site-3 both say 'a'"),
        (["site-1", "site-2"], {"a": 1}, None),
    ):
        one = RelayedEngine(
            "tests.fed.fake_framework", {"names": clients}, files, run=tmp_path, sizes=sizes,
            workers=2, introduction=introduction(config, 4, 1), deadline=60.0, start_seconds=60.0,
        )  # fmt: skip
        try:
            if match is None:
                assert list(one.hello()) == ["a"]
            else:
                with pytest.raises(RunError, match=match):
                    one.hello()
        finally:
            one.close()


@pytest.mark.parametrize("engine_name", ["flare", "flower"])
def test_a_missing_extra_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tiny_cohort: Path, engine_name: str
) -> None:
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'sparsekit3d\[{engine_name}\]'"):
        make(tiny_cohort, engine=engine_name)


def test_nothing_that_is_started_calls_home() -> None:
    environment = relayed.environment()
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def test_frameworks_are_imported_only_when_named() -> None:
    code = (
        "import sys, sparsekit.cli.main, sparsekit.fed.runner\n"
        "print([m for m in ('nvflare', 'flwr', 'grpc', 'cryptography') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"flare": {"mode": "magic"}}, r"flare\.mode: expected one of simulator, poc, production"),
        ({"flare": {"nodes": 3}}, r"flare\.nodes: unknown setting; known: admin"),
        ({"flare": {"start_seconds": "soon"}}, r"flare\.start_seconds: expected float"),
        ({"flare": {"start_seconds": 0}}, r"flare\.start_seconds: expected a number in"),
        ({"flare": 3}, r"flare: expected a table"),
        ({"flare": {"sites": ["a"]}}, r"flare\.sites: for mode production only"),
        ({"flare": {"sites": [1]}}, r"flare\.sites: expected a list of names"),
        ({"flare": {"mode": "production"}}, r"flare\.sites: missing"),
        ({"flare": {"mode": "production", "sites": ["a", "a"], "admin": "x"}}, "each site once"),
        ({"flare": {"mode": "production", "sites": ["a"], "admin": "x"}}, "startup kit"),
        ({"flare": {"interface": "nowhere0"}}, r"flare\.interface: there is no network"),
        ({"flower": {"mode": "deployed", "sites": ["a"]}}, r"flower\.address: missing"),
        ({"flower": {"root_certificates": "nothing.crt"}}, r"flower\.root_certificates: no file"),
        (
            {"flower": {"mode": "deployed", "sites": ["a"], "address": "h:1", "tls": True}},
            r"flower\.tls: for mode local",
        ),
        (
            {"engine": "flower", "flower": {"mode": "deployed", "sites": ["a"], "address": "h:1"}},
            "cohort: not with sites on other machines",
        ),
    ],
)
def test_wrong_settings_are_refused(tiny_cohort: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make(tiny_cohort, **changes)


def test_sites_elsewhere_need_a_grid_and_no_pooling() -> None:
    far: dict[str, Any] = {
        "engine": "flower",
        "flower": {"mode": "deployed", "sites": ["a"], "address": "h:1"},
    }
    with pytest.raises(UsageError, match="resolution: missing"):
        make_config(far)
    with pytest.raises(UsageError, match="strategy: centralized"):
        make_config(far, {"resolution": 4, "strategy": "centralized"})
    assert make_config(far, {"resolution": 4}).deployed


def test_settings_of_engines_survive_the_file(tiny_cohort: Path, tmp_path: Path) -> None:
    config = make(tiny_cohort, flower={"tls": True, "start_seconds": 60}, flare={"mode": "poc"})
    (tmp_path / "c.toml").write_text(dump_config(config), encoding="utf-8")
    assert make_config(load_config_file(tmp_path / "c.toml")) == config


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cohort is missing"),
        ('cohort = "x"', "folder is missing"),
        ('cohort = "x"\nfolder = "y"\nthread = 3', "thread is unknown"),
        ('cohort = "x"\nfolder = 3', "folder: expected str, got 3"),
        ('cohort = "x"\nfolder = "y"\nthreads = true', "threads: expected int, got True"),
        ("cohort = ", "cannot read"),
    ],
)
def test_wrong_site_files_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(UsageError, match=match):
        SiteApp(tmp_path / "site.toml")


def test_paths_of_a_site_file_are_seen_from_it(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('cohort = "scans/people.csv"\nfolder = "/srv/results"\n')
    settings = SiteApp(tmp_path / "site.toml").settings
    assert settings.cohort == str(tmp_path / "scans/people.csv")
    assert settings.folder == "/srv/results"


def test_a_site_that_was_started_again_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    told: set[str] = set()

    def ask(_: RelayedEngine, name: str, request: bytes) -> Reply | Failure:
        asked.append(request)
        if request == b"introduction":
            told.add(name)
        return Reply(request, 0.0) if name in told else Failure("dead", UNTOLD)

    engine = object.__new__(RelayedEngine)
    engine._introduction = b"introduction"
    monkeypatch.setattr(RelayedEngine, "_ask", ask)
    assert engine._ask_told("a", b"train") == Reply(b"train", 0.0)
    assert asked == [b"train", b"introduction", b"train"]
    told.clear()
    monkeypatch.setattr(RelayedEngine, "_ask", lambda *_: Failure("dead", UNTOLD))
    assert engine._ask_told("a", b"train") == Failure("dead", UNTOLD)
