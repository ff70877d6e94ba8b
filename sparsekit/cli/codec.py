"""``sparsekit codec``: look into payloads, and convert state files to payloads and back."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsekit import codec
from sparsekit.codec import PayloadInfo, RecordInfo
from sparsekit.codec.interop import from_torch_prune
from sparsekit.errors import ArgumentError, MissingExtraError, UsageError

app = typer.Typer(no_args_is_help=True, help="Inspect, write and read payloads of sparse states.")

_SUFFIXES = ".pt, .pth, .npz or .safetensors"
Payload = Annotated[Path, typer.Argument(metavar="FILE", help="Payload.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Base = Annotated[
    Path | None,
    typer.Option("--base", help=f"State that both ends hold ({_SUFFIXES})."),
]


@app.command("inspect")
def inspect_command(file: Payload) -> None:
    """Print what a payload holds, tensor by tensor; its checksums are verified."""
    info = codec.inspect(file.read_bytes())
    # Into a pipe the table keeps its full width: rich would assume 80 columns and fold it.
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    console.print(_record_table(info))
    for line in _totals(info):
        console.print(line, markup=False, soft_wrap=True)


@app.command("encode")
def encode_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help=f"State ({_SUFFIXES}).")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Payload to write.")],
    base: Base = None,
    mask_encoding: Annotated[
        str,
        typer.Option(help="auto | dense | bitmap | rice | csr | same | subset | predicted"),
    ] = "auto",
    values: Annotated[str, typer.Option(help="lossless | bf16 | fp16 | int8 | int4")] = "lossless",
    level: Annotated[str, typer.Option(help="fast | balanced | small")] = "balanced",
    round_: Annotated[int, typer.Option("--round", help="Number to put in the header.")] = 0,
    force: Force = False,
) -> None:
    """Write the state in IN as a payload; masks are its non-zero patterns.

    Of a state that torch.nn.utils.prune has made (NAME_orig, NAME_mask) they are its masks.
    """
    _refuse_existing(target, force)
    state, masks = from_torch_prune(load_state(source))
    payload = codec.encode(
        state,
        masks=masks or None,
        base=None if base is None else load_state(base),
        mask_encoding=mask_encoding,  # type: ignore[arg-type]  # encode checks all three
        level=level,  # type: ignore[arg-type]
        values=values,  # type: ignore[arg-type]
        round=round_,
    )
    _write_whole(target, lambda file: file.write(payload), force)
    info = codec.inspect(payload)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{target}: {info.payload_bytes:,} bytes for {info.dense_bytes:,} bytes of tensors",
        markup=False,
    )


@app.command("decode")
def decode_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Payload.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write: .npz, .safetensors.")
    ],
    base: Base = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Most bytes that the tensors may take. [default: 4 GiB]")
    ] = None,
    force: Force = False,
) -> None:
    """Write the tensors of a payload; in an .npz file bfloat16 becomes float32, exactly."""
    if target.suffix not in (".npz", ".safetensors"):
        raise UsageError(
            f"OUT: expected a name that ends in .npz or .safetensors, got {target.name!r}"
        )
    _refuse_existing(target, force)
    state = codec.decode(
        source.read_bytes(),
        base=None if base is None else load_state(base),
        max_bytes=max_bytes,
    )
    if target.suffix == ".npz":
        _write_whole(target, lambda file: _write_npz(file, state), force)
    else:
        data = _safetensors().save(state)
        _write_whole(target, lambda file: file.write(data), force)


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state file: .npz, .safetensors, or .pt and .pth as ``torch.save(state_dict)`` writes.

    Raises
    ------
    UsageError
        For another suffix.
    ArgumentError
        If the file cannot be read, or holds something else than tensors by name.
    """
    if path.suffix == ".npz":
        loaded: object = _load_npz(path)
    elif path.suffix in (".pt", ".pth"):
        loaded = _load_torch(path)
    elif path.suffix == ".safetensors":
        loaded = _load_safetensors(path)
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


def _load_npz(path: Path) -> dict[str, Tensor]:
    state = {}
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise ValueError("it holds a single array")
            for name in arrays.files:
                array = arrays[name]
                native = array.astype(array.dtype.newbyteorder("="), copy=False)
                state[name] = torch.from_numpy(native)
    except OSError:
        raise
    except Exception as error:
        # Damaged archives raise whatever zipfile, zlib or the array reader met first.
        raise ArgumentError(f"{path}: it is no .npz file of numeric arrays ({error})") from error
    return state


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


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    try:
        state: dict[str, Tensor] = _safetensors().load(data)
    except MissingExtraError:
        raise
    except Exception as error:
        # Its reader raises an error of its own for damage, and others for unknown dtypes.
        raise ArgumentError(f"{path}: it is no .safetensors file ({error})") from error
    return state


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise MissingExtraError(
            "safetensors: not installed; `pip install sparsekit3d[interop]` brings it"
        ) from None
    return safetensors.torch


def _refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise ArgumentError(f"{target}: it exists; choose another name or pass --force")


def _write_whole(target: Path, write: Callable[[IO[bytes]], object], force: bool) -> None:
    """Write under a temporary name beside the target, then rename: never half a file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _refuse_existing(target, force)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_npz(file: IO[bytes], state: dict[str, Tensor]) -> None:
    # Not np.savez: it takes the names as keyword arguments and so forbids one called "file".
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in state.items():
            exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, exact.numpy(), allow_pickle=False)


def _record_table(info: PayloadInfo) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    for title in ("dtype", "shape", "mask", "values"):
        table.add_column(title, no_wrap=True)
    for title in ("elements", "kept", "density", "mask B", "value B"):
        table.add_column(title, justify="right", no_wrap=True)
    for record in info.records:
        table.add_row(*_record_cells(record))
    return table


def _record_cells(record: RecordInfo) -> list[Text]:
    # A name from a hostile payload may hold terminal control codes.
    name = record.name if record.name.isprintable() else repr(record.name)
    density = f"{record.k / record.n:.2%}" if record.n else "-"
    cells = [
        name,
        record.dtype,
        "x".join(map(str, record.shape)) or "scalar",
        record.mask_encoding,
        record.value_encoding,
        f"{record.n:,}",
        f"{record.k:,}",
        density,
        f"{record.mask_bytes:,}",
        f"{record.value_bytes:,}",
    ]
    return [Text(cell) for cell in cells]


def _totals(info: PayloadInfo) -> list[str]:
    major, minor = info.version
    base = "none" if info.base_digest is None else info.base_digest.hex()
    bits, density = ("-", "-")
    if info.n:
        bits, density = f"{info.bits_per_weight:.3f}", f"{info.density:.2%}"
    return [
        "",
        f"format {major}.{minor}, round {info.round}, base {base}",
        f"{info.payload_bytes:,} bytes = header {info.header_bytes:,} + masks {info.mask_bytes:,} "
        f"+ values {info.value_bytes:,} + padding {info.padding_bytes:,}",
        f"{len(info.records)} tensors, {info.k:,} of {info.n:,} elements kept, density {density}",
        f"{bits} bits per weight, {info.dense_ratio:.2f} times smaller than "
        f"{info.dense_bytes:,} bytes dense",
    ]
