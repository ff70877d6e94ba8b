"""Memory of encoding one large tensor: a few bytes for each of its elements, whatever the codes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit import codec
from tests.codec.memory import peak_bytes

N = 1 << 20
# Chunks, and what zstd's frames may need at most.
SLACK = 1 << 20


def tensors() -> tuple[Tensor, Tensor]:
    """A base of which few elements are zero, and what became of it."""
    dice = torch.Generator().manual_seed(0)
    base = torch.randn(N, generator=dice) * (torch.rand(N, generator=dice) < 0.99)
    return base, base * (1 + 0.03 * torch.randn(N, generator=dice))


@pytest.mark.parametrize("values", ["lossless", "bf16", "int8", "int4"])
@pytest.mark.parametrize("mask", ["dense", "same", "purged", "beyond", "ninety"])
@pytest.mark.parametrize("based", [False, True])
def test_encoding_takes_twice_the_tensor(mask: str, values: Any, based: bool) -> None:
    base, state = tensors()
    match mask:
        case "dense":
            base, state = base + 3, state + 3
        case "purged":
            state *= base.abs() > 0.05
        case "beyond":
            state[base == 0] = 0.5
            state *= state.abs() > 0.05
        case "ninety":
            base *= base.abs() > 1.64
            state *= base != 0
    given = {"w": base} if based else None
    # Kernels are compiled or loaded before.
    codec.encode({"w": state[: 1 << 18]}, values=values)
    found: list[int] = []
    peak = peak_bytes(
        lambda: found.append(len(codec.encode({"w": state}, base=given, values=values)))
    )
    assert peak - found[0] < 2 * state.nbytes + SLACK, (peak - found[0]) / state.nbytes


@pytest.mark.parametrize("encoding", ["bitmap", "rice", "csr", "subset", "predicted", "ranked"])
def test_every_mask_is_written_within_it(encoding: Any) -> None:
    base, state = tensors()
    mask = base.abs() > 0.5
    state *= mask
    found: list[int] = []
    peak = peak_bytes(
        lambda: found.append(
            len(
                codec.encode(
                    {"w": state}, masks={"w": mask}, base={"w": base}, mask_encoding=encoding
                )
            )
        )
    )
    assert peak - found[0] < 2 * state.nbytes + SLACK, (peak - found[0]) / state.nbytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_other_types_keep_to_it(dtype: torch.dtype) -> None:
    base, state = (t.mul(20).to(dtype) for t in tensors())
    found: list[int] = []
    peak = peak_bytes(lambda: found.append(len(codec.encode({"w": state}, base={"w": base}))))
    # A bool for each element is as much as an int8.
    assert peak - found[0] < 2 * state.nbytes + N + SLACK, (peak - found[0]) / state.nbytes
