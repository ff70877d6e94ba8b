"""Fixtures of the kernel tests: poisoned memory, and comparison by the table of tolerances."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sparsekit.kernels import buffers
from tests.tolerances import TOLERANCES

Compare = Callable[[str, str, Tensor, npt.NDArray[np.float64]], None]


@pytest.fixture(scope="session")
def compare() -> Compare:
    """Assert that a result is within the tolerance of its op, dtype and direction."""

    def check(op: str, direction: str, result: Tensor, exact: npt.NDArray[np.float64]) -> None:
        got = result.detach().double().numpy()
        assert got.shape == exact.shape
        assert np.isfinite(got).all()
        if exact.size == 0:
            return
        limit = TOLERANCES[op, result.dtype, direction] * max(float(np.abs(exact).max()), 1e-30)
        worst = float(np.abs(got - exact).max())
        assert worst <= limit, f"{op} {direction}: error {worst:.3g} above {limit:.3g}"

    return check


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Set the number of torch's threads; it is put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised memory with NaN or large numbers, so that unwritten output is seen."""

    def poison(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            out = make(*args, **kwargs)
            if isinstance(out, Tensor):
                if out.is_floating_point():
                    out.detach().fill_(float("nan"))
                elif out.dtype != torch.bool:
                    out.fill_(torch.iinfo(out.dtype).max)
            elif out.dtype.kind == "f":
                out.fill(np.nan)
            elif out.dtype.kind in "iu":
                out.fill(np.iinfo(out.dtype).max)
            return out

        return made

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
        (np, "empty"),
        (np, "empty_like"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    # Buffers that are used again hold what an earlier call left there.
    take = buffers._take

    def poisoned_take(count: int) -> Any:
        slab, begin, end = take(count)
        slab.numbers[begin:end] = np.nan
        return slab, begin, end

    monkeypatch.setattr(buffers, "_take", poisoned_take)
