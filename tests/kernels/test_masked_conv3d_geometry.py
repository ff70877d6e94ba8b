"""The layout of the CPU convolution: invariants for every vector width, and no byte beyond."""

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsekit.errors import BackendError
from sparsekit.kernels.masked_conv3d.geometry import Geometry, Grid, Shape, geometry
from sparsekit.kernels.masked_conv3d.plan import build
from tests.kernels.convolutions import CASES, Case, drawn

ROOT = Path(__file__).parents[2]
MACHINES = [(4, 16), (8, 16), (16, 32)]


def shape_of(case: Case) -> Shape:
    return Shape(
        case.c_in, case.c_out, case.grid, case.kernel, case.stride, case.padding, case.dilation,
        case.groups,
    )  # fmt: skip


def cells(grid: Grid) -> npt.NDArray[np.int64]:
    """A buffer of one sample in which -1 stands for zeros."""
    return np.full(grid.sample, -1, np.int64)


def source_of(layout: Geometry) -> npt.NDArray[np.int64]:
    """Number of the input voxel that stands at each place of the padded input."""
    shape, grid = layout.shape, layout.source
    found = cells(grid)
    strided = layout.classes != (1, 1, 1)
    out, steps = shape.out, shape.stride
    reach = [e * (k - 1) // s for e, k, s in zip(shape.dilation, shape.kernel, steps, strict=True)]
    for number, (c, *at) in enumerate(
        itertools.product(range(shape.c_in), *map(range, shape.size))
    ):
        padded = [a + p for a, p in zip(at, shape.padding, strict=True)]
        if strided:
            d, h, w = (a // s for a, s in zip(padded, steps, strict=True))
            if any(q >= o + r for q, o, r in zip((d, h, w), out, reach, strict=True)):
                continue
            rest = [a % s for a, s in zip(padded, steps, strict=True)]
            kind = (rest[0] * steps[1] + rest[1]) * steps[2] + rest[2]
            row = kind * shape.c_in + c
        else:
            (d, h, w), row = padded, c
        place = row * grid.channel + d * grid.plane + h * layout.pitch + w
        assert found[place] == -1
        found[place] = number
    return found


def check(layout: Geometry, lanes: int, registers: int) -> None:
    shape, out = layout.shape, layout.shape.out
    for tiling, planes in ((layout.forward, out[0]), (layout.backward, None)):
        assert tiling.rows * tiling.columns <= registers - 3
        assert tiling.planes % tiling.rows == 0
        assert planes is None or tiling.planes >= planes
    span = layout.forward.per_plane * layout.forward.columns * lanes
    assert span >= (out[1] - 1) * layout.pitch + out[2]
    assert layout.target.plane >= span
    assert layout.target.channel >= layout.target.plane * layout.forward.planes
    for grid in (layout.source, layout.gradient, layout.target):
        assert grid.sample % lanes == 0
        assert grid.plane % lanes == 0

    # Every tap of every output voxel lands on the voxel that it should read, or on zeros.
    source = source_of(layout)
    taps = list(itertools.product(*map(range, shape.kernel)))
    for t, tap in enumerate(taps):
        for z, y, x in itertools.product(*map(range, out)):
            place = layout.tap_classes[t] * shape.c_in * layout.source.channel
            place += layout.source_taps[t] + z * layout.source.plane + y * layout.pitch + x
            at = [
                s * o + e * k - p
                for s, o, e, k, p in zip(
                    shape.stride, (z, y, x), shape.dilation, tap, shape.padding, strict=True
                )
            ]
            inside = all(0 <= a < n for a, n in zip(at, shape.size, strict=True))
            wanted = (at[0] * shape.size[1] + at[1]) * shape.size[2] + at[2] if inside else -1
            assert source[place] == wanted
    # Whole tiles stay inside the buffers, from the last channel on.
    furthest = (layout.source.channels - 1) * layout.source.channel + max(layout.source_taps)
    assert (
        furthest + (layout.forward.planes - 1) * layout.source.plane + span <= layout.source.sample
    )
    back = layout.backward.per_plane * layout.backward.columns * lanes
    furthest = (layout.source.channels - 1) * layout.source.channel + layout.source.interior
    assert (
        furthest + (layout.backward.planes - 1) * layout.source.plane + back <= layout.source.sample
    )
    assert min(layout.gradient_taps) >= 0
    if not layout.resident:
        furthest = (shape.c_out - 1) * layout.gradient.channel + max(layout.gradient_taps)
        furthest += (layout.backward.planes - 1) * layout.gradient.plane + back
        assert furthest <= layout.gradient.sample


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case: Case, machine: tuple[int, int]) -> None:
    check(geometry(shape_of(case), *machine), *machine)


axis = st.tuples(
    st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(0, 4), st.integers(1, 3)
)  # size, kernel, stride, padding, dilation


@settings(drawn, max_examples=150)
@given(axes=st.tuples(axis, axis, axis), machine=st.sampled_from(MACHINES))
def test_drawn_shapes(axes: tuple[tuple[int, ...], ...], machine: tuple[int, int]) -> None:
    size, kernel, stride, padding, dilation = (
        (values[0], values[1], values[2]) for values in zip(*axes, strict=True)
    )
    shape = Shape(2, 3, size, kernel, stride, padding, dilation, 1)
    assume(min(shape.out) >= 1)
    check(geometry(shape, *machine), *machine)


def test_a_scan_too_large_for_the_offsets_is_refused() -> None:
    shape = Shape(1, 1, (2100, 1024, 1024), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1)
    with pytest.raises(BackendError, match="too large for the CPU kernels; use backend='ref"):
        build(torch.ones(1, 1, 1, 1, 1, dtype=torch.bool), geometry(shape, 16, 32), 1, 1)


def guarded(shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 memory, full of NaN, whose ends border on pages that nobody may touch."""
    count = int(np.prod(shape))
    page = mmap.PAGESIZE
    used = -(-4 * count // page) * page
    whole = mmap.mmap(-1, used + 2 * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    library = ctypes.CDLL(None, use_errno=True)
    for edge in (begin, begin + page + used):
        assert library.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    # At the end of the last page, but for the alignment that streaming stores need.
    start = page + used - -(-4 * count // 64) * 64
    block = np.frombuffer(whole, np.float32, count, start)
    block[:] = np.nan
    return torch.from_numpy(block.reshape(shape))


GUARDED = """
import sys, torch
sys.path.insert(0, {root!r})
from sparsekit.kernels import buffers
from sparsekit.ops import conv_norm_pool_relu, masked_conv3d
from tests.kernels.convolutions import CASES, Case, make_inputs, make_mask
from tests.kernels.test_masked_conv3d_geometry import guarded
buffers.empty = guarded
torch.set_num_threads(2)

def fenced(t):
    return guarded(tuple(t.shape)).copy_(t.detach()).requires_grad_()

more = [
    Case(1, 2, 3, (2, 3, 2), padding=(4, 3, 5)), Case(1, 3, 2, (40, 2, 3), padding=(1, 1, 1)),
    Case(2, 2, 3, (3, 20, 35), padding=(1, 1, 1)), Case(1, 9, 5, (4, 5, 6), padding=(1, 1, 1)),
    Case(1, 2, 2, (6, 6, 16), (1, 1, 1)), Case(1, 2, 2, (5, 9, 9), (5, 5, 5), padding=(2, 2, 2)),
]
cases = [p.values[0] for p in CASES if p.values[0].batch] + more
count = 0
for case in cases{some}:
    x, weight, bias = map(fenced, make_inputs(case, torch.float32))
    mask = make_mask(tuple(weight.shape), "half")
    found, wanted = [], []
    for results, backend in ((found, "cpu"), (wanted, "reference")):
        leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
        if backend == "cpu":
            leaves = [x, weight, bias]
        y = masked_conv3d(leaves[0], leaves[1], mask, leaves[2], backend=backend, **case.options)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results += [y, *torch.autograd.grad(y, leaves, fenced(g).to(y.dtype))]
        if min(case.out) >= 2 and backend == "cpu":
            y = conv_norm_pool_relu(x, weight, mask, bias, backend="cpu", **case.options)
            y.sum().backward()
            assert bool(torch.isfinite(y).all())
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    count += 1
print("fine", count)
"""


def run_script(script: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240,
        env=os.environ | environment, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stderr[-4000:]}"
    return result.stdout.strip()


def test_no_kernel_touches_memory_beyond_its_buffers() -> None:
    """A process of its own: it would not survive."""
    assert run_script(GUARDED.format(root=str(ROOT), some="")) == "fine 18"


def test_the_guard_is_one() -> None:
    script = (
        "from tests.kernels.test_masked_conv3d_geometry import guarded\nimport ctypes\n"
        "t = guarded((32,))\nctypes.string_at(t.data_ptr() + 124, {})\nprint('alive')"
    )
    assert run_script(script.format(4)) == "alive"
    with pytest.raises(AssertionError, match="exit code -11"):
        run_script(script.format(5))


NARROW = """
import llvmlite.binding as llvm
features = dict(llvm.get_host_cpu_features())
for name in features:
    if name.startswith("avx512") or ({lanes} == 4 and name.startswith(("avx", "fma", "f16c"))):
        features[name] = False
llvm.get_host_cpu_features = lambda: features
from sparsekit.kernels import vector
assert (vector.LANES, vector.REGISTERS) == ({lanes}, 16), vector.LANES
"""


@pytest.mark.parametrize(("lanes", "processor"), [(8, "haswell"), (4, "x86-64-v2")])
def test_narrower_vectors(lanes: int, processor: str, tmp_path: Path) -> None:
    """Machine code for processors without AVX-512 and without AVX, on this one."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("names x86 processors")
    script = NARROW.format(lanes=lanes) + GUARDED.format(root=str(ROOT), some="[1::2]")
    # The kernels' cache does not expect that a processor changes its width.
    found = run_script(
        script, NUMBA_CACHE_DIR=str(tmp_path), NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=""
    )
    assert found == "fine 9"
