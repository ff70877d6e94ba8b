"""Where the tests of Triton kernels run: on a GPU, in Triton's interpreter, or in ttsem.

`make check-kernels` runs this folder in the interpreter and in ttsem, which executes what Triton
compiles a kernel to and stops at accesses out of bounds and at races.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.kernels import triton_device

SANITIZED = "ttsem.sanitize" in sys.modules or "ttsem" in sys.modules


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the folder out of a run that has no place for the kernels."""
    del collection_path
    runs = SANITIZED or triton_device.interpreted() or torch.cuda.is_available()
    return None if runs else True


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the tensors that kernels are given."""
    return "cuda" if SANITIZED or not triton_device.interpreted() else "cpu"


@pytest.fixture(scope="session")
def sanitized() -> bool:
    """Whether bfloat16 and tf32 are computed as a GPU does: the interpreter gets both wrong."""
    return SANITIZED


@pytest.fixture(autouse=True)
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say that no CUDA graph is recorded: ttsem's device does not answer that."""
    if SANITIZED:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN or a large number: unwritten output is seen."""
    plain: Callable[..., Tensor] = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        made = plain(*arguments, **options)
        if made.is_floating_point():
            return made.fill_(float("nan"))
        return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
