"""Payloads in files: the bytes of `encode`, one tensor at a time, from whatever can be read."""

import gzip
import io
import os
import threading
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsekit import codec
from sparsekit.errors import ArgumentError, CodecError, TruncatedError

STATE = {
    "w": torch.arange(3000.0).reshape(30, 100) * (torch.arange(3000).reshape(30, 100) % 7 == 0),
    "": torch.ones(3),
    "b": torch.zeros(5),
    "none": torch.zeros(0, 2),
    "n": torch.tensor(7),
}
MASKS = {"w": STATE["w"] != 0}
BASE = {name: tensor + 1 if name == "w" else tensor for name, tensor in STATE.items()}


def equal(found: Iterator[tuple[str, Tensor]]) -> bool:
    pairs = list(found)
    assert [name for name, _ in pairs] == list(STATE)
    return all(torch.equal(tensor, STATE[name]) for name, tensor in pairs)


@pytest.mark.parametrize("masks", [None, MASKS])
@pytest.mark.parametrize("base", [None, BASE])
def test_the_bytes_are_those_of_encode(
    masks: dict[str, Tensor] | None, base: dict[str, Tensor] | None
) -> None:
    file = io.BytesIO()
    file.write(b"before")
    size = codec.encode_to(file, STATE, masks=masks, base=base, round=4)
    wanted = codec.encode(STATE, masks=masks, base=base, round=4)
    assert file.getvalue() == b"before" + wanted
    assert size == len(wanted)


def test_any_binary_file_is_read(tmp_path: Path) -> None:
    payload = codec.encode(STATE, masks=MASKS, base=BASE)
    path = tmp_path / "p.spu"
    path.write_bytes(payload)
    (tmp_path / "p.gz").write_bytes(gzip.compress(payload))
    with path.open("rb") as plain, path.open("rb", buffering=0) as raw:
        assert equal(codec.decode_from(plain, base=BASE, template=STATE))
        assert equal(codec.decode_from(raw, base=BASE))
    with gzip.open(tmp_path / "p.gz", "rb") as zipped:
        assert equal(codec.decode_from(zipped, base=BASE))
    assert equal(codec.decode_from(io.BytesIO(payload), base=BASE))
    read, write = os.pipe()

    def send() -> None:
        with os.fdopen(write, "wb") as end:
            end.write(payload)

    sender = threading.Thread(target=send)
    sender.start()
    with os.fdopen(read, "rb") as pipe:
        assert equal(codec.decode_from(pipe, base=BASE))
    sender.join()


def test_damage_is_found_before_the_first_tensor(tmp_path: Path) -> None:
    payload = codec.encode(STATE)
    for damaged in (b"", payload[:-1], payload + b"\0", payload[:100] + b"?" + payload[101:]):
        (tmp_path / "p").write_bytes(damaged)
        with (tmp_path / "p").open("rb") as file, pytest.raises(CodecError):
            codec.decode_from(file)
        with pytest.raises(CodecError):
            codec.decode_from(io.BytesIO(damaged))
    with pytest.raises(TruncatedError):
        codec.decode_from(io.BytesIO(b""))


def test_nothing_is_written_before_all_is_encoded() -> None:
    file = io.BytesIO()
    with pytest.raises(ArgumentError, match="outside its mask"):
        codec.encode_to(file, STATE, masks={"w": torch.zeros(30, 100, dtype=torch.bool)})
    assert file.getvalue() == b""


class Made(Mapping[str, Tensor]):
    """Tensors that exist while they are asked for."""

    def __init__(self, count: int, n: int) -> None:
        self._names, self._n = [str(i) for i in range(count)], n

    def __getitem__(self, name: str) -> Tensor:
        random = torch.Generator().manual_seed(int(name))
        kept = torch.rand(self._n, generator=random) < 0.1
        return torch.randn(self._n, generator=random) * kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    count, n = 12, 400_000
    state = Made(count, n)
    with (tmp_path / "p").open("wb") as file:
        codec.encode_to(file, Made(1, n))
        file.seek(0)
        tracemalloc.start()
        try:
            codec.encode_to(file, state)
            assert tracemalloc.get_traced_memory()[1] < 2 * 4 * n
        finally:
            tracemalloc.stop()
    with (tmp_path / "p").open("rb") as payload:
        tracemalloc.start()
        try:
            names = []
            for name, tensor in codec.decode_from(payload):
                assert torch.equal(tensor, state[name])
                names.append(name)
            # One being decoded while the one before is still held.
            assert tracemalloc.get_traced_memory()[1] < 2 * 4 * n + 2**20
        finally:
            tracemalloc.stop()
    assert names == list(state)
