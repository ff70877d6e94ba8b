"""The CPU backend on sizes where it samples, and on inputs made to defeat the sample."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekit.errors import ArgumentError
from sparsekit.kernels.topk_mask import cpu, passes
from sparsekit.ops import topk_mask

N = 200_003  # more than two threads' least, odd, and no multiple of a part


def randn(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def rand(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def blocks(scales: list[float]) -> Tensor:
    """Stretches of very different size, each far longer than a sampled cluster."""
    return torch.cat([randn(N // len(scales), i) * s for i, s in enumerate(scales)])


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: randn(N),
    "uniform": lambda: rand(N),
    "all-equal": lambda: torch.full((N,), -1.5),
    "zeros": lambda: torch.zeros(N),
    "two-values": lambda: (rand(N) < 0.3).float(),
    "rounded": lambda: (randn(N) * 16).round() / 16,
    "mostly-zero": lambda: randn(N) * (rand(N, 2) < 0.1),
    "sorted": lambda: randn(N).sort().values,
    "sorted-down": lambda: randn(N).abs().sort(descending=True).values,
    "blocks": lambda: blocks([1e-3, 1.0, 30.0, 1e-6, 0.1]),
    "one-large": lambda: torch.cat([torch.full((N - 1,), 1e-3), torch.tensor([1e30])]),
    "heavy-tailed": lambda: 1 / rand(N).clamp_min(1e-6),
    "all-exponents": lambda: torch.exp2(rand(N) * 250 - 125),
    "infinite": lambda: torch.where(rand(N) < 0.5, torch.inf, randn(N)),
    "subnormal": lambda: rand(N) * 1e-39,
    # Every 64th value is large: a sample in step with them would see all or none.
    "periodic": lambda: torch.where(torch.arange(N) % 64 == 0, 10.0, 1.0) * randn(N).abs(),
}


def same_as_reference(tensors: list[Tensor], keep: int, within: list[Tensor] | None = None) -> None:
    found = topk_mask(tensors, keep, within=within, backend="cpu")
    expected = topk_mask(tensors, keep, within=within, backend="reference")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bool
        assert torch.equal(a, b)


def split(values: Tensor) -> list[Tensor]:
    """Several tensors, with short, empty and 0-d ones between them."""
    n = values.numel()
    sizes = [3, n // 3, 0, 1, 17, 64, 65]
    parts = list(values.split([*sizes, n - sum(sizes)]))
    parts[3] = parts[3].reshape(())
    return parts


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.01, 0.05, 0.2, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_equals_the_reference(name: str, share: float) -> None:
    values = DISTRIBUTIONS[name]()
    same_as_reference(split(values), int(share * values.numel()))


@pytest.mark.parametrize("name", ["normal", "two-values", "mostly-zero", "blocks", "sorted"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_stays_within(name: str, share: float) -> None:
    tensors = split(DISTRIBUTIONS[name]())
    within = [rand(t.numel(), 7).reshape(t.shape) < 0.4 for t in tensors]
    alive = sum(int(m.sum()) for m in within)
    same_as_reference(tensors, int(share * alive), within)


def test_keeping_all_that_is_not_zero() -> None:
    # What a run does each round once its sparsity stands still.
    values = DISTRIBUTIONS["mostly-zero"]()
    for keep in (int(values.count_nonzero()) + d for d in (-1, 0, 1)):
        same_as_reference(split(values), keep)


@pytest.fixture
def passes_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    made = []
    compare = cpu._Selection._compare

    def count(self: Any, lowest: int, highest: int) -> tuple[int, int]:
        made.append((lowest, highest))
        return compare(self, lowest, highest)

    monkeypatch.setattr(cpu._Selection, "_compare", count)
    return made


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_one_pass_is_the_rule(passes_made: list[Any], share: float) -> None:
    for seed in range(8):
        topk_mask([randn(N, seed)], int(share * N), backend="cpu")
    assert len(passes_made) <= 9


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_misleading_sample_costs_a_bounded_number_of_passes(
    monkeypatch: pytest.MonkeyPatch, passes_made: list[Any], name: str
) -> None:
    monkeypatch.setattr(cpu._Selection, "_sample", lambda _: torch.full((99, 16), 7).int().numpy())
    monkeypatch.setattr(cpu, "_FEW_ENTRIES", 1000)
    values = DISTRIBUTIONS[name]()
    for share in (0.001, 0.3, 0.999):
        passes_made.clear()
        same_as_reference([values], int(share * N))
        assert len(passes_made) <= cpu._SAMPLED_TRIES + 32


def test_neighbours_that_are_alike_widen_the_bracket(passes_made: list[Any]) -> None:
    values = randn(N // 16).repeat_interleave(16) + 1e-4 * randn(N // 16 * 16, 2)
    for share in (0.05, 0.2):
        passes_made.clear()
        same_as_reference([values], int(share * N))
        assert len(passes_made) <= 2


@pytest.mark.parametrize("place", [0, 63, 64, passes.PART - 1, passes.PART, N - 1])
def test_nan_is_named_wherever_it_stands(place: int) -> None:
    values = randn(N)
    values[place] = float("nan")
    state = {"first": randn(70), "second": values, "third": values}
    outside = {name: torch.zeros(t.shape, dtype=torch.bool) for name, t in state.items()}
    for keep, within in ((0, None), (5, None), (N, None), (0, outside)):
        with pytest.raises(ArgumentError, match="'second' holds NaN"):
            topk_mask(state, keep, within=within, backend="cpu")


def test_dtypes_and_memory_orders_mix() -> None:
    wide = randn(N * 2)
    tensors = [
        wide[::2],
        randn(90_000, 3).half(),
        randn(90_000, 4).bfloat16().reshape(300, 300).T,
        randn(100_001, 5)[1:],
        randn(8, 6).expand(40, 8),
    ]
    total = sum(t.numel() for t in tensors)
    within = [(rand(t.numel(), 9) < 0.7).reshape(t.shape) for t in tensors]
    within[2] = within[2].T.contiguous().T
    for keep in (total // 20, total // 2):
        same_as_reference(tensors, keep)
        same_as_reference(tensors, keep, within)


def test_masks_above_the_size_of_huge_pages() -> None:
    values = randn(cpu._LARGE_BYTES + 12_345)
    same_as_reference([values], values.numel() // 20)


def test_the_number_of_threads_changes_no_bit(torch_threads: Callable[[int], None]) -> None:
    tensors = split(DISTRIBUTIONS["rounded"]())
    for threads in (1, 2, 5):
        torch_threads(threads)
        same_as_reference(tensors, N // 10)


@pytest.mark.parametrize("processor", ["generic", "haswell"])
def test_other_processors(processor: str) -> None:
    if os.uname().machine != "x86_64" and processor != "generic":
        pytest.skip("names a processor of another architecture")
    code = """
import torch
from sparsekit.kernels.topk_mask import passes
from sparsekit.ops import topk_mask
random = torch.Generator().manual_seed(1)
for n in (1, 63, 64, 200, 70_001, 200_003):
    values = torch.randn(n, generator=random)
    for x in (values, values.round()):
        within = [torch.rand(n, generator=random) < 0.5]
        for keep in {0, n // 9, int(within[0].sum())}:
            for w in (None, within):
                a, b = (topk_mask([x], keep, within=w, backend=c) for c in ("cpu", "reference"))
                assert torch.equal(a[0], b[0])
assert "zmm" not in passes.bracket._compile()._library.get_asm_str()
print("same")
"""
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "same", done.stderr
