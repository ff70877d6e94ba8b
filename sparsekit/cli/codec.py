"""``sparsekit codec``: look into payloads, and convert state files to payloads and back."""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from sparsekit import codec
from sparsekit.cli.states import Shown, open_state, progress, safetensors
from sparsekit.codec import PayloadInfo, RecordInfo
from sparsekit.codec.interop import from_torch_prune
from sparsekit.codec.records import quote
from sparsekit.errors import ArgumentError, UsageError

app = typer.Typer(no_args_is_help=True, help="Inspect, write and read payloads of sparse states.")

_MOST_NAME_BYTES = 2**16 - 1
_SAFETENSORS_HEADER = "__metadata__"
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
        typer.Option(
            help="auto | dense | bitmap | rice | csr | same | subset | predicted | ranked"
        ),
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
    held = None if base is None else dict(open_state(base))
    state: Mapping[str, Tensor] = open_state(source)
    masks: dict[str, Tensor] = {}
    if any(name.endswith("_orig") for name in state):
        state, masks = from_torch_prune(state)
    shown = Shown(state, source.stat().st_size)

    def write(file: IO[bytes]) -> int:
        return codec.encode_to(
            file,
            shown,
            masks=masks or None,
            base=held,
            mask_encoding=mask_encoding,  # type: ignore[arg-type]  # it checks all three
            level=level,  # type: ignore[arg-type]
            values=values,  # type: ignore[arg-type]
            round=round_,
        )

    _write_whole(target, write, force)
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{target}: {target.stat().st_size:,} bytes for {shown.seen_bytes:,} bytes of tensors",
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
    held = None if base is None else dict(open_state(base))
    with source.open("rb") as payload:
        tensors = codec.decode_from(payload, base=held, max_bytes=max_bytes)
        shown = progress(tensors, source.stat().st_size)
        if target.suffix == ".npz":
            _write_whole(target, lambda file: _write_npz(file, shown), force)
        else:
            state = dict(shown)
            if _SAFETENSORS_HEADER in state:
                raise ArgumentError(
                    f"OUT: a .safetensors file cannot hold a tensor named {_SAFETENSORS_HEADER!r}"
                )
            data = safetensors().save(state)
            _write_whole(target, lambda file: file.write(data), force)


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


def _write_npz(file: IO[bytes], tensors: Iterable[tuple[str, Tensor]]) -> None:
    # Not np.savez: it takes the names as keyword arguments and so forbids one called "file".
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors:
            if len(f"{name}.npy".encode()) > _MOST_NAME_BYTES:
                raise ArgumentError(f"OUT: {quote(name)} is too long a name for an .npz file")
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
