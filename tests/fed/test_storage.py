import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekit.errors import RunError
from sparsekit.fed import checkpoint
from sparsekit.fed.algorithm import ServerState
from sparsekit.fed.checkpoint import Checkpoint
from sparsekit.fed.ledger import Ledger, message_row
from sparsekit.fed.storage import publish_folder, remove_leftovers, write_atomically, write_json


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "model.spu"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, failing, full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new" * 1000)
    # Of the file that was asked for, not of the temporary beside it.
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sites" / "a%20b"
    folder.mkdir(parents=True)
    kept = folder / "predictions.csv"
    write_atomically(kept, b"data")
    # A kill runs no clean-up.
    monkeypatch.setattr(os, "fsync", full_disk)
    monkeypatch.setattr(Path, "unlink", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(kept, b"new")
    monkeypatch.undo()
    assert len(list(folder.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert list(folder.iterdir()) == [kept]
    assert kept.read_bytes() == b"data"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "x"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, b"data")
    assert caught.value.filename == str(path)


def test_write_replaces_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"a long first version")
    write_atomically(tmp_path / "x", b"short")
    assert (tmp_path / "x").read_bytes() == b"short"


def test_json_keeps_the_order_and_refuses_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": ["ö"]})
    assert list(json.loads(path.read_text(encoding="utf-8"))) == ["b", "a"]
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"b": float("nan")})
    assert path.read_bytes() == before


def test_a_published_folder_replaces_one_of_its_name(tmp_path: Path) -> None:
    for name, text in (("new", "2"), ("final", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"file{text}").write_text(text)
    publish_folder(tmp_path / "new", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["file2"]


def state(number: int) -> Checkpoint:
    weights = {"a.weight": torch.tensor([1.0, 0.0, 3.0]), "a.bias": torch.tensor([float(number)])}
    server = ServerState(
        round=number,
        weights=weights,
        masks={"a.weight": torch.tensor([True, False, True])},
        mean_age=60.0,
        first_voxel=(1, 0, 2),
        in_shape=(3, 4, 5),
    )
    return Checkpoint(
        server=server,
        history=[{"round": number}],
        ledger_bytes=7,
        seconds=1.5,
        contents={"a": "hash"},
    )


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    for number in range(4):
        checkpoint.save(tmp_path, state(number), keep=2)
    assert list(checkpoint.saved_rounds(tmp_path)) == [2, 3]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "round-00002",
        "round-00003",
    }
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert (found.history, found.ledger_bytes, found.seconds) == ([{"round": 3}], 7, 1.5)
    for name, value in state(3).server.weights.items():
        assert torch.equal(found.server.weights[name], value)
    assert found.server.masks is not None
    assert found.server.masks["a.weight"].tolist() == [True, False, True]


def test_a_failed_checkpoint_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    write = Path.write_text

    def half(path: Path, data: str, **options: Any) -> int:
        write(path, data[:5], **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left") as caught:
        checkpoint.save(tmp_path, state(2), keep=2)
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "checkpoints" / "round-00002")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-00001"]
    checkpoint.save(tmp_path, state(2), keep=2)
    assert list(checkpoint.saved_rounds(tmp_path)) == [1, 2]


def test_what_a_kill_left_is_neither_taken_nor_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    for name in (".round-00002.tmp", "round-00001 (copy)", "round-00009.bak"):
        (tmp_path / "checkpoints" / name).mkdir()
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.server.round == 1
    checkpoint.save(tmp_path, state(2), keep=2)
    assert not (tmp_path / "checkpoints" / ".round-00002.tmp").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b""),
        ("state.json", b"[]"),
        ("state.json", b'{"layout": 2}'),
        ("state.json", b"\xff"),
        ("model.spu", b""),
        ("model.spu", b"SPKU"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path: Path, file: str, content: bytes) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    (tmp_path / "checkpoints" / "round-00001" / file).write_bytes(content)
    with pytest.raises(RunError, match=r"round-00001 is damaged .* Remove that folder"):
        checkpoint.load_newest(tmp_path)


def test_ledger_names_the_line_that_is_damaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    row = message_row(
        round_number=1,
        client="Köln",
        direction="up",
        outcome="ok",
        dense_equivalent_bytes=400,
        message_bytes=130,
        payload_bytes=100,
        travels=True,
    )
    ledger.append([row, row])
    assert list(ledger) == [row, row]
    assert (row.framing_bytes, row.control_bytes, row.transport_bytes) == (16, 14, 130)
    mark = ledger.size_bytes
    for junk in (b"{}\n", b"\xff\n", b"7\n", b'{"round": 1'):
        ledger.path.write_bytes(ledger.path.read_bytes()[:mark] + junk)
        with pytest.raises(RunError, match="line 3"):
            list(ledger)
    ledger.truncate(mark)
    assert list(ledger) == [row, row]
    with pytest.raises(RunError, match="was changed"):
        ledger.truncate(mark + 1)
