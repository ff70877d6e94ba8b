"""What people use to store or send a pruned state, behind one pair of functions each.

A rival may drop names and shapes where its format has no place for them: it then has fewer bytes
to write, and gets them back from the state that `decode` is given.
"""

import importlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

State = dict[str, Tensor]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Rival:
    """A way to write a state and to read it."""

    encode: Callable[[State], bytes]
    decode: Callable[[bytes, State], State]
    """Takes the bytes, and the state for its names and shapes alone."""
    exact: bool = True


def _flat(state: State) -> npt.NDArray[np.float32]:
    return np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])


def _unflat(flat: npt.NDArray[np.float32], like: State) -> State:
    state, at = {}, 0
    for name, tensor in like.items():
        piece = flat[at : at + tensor.numel()].reshape(tuple(tensor.shape))
        state[name] = torch.from_numpy(piece)
        at += tensor.numel()
    return state


def _torch_save(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _torch_load(payload: bytes, _: State) -> State:
    loaded: State = torch.load(io.BytesIO(payload), weights_only=True)
    return loaded


def _safetensors() -> Rival:
    library = importlib.import_module("safetensors.torch")
    return Rival(library.save, lambda payload, _: library.load(payload))


def _zipped(rival: Rival, level: int) -> Rival:
    writer, reader = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Rival(
        lambda state: writer.compress(rival.encode(state)),
        lambda payload, like: rival.decode(reader.decompress(payload), like),
    )


def _dense() -> Rival:
    return Rival(
        lambda state: _flat(state).tobytes(),
        lambda payload, like: _unflat(np.frombuffer(bytearray(payload), np.float32), like),
    )


def _pcodec() -> Rival:
    standalone = importlib.import_module("pcodec.standalone")
    config = importlib.import_module("pcodec").ChunkConfig()
    return Rival(
        lambda state: bytes(standalone.simple_compress(_flat(state), config)),
        lambda payload, like: _unflat(standalone.simple_decompress(payload), like),
    )


def _blosc2() -> Rival:
    library = importlib.import_module("blosc2")
    library.set_nthreads(1)
    options: dict[str, Any] = {"codec": library.Codec.ZSTD, "clevel": 5, "typesize": 4}
    return Rival(
        lambda state: library.compress2(_flat(state), filters=[library.Filter.SHUFFLE], **options),
        lambda payload, like: _unflat(
            np.frombuffer(bytearray(library.decompress2(payload)), np.float32), like
        ),
    )


def _zipnn() -> Rival:
    library = importlib.import_module("zipnn").ZipNN(
        input_format="byte", bytearray_dtype="float32", threads=1
    )
    return Rival(
        lambda state: bytes(library.compress(_flat(state).tobytes())),
        lambda payload, like: _unflat(
            np.frombuffer(bytearray(library.decompress(payload)), np.float32), like
        ),
    )


def _by_tensor(
    write: Callable[[npt.NDArray[np.float32]], list[bytes]],
    read: Callable[[list[bytes], Tensor], npt.NDArray[np.float32]],
) -> Rival:
    """Lists of pieces for each tensor, with their lengths before them."""

    def encode(state: State) -> bytes:
        pieces = [piece for tensor in state.values() for piece in write(tensor.numpy())]
        lengths = np.array([len(pieces), *map(len, pieces)], "<u4")
        return b"".join([lengths.tobytes(), *pieces])

    def decode(payload: bytes, like: State) -> State:
        count = int(np.frombuffer(payload, "<u4", 1)[0])
        lengths = np.frombuffer(payload, "<u4", count, 4).tolist()
        at, pieces = 4 + 4 * count, []
        for length in lengths:
            pieces.append(payload[at : at + length])
            at += length
        each = count // len(like)
        return {
            name: torch.from_numpy(
                read(pieces[i * each : (i + 1) * each], tensor).reshape(tuple(tensor.shape))
            )
            for i, (name, tensor) in enumerate(like.items())
        }

    return Rival(encode, decode)


def _scipy() -> Rival:
    sparse = importlib.import_module("scipy.sparse")

    def write(array: npt.NDArray[np.float32]) -> list[bytes]:
        buffer = io.BytesIO()
        grid = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
        sparse.save_npz(buffer, sparse.csr_array(grid), compressed=False)
        return [buffer.getvalue()]

    def read(pieces: list[bytes], _: Tensor) -> npt.NDArray[np.float32]:
        dense: npt.NDArray[np.float32] = sparse.load_npz(io.BytesIO(pieces[0])).toarray()
        return dense

    return _by_tensor(write, read)


def _csr16() -> Rival:
    """Row counts and columns of 2 bytes, by hand, as in the layout that this library has too."""

    def write(array: npt.NDArray[np.float32]) -> list[bytes]:
        grid = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
        keep = grid != 0
        columns = np.nonzero(keep)[1].astype("<u2")
        return [keep.sum(1).astype("<u2").tobytes(), columns.tobytes(), grid[keep].tobytes()]

    def read(pieces: list[bytes], like: Tensor) -> npt.NDArray[np.float32]:
        counts, columns = (np.frombuffer(piece, "<u2") for piece in pieces[:2])
        grid = np.zeros((counts.size, like.numel() // counts.size), np.float32)
        rows = np.repeat(np.arange(counts.size), counts)
        grid[rows, columns] = np.frombuffer(pieces[2], np.float32)
        return grid

    return _by_tensor(write, read)


def _bitmap() -> Rival:
    def write(array: npt.NDArray[np.float32]) -> list[bytes]:
        flat = array.reshape(-1)
        keep = flat != 0
        kept = flat.take(np.flatnonzero(keep))
        return [np.packbits(keep, bitorder="little").tobytes(), kept.tobytes()]

    def read(pieces: list[bytes], like: Tensor) -> npt.NDArray[np.float32]:
        packed = np.frombuffer(pieces[0], np.uint8)
        keep = np.unpackbits(packed, count=like.numel(), bitorder="little").view(np.bool_)
        flat = np.zeros(like.numel(), np.float32)
        flat[np.flatnonzero(keep)] = np.frombuffer(pieces[1], np.float32)
        return flat

    return _by_tensor(write, read)


def _pyroaring() -> Rival:
    bitmap = importlib.import_module("pyroaring").BitMap

    def write(array: npt.NDArray[np.float32]) -> list[bytes]:
        flat = array.reshape(-1)
        places = np.flatnonzero(flat != 0).astype(np.uint32)
        return [bitmap(places).serialize(), flat.take(places).tobytes()]

    def read(pieces: list[bytes], like: Tensor) -> npt.NDArray[np.float32]:
        places = np.array(bitmap.deserialize(pieces[0]).to_array(), np.uint32)
        flat = np.zeros(like.numel(), np.float32)
        flat[places] = np.frombuffer(pieces[1], np.float32)
        return flat

    return _by_tensor(write, read)


_MAKERS: dict[str, Callable[[], Rival]] = {
    "torch.save": lambda: Rival(_torch_save, _torch_load),
    "safetensors": _safetensors,
    "safetensors + zstd-3": lambda: _zipped(_safetensors(), 3),
    "zstd-1": lambda: _zipped(_dense(), 1),
    "zstd-19": lambda: _zipped(_dense(), 19),
    "pcodec": _pcodec,
    "blosc2 (zstd, shuffle)": _blosc2,
    "ZipNN": _zipnn,
    "scipy.sparse.save_npz": _scipy,
    "CSR with uint16": _csr16,
    "packbits + values": _bitmap,
    "pyroaring + values": _pyroaring,
}
SLOW = ("zstd-19",)
"""Rivals that take seconds."""


def rivals() -> tuple[dict[str, Rival], dict[str, str]]:
    """Rivals that can run here, and why the others cannot."""
    found: dict[str, Rival] = {}
    missing: dict[str, str] = {}
    for name, make in _MAKERS.items():
        try:
            # ZipNN's import uses what torch has deprecated.
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                found[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
