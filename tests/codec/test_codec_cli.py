"""``sparsekit codec`` from the outside: files in, files out, one line on error."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune

from sparsekit import codec
from sparsekit.cli import main

STATE = {
    "conv.weight": torch.eye(12).reshape(12, 3, 4),
    "conv.bias": torch.tensor([0.5, float("inf")]),
    "file": torch.tensor(3),
    "half": torch.tensor([1.5, 2.5]).bfloat16(),
    "[red]tag": torch.tensor([True, False]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(STATE, "state.pt")
    Path("state.spu").write_bytes(codec.encode(STATE, round=4))
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["codec", *arguments])
    code = exit_.value.code
    assert isinstance(code, int) or code is None
    return code or 0


def listing() -> set[str]:
    return set(os.listdir())


@pytest.mark.usefixtures("folder")
def test_encode_writes_what_the_library_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encode", "state.pt", "out.spu", "--round", "4") == 0
    assert Path("out.spu").read_bytes() == Path("state.spu").read_bytes()
    assert "out.spu: " in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_decode_writes_an_npz_that_encodes_again() -> None:
    assert run("decode", "state.spu", "out.npz") == 0
    with np.load("out.npz") as arrays:
        assert arrays.files == list(STATE)
        assert arrays["half"].dtype == np.float32
        for name, tensor in STATE.items():
            np.testing.assert_array_equal(arrays[name], tensor.to("cpu").float().numpy())
            assert arrays[name].shape == tuple(tensor.shape)
    assert run("encode", "out.npz", "again.spu", "--mask-encoding", "bitmap") == 0
    again = codec.decode(Path("again.spu").read_bytes())
    assert torch.equal(again["conv.weight"], STATE["conv.weight"])
    assert listing() == {"state.pt", "state.spu", "out.npz", "again.spu"}


@pytest.mark.usefixtures("folder")
def test_a_base_is_used_on_both_ends() -> None:
    torch.save({"conv.weight": 2 * STATE["conv.weight"]}, "base.pth")
    assert run("encode", "state.pt", "out.spu", "--base", "base.pth") == 0
    info = codec.inspect(Path("out.spu").read_bytes())
    assert info.records[0].mask_encoding == "same"
    assert run("decode", "out.spu", "out.npz", "--base", "base.pth") == 0
    with np.load("out.npz") as arrays:
        np.testing.assert_array_equal(arrays["conv.weight"], STATE["conv.weight"].numpy())


@pytest.mark.usefixtures("folder")
def test_the_level_is_chosen() -> None:
    assert run("decode", "state.spu", "out.npz") == 0
    assert run("encode", "out.npz", "fast.spu", "--level", "fast") == 0
    assert codec.inspect(Path("fast.spu").read_bytes()).version == (1, 0)
    assert run("encode", "out.npz", "bad.spu", "--level", "best") == 1


@pytest.mark.usefixtures("folder")
def test_inspect_prints_records_and_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "state.spu") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    assert cells[1] == [
        *("conv.weight", "float32", "12x3x4", "rice", "raw"),
        *("144", "12", "8.33%", "8", "48"),
    ]
    assert cells[3][:3] == ["file", "int64", "scalar"]
    assert cells[5][0] == "[red]tag"
    size = Path("state.spu").stat().st_size
    text = "\n".join(lines)
    assert "format 1.1, round 4, base none" in text
    assert f"{size:,} bytes = header" in text
    dense = 4 * 144 + 8 + 8 + 4 + 2
    assert f"{8 * size / 151:.3f} bits per weight, {dense / size:.2f} times smaller" in text


@pytest.mark.usefixtures("folder")
def test_inspect_of_an_empty_payload(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.spu").write_bytes(codec.encode({}))
    assert run("inspect", "empty.spu") == 0
    assert "0 tensors, 0 of 0 elements kept, density -" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_control_codes_in_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.spu").write_bytes(codec.encode({"a\x1b[2Jb": torch.ones(1)}))
    assert run("inspect", "evil.spu") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "'a\\x1b[2Jb'" in out


def npz_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.array([{}], dtype=object))
    return buffer.getvalue()


def npz_cut_in_the_data() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, w=np.arange(1000))
    data = bytearray(buffer.getvalue())
    data[100:140] = bytes(40)
    return bytes(data)


def pt_of(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "content", "code", "match"),
    [
        pytest.param("a.onnx", b"", 2, "ends in .pt, .pth, .npz or .safetensors", id="suffix"),
        pytest.param("a.npz", b"", 1, "a.npz: it is no .npz file", id="npz-empty"),
        pytest.param("a.npz", b"PK\x03\x04zzzz", 1, "a.npz: it is no .npz file", id="npz-damaged"),
        pytest.param("a.npz", npz_of_objects(), 1, "a.npz: it is no .npz file", id="npz-objects"),
        pytest.param("a.npz", npz_cut_in_the_data(), 1, "it is no .npz file", id="npz-inside"),
        pytest.param("a.pt", b"", 1, "a.pt: torch.load cannot read it", id="pt-empty"),
        pytest.param("a.pt", b"\x80\x02garbage", 1, "a.pt: torch.load cannot", id="pt-damaged"),
        pytest.param("a.pt", pt_of([1]), 1, "tensors by name, got list", id="pt-list"),
        pytest.param("a.pt", pt_of({"m": {}}), 1, "a tensor under 'm', got dict", id="pt-nested"),
    ],
)
def test_encode_refuses_other_files(
    name: str, content: bytes, code: int, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_bytes(content)
    assert run("encode", name, "out.spu") == code
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert listing() == {"state.pt", "state.spu", name}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        pytest.param(["inspect", "state.pt"], 1, "not the magic number", id="no-payload"),
        pytest.param(["inspect", "no.spu"], 1, "No such file", id="missing"),
        pytest.param(["decode", "state.pt", "out.npz"], 1, "magic number", id="decode-no-payload"),
        pytest.param(["decode", "state.spu", "out.pt"], 2, "ends in .npz", id="decode-suffix"),
        pytest.param(
            ["decode", "state.spu", "out.npz", "--max-bytes", "9"], 1, "limit is 9", id="budget"
        ),
        pytest.param(
            ["encode", "state.pt", "state.spu"], 1, "it exists; choose another name", id="exists"
        ),
        pytest.param(
            ["encode", "state.pt", "o.spu", "--mask-encoding", "x"], 1, "expected one of", id="enc"
        ),
        pytest.param(["encode", "state.pt", "no/o.spu"], 1, "No such file", id="no-folder"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], code: int, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path("state.spu").read_bytes()
    assert run(*arguments) == code
    error = capsys.readouterr().err
    assert match in error
    assert error.startswith("sparsekit: error: ")
    assert error.count("\n") == 1
    assert listing() == {"state.pt", "state.spu"}
    assert Path("state.spu").read_bytes() == before


@pytest.mark.usefixtures("folder")
def test_force_replaces_the_file() -> None:
    Path("out.npz").write_bytes(b"old")
    assert run("decode", "state.spu", "out.npz") == 1
    assert Path("out.npz").read_bytes() == b"old"
    assert run("decode", "state.spu", "out.npz", "--force") == 0
    with np.load("out.npz") as arrays:
        assert arrays.files == list(STATE)


@pytest.mark.usefixtures("folder")
def test_safetensors_go_in_and_out() -> None:
    assert run("decode", "state.spu", "out.safetensors") == 0
    state = safetensors.torch.load_file("out.safetensors")
    assert set(state) == set(STATE)
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())
    assert all(state[name].dtype == tensor.dtype for name, tensor in STATE.items())
    assert run("encode", "out.safetensors", "again.spu") == 0
    again = codec.decode(Path("again.spu").read_bytes(), template=STATE)
    assert all(torch.equal(again[name], tensor) for name, tensor in STATE.items())


@pytest.mark.usefixtures("folder")
def test_a_damaged_safetensors_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.safetensors").write_bytes(b"\xff" * 30)
    assert run("encode", "bad.safetensors", "out.spu") == 1
    assert "bad.safetensors: it is no .safetensors file" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_masks_of_torchs_pruning_are_taken() -> None:
    layer = torch.nn.utils.prune.l1_unstructured(torch.nn.Linear(6, 5), "weight", amount=20)
    torch.save(layer.state_dict(), "pruned.pt")
    assert run("encode", "pruned.pt", "out.spu") == 0
    payload = Path("out.spu").read_bytes()
    assert list(codec.decode(payload)) == ["bias", "weight"]
    assert int(codec.decode_masks(payload)["weight"].sum()) == 10


@pytest.mark.usefixtures("folder")
def test_what_has_changed_is_encoded_against_a_base() -> None:
    torch.save({"w": torch.ones(1000)}, "before.pt")
    torch.save({"w": torch.full((1000,), 1.0 + 2**-8)}, "after.pt")
    options = ("--base", "before.pt", "--values", "int8")
    assert run("encode", "after.pt", "out.spu", *options) == 0
    assert Path("out.spu").stat().st_size < 200
    assert run("decode", "out.spu", "out.npz", "--base", "before.pt") == 0
    with np.load("out.npz") as arrays:
        assert np.abs(arrays["w"] - 1.0 - 2**-8).max() < 1e-6


@pytest.mark.usefixtures("folder")
def test_what_is_large_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparsekit.cli.states._LARGE_BYTES", 1)
    monkeypatch.setenv("FORCE_COLOR", "1")
    for arguments in (("encode", "state.pt", "a.spu"), ("decode", "a.spu", "a.npz")):
        assert run(*arguments) == 0
        assert "tensors" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    assert run("decode", "a.spu", "b.npz") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("folder")
def test_a_tensor_may_be_called_as_the_file_of_another() -> None:
    state = {"w": torch.ones(3), "w.npy": torch.full((3,), 2.0)}
    Path("a.spu").write_bytes(codec.encode(state))
    assert run("decode", "a.spu", "a.npz") == 0
    assert run("encode", "a.npz", "b.spu") == 0
    again = codec.decode(Path("b.spu").read_bytes())
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "target", "match"),
    [
        ("n" * 65_532, "a.npz", "is too long a name"),
        ("__metadata__", "a.safetensors", "cannot hold a tensor named '__metadata__'"),
    ],
)
def test_names_that_a_format_cannot_hold_are_refused(
    name: str, target: str, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.spu").write_bytes(codec.encode({name: torch.ones(2)}))
    assert run("decode", "a.spu", target) == 1
    assert match in capsys.readouterr().err
    assert not Path(target).exists()


@pytest.mark.usefixtures("folder")
def test_bytes_of_pruned_tensors_are_counted_once(capsys: pytest.CaptureFixture[str]) -> None:
    layer = torch.nn.utils.prune.l1_unstructured(
        torch.nn.Linear(8, 8, bias=False), "weight", amount=20
    )
    torch.save(layer.state_dict(), "pruned.pt")
    assert run("encode", "pruned.pt", "out.spu") == 0
    assert "for 256 bytes of tensors" in capsys.readouterr().err
