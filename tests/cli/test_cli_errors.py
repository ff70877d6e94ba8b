"""Every mistake costs one clear line and the right exit code, and leaves nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit._version import __version__

Command = Callable[..., tuple[int, str, str]]


def one_line(error: str) -> str:
    """Return the text of an error that is exactly one line of ours."""
    assert error.startswith("sparsekit: error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error.removeprefix("sparsekit: error: ").rstrip("\n")


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "fed --help", "cohort --help", "codec --help", "doctor --help"),
        *("fed run --help", "fed resume --help", "fed report --help", "fed compare --help"),
        *("cohort make --help", "cohort check --help"),
        *("privacy --help", "privacy audit --help", "privacy compare --help"),
        *("codec inspect --help", "codec encode --help", "codec decode --help"),
    ],
)
def test_help_is_there(sparsekit: Command, line: str) -> None:
    code, out, error = sparsekit(*line.split())
    assert (code, error) == (0, "")
    assert "Usage: sparsekit" in out


def test_version(sparsekit: Command) -> None:
    assert sparsekit("--version") == (0, __version__ + "\n", "")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param("frobnicate", "frobnicate", id="group"),
        pytest.param("fed frobnicate", "frobnicate", id="command"),
        pytest.param("fed run --frobnicate", "--frobnicate", id="option"),
        pytest.param("fed run", "--out", id="missing option"),
        pytest.param("fed run --out x --rounds many", "--rounds", id="no number"),
        pytest.param("fed resume", "RUN", id="missing argument"),
    ],
)
def test_unknown_words_are_usage_errors(sparsekit: Command, line: str, text: str) -> None:
    code, out, error = sparsekit(*line.split())
    assert (code, out) == (2, "")
    assert text in error
    assert "Usage: sparsekit" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "text"),
    [
        pytest.param(("--strategy", "best"), "strategy: expected one of centralized", id="choice"),
        pytest.param(("--sparsity", "1.5"), "sparsity: expected a number in [0", id="sparsity"),
        pytest.param(("--sparsity", "nan"), "sparsity: expected", id="nan"),
        pytest.param(("--rounds", "0"), "rounds: expected a number in [1", id="rounds"),
        pytest.param(("--rounds", "1"), "Raise --rounds", id="too few rounds"),
        pytest.param(("--rounds", "9" * 400), "rounds: expected", id="huge"),
        pytest.param(("--threads", "0"), "threads: expected", id="threads"),
        pytest.param(("--width", "1e9"), "width: expected", id="width"),
        pytest.param(("--lr", "inf"), "lr: expected", id="lr"),
        pytest.param(("--resolution", "3"), "resolution: expected 2 or 4", id="resolution"),
        pytest.param(("--engine", "pigeons"), "engine: expected one of", id="engine"),
        pytest.param(("--participation", "0"), "participation: expected", id="participation"),
        pytest.param(("--sites-per-round", "-1"), "sites_per_round: expected", id="drawn"),
        pytest.param(("--max-update-norm", "0"), "max_update_norm: expected", id="norm"),
        pytest.param(("--quorum", "2"), "quorum: expected", id="quorum"),
        pytest.param(("--deadline", "0"), "deadline: expected", id="deadline"),
        pytest.param(("--on-problem", "cry"), "expected one of refuse, skip", id="on-problem"),
        pytest.param(("--cohort", "gone"), "no such file or folder: ", id="no cohort"),
        pytest.param(("--config", "gone.toml"), "config: no file gone.toml", id="no config"),
        pytest.param(("--config", "."), "config: cannot read .: Is a directory", id="folder"),
    ],
)
def test_wrong_settings_exit_with_2(
    sparsekit: Command,
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = sparsekit("fed", "run", "--cohort", people, "--out", "run", *options)
    assert (code, out) == (2, "")
    assert text in one_line(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param(b"rounds = = 3", "is not a TOML file", id="syntax"),
        pytest.param(b"\xff\xfe", "is not a TOML file", id="no UTF-8"),
        pytest.param(b"a = " + b"[" * 9000, "is not a TOML file", id="too deep"),
        pytest.param(b"speed = 3", "speed: unknown setting; known: ", id="unknown"),
        pytest.param(b"[fed]\nrounds = 3", "fed: unknown setting", id="table"),
        pytest.param(b"rounds = '3'", "rounds: expected int, got '3'", id="type"),
        pytest.param(b"rounds = true", "rounds: expected int, got True", id="bool"),
        pytest.param(b"lr = 1" + b"0" * 400, "lr: expected a smaller number", id="overflow"),
        pytest.param(b"", "cohort: missing; give --cohort PATH", id="no cohort"),
    ],
)
def test_wrong_config_files_exit_with_2(
    sparsekit: Command, tmp_path: Path, content: bytes, text: str
) -> None:
    config = tmp_path / "c.toml"
    config.write_bytes(content)
    code, _, error = sparsekit("fed", "run", "--out", tmp_path / "run", "--config", config)
    assert code == 2
    assert text in one_line(error)
    assert not (tmp_path / "run").exists()


def test_cuda_without_a_gpu_is_refused(
    sparsekit: Command, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = ("fed", "run", "--cohort", people, "--out", tmp_path / "run", "--device", "cuda")
    code, _, error = sparsekit(*line)
    assert code == 2
    assert "choose --device cpu" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_left_alone(sparsekit: Command, people: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = sparsekit("fed", "run", "--cohort", people, "--out", tmp_path)
    assert code == 2
    assert "already holds something" in one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        pytest.param("fed resume {0}", 2, "has no config.toml", id="resume"),
        pytest.param("fed report {0}", 2, "is not the folder of a run", id="report"),
        pytest.param("fed compare {0} {1}", 2, "is not the folder of a run", id="compare"),
        pytest.param("fed compare {1}", 2, "at least two runs, each once", id="one run"),
        pytest.param("fed compare {1} {1}", 2, "at least two runs, each once", id="twice"),
        pytest.param("fed compare {1} {2}", 1, "is not finished; continue it", id="unfinished"),
        pytest.param("fed compare {1} {3} --out {0}/no/x.html", 2, "out: expected", id="out"),
        pytest.param("fed compare {1} {3} --out {0}", 2, "out: expected", id="out-folder"),
        pytest.param("cohort check {0}/gone", 2, "does not exist", id="check"),
        pytest.param("cohort check {0}", 1, "has no participants.tsv", id="check-empty"),
        pytest.param("codec inspect {0}/gone", 1, "gone: No such file", id="inspect"),
    ],
)
def test_wrong_folders_are_named(
    sparsekit: Command, whole: Path, tmp_path: Path, line: str, code: int, text: str
) -> None:
    empty, unfinished, copy = tmp_path / "empty", tmp_path / "half done", tmp_path / "copy"
    for folder in (empty, unfinished):
        folder.mkdir()
    (unfinished / "config.toml").write_text('cohort = "x"\n')
    shutil.copytree(whole, copy)
    names = (empty, whole, unfinished, copy)
    found, out, error = sparsekit(*(word.format(*names) for word in line.split()))
    assert (found, out) == (code, "")
    assert text in one_line(error)


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        pytest.param("result.json", '{"layout": 1', "is damaged", id="cut short"),
        pytest.param("result.json", '{"layout": 1}', "it lacks accuracy, bytes", id="parts"),
        pytest.param("result.json", '{"layout": 99}', "another layout", id="layout"),
        pytest.param("sites/a%20b/predictions.csv", "participant\nx\n", "predictions", id="column"),
        pytest.param(
            "sites/a%20b/predictions.csv",
            "participant,site,age,predicted\nx,y,old,3\n",
            "predictions",
            id="number",
        ),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_damaged_runs_are_refused_with_the_remedy(
    sparsekit: Command,
    whole: Path,
    tmp_path: Path,
    file: str,
    content: str,
    text: str,
    command: str,
) -> None:
    run = tmp_path / "my run"
    shutil.copytree(whole, run)
    (run / file).write_text(content)
    more = (whole,) if command == "compare" else ()
    code, _, error = sparsekit("fed", command, run, *more)
    assert code == 1
    assert text in one_line(error)
    if 'layout": 99' not in content:
        assert f"`sparsekit fed resume '{run}'`" in error


def test_debug_shows_the_traceback_and_keeps_the_code(sparsekit: Command, tmp_path: Path) -> None:
    for line in (["--debug", "fed", "resume"], ["fed", "resume", "--debug"]):
        code, _, error = sparsekit(*line, tmp_path)
        assert code == 2
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("sparsekit: error: run: ")


def test_names_cannot_steer_the_terminal(sparsekit: Command) -> None:
    _, _, error = sparsekit("fed", "resume", "a\x1b[2J\nb")
    assert one_line(error).startswith("run: a\N{REPLACEMENT CHARACTER}[2J b has no config.toml")


@pytest.mark.parametrize("line", ["fed run --cohort {0} --out {1}/run", "cohort make {1}/c"])
def test_a_file_where_a_folder_should_be(
    sparsekit: Command, people: Path, tmp_path: Path, line: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    words = [word.format("COHORT", file) for word in line.split()]
    words = [str(people) if word == "COHORT" else word for word in words]
    if "make" in words:
        words += ["--subjects", "4", "--sites", "1"]
    code, _, error = sparsekit(*words)
    assert code == 1
    assert str(file) in one_line(error)
    assert file.read_text() == "mine"
