"""State files of the command line: opened, read tensor by tensor, with progress if it is long."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from sparsekit.errors import ArgumentError, MissingExtraError, UsageError

# Files from here on take long enough to show how far it is.
_LARGE_BYTES = 64 * 2**20


def open_state(path: Path) -> Mapping[str, Tensor]:
    """Open a state file: .npz, .safetensors, or .pt and .pth as ``torch.save(state_dict)`` writes.

    Of the first two each tensor is read when it is asked for.

    Raises
    ------
    UsageError
        For another suffix.
    ArgumentError
        If the file cannot be read, or holds something else than tensors by name.
    """
    if path.suffix == ".npz":
        return _LazyState(path, _npz_tensors(path))
    if path.suffix in (".pt", ".pth"):
        loaded = _load_torch(path)
    elif path.suffix == ".safetensors":
        return _LazyState(path, _safetensors_tensors(path))
    else:
        raise UsageError(f"{path}: expected a name that ends in .pt, .pth, .npz or .safetensors")
    if not isinstance(loaded, dict):
        raise ArgumentError(
            f"{path}: expected tensors by name, got {type(loaded).__name__}; "
            "save it with torch.save(model.state_dict(), ...)"
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArgumentError(
                f"{path}: expected a tensor under {name!r}, got {type(value).__name__}; "
                "save it with torch.save(model.state_dict(), ...)"
            )
    return loaded


class _LazyState(Mapping[str, Tensor]):
    """Tensors of a file by name, read when they are asked for."""

    def __init__(self, path: Path, source: tuple[list[str], Callable[[str], Tensor]]) -> None:
        self._path = path
        self._names, self._get = source

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._get(name)
        except OSError:
            raise
        except Exception as error:
            # Damaged files raise whatever their reader met first.
            raise ArgumentError(_damaged(self._path, error)) from error

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _damaged(path: Path, error: Exception) -> str:
    kind = ".npz file of numeric arrays" if path.suffix == ".npz" else ".safetensors file"
    return f"{path}: it is no {kind} ({error})"


def _npz_tensors(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it holds a single array")
            names = list(arrays.files)
    except OSError:
        raise
    except Exception as error:
        raise ArgumentError(_damaged(path, error)) from error

    def get(name: str) -> Tensor:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            # By the member's whole name: another tensor may be called as this one's file.
            member = f"{name}.npy"
            array = arrays[member if member in arrays.zip.namelist() else name]
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))

    return names, get


def _safetensors_tensors(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    library = safetensors()
    # Its own error for a missing file has no number.
    path.open("rb").close()
    try:
        with library.safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
    except Exception as error:
        raise ArgumentError(_damaged(path, error)) from error

    def get(name: str) -> Tensor:
        with library.safe_open(path, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return names, get


def safetensors() -> Any:
    """The module of that name for torch.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError(
            "safetensors: not installed; `pip install sparsekit3d[interop]` brings it"
        ) from None
    return safetensors.torch


def _load_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # torch.load lets whatever its unpickler met on damaged bytes pass through.
        raise ArgumentError(
            f"{path}: torch.load cannot read it as a state ({type(error).__name__}); "
            "save it with torch.save(model.state_dict(), ...)"
        ) from error


def progress(
    tensors: Iterable[tuple[str, Tensor]], size_bytes: int
) -> Iterable[tuple[str, Tensor]]:
    """Show how many tensors have been done, if the file is large and someone is looking."""
    console = Console(stderr=True)
    hidden = size_bytes < _LARGE_BYTES or not console.is_terminal
    return track(tensors, "tensors", console=console, transient=True, disable=hidden)


class Shown(Mapping[str, Tensor]):
    """A state that shows progress while it is gone through, and counts its bytes."""

    def __init__(self, state: Mapping[str, Tensor], size_bytes: int) -> None:
        self._state, self._size_bytes = state, size_bytes
        self.seen_bytes = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        self.seen_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def __iter__(self) -> Iterator[str]:
        console = Console(stderr=True)
        hidden = self._size_bytes < _LARGE_BYTES or not console.is_terminal
        yield from track(
            list(self._state), "tensors", console=console, transient=True, disable=hidden
        )

    def __len__(self) -> int:
        return len(self._state)
