"""States from and for other libraries, and payloads on a machine without torch."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import binsparse
import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.nn.utils import prune

from sparsekit import codec
from sparsekit.codec import interop
from sparsekit.codec.arrays import decode_arrays
from sparsekit.errors import (
    ArgumentError,
    ArgumentTypeError,
    BaseMismatchError,
    BudgetError,
    MissingExtraError,
)
from tests.codec.test_codec_golden import CONTENTS, base_of, expected_state, read

ROOT = Path(__file__).parents[2]
SHAPES = [(), (7,), (3, 5), (4, 3, 1, 2), (2, 3, 2, 1, 5), (0, 4), (1, 1), (3, 0)]
DTYPES = [torch.float32, torch.float64, torch.int8, torch.int64, torch.bool]


def sparse_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(len(shape))
    mask = torch.rand(shape, generator=random) < 0.4
    values = torch.randint(-3, 4, shape, generator=random)
    # Some kept elements are 0.
    return (values * mask).to(dtype), mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scipy_arrays_keep_values_and_masks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, mask = sparse_tensor(shape, dtype)
    matrix = interop.to_scipy(tensor, mask)
    assert matrix.has_sorted_indices
    assert matrix.nnz == int(mask.sum())
    again, kept = interop.from_scipy(matrix, shape)
    assert again.dtype == dtype
    assert torch.equal(again, tensor)
    assert torch.equal(kept, mask)
    dense: Any = matrix.toarray()
    assert np.array_equal(dense.reshape(-1), tensor.reshape(-1).numpy())
    assert interop.to_scipy(tensor).nnz == int((tensor != 0).sum())


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "dok", "lil"])
def test_scipy_arrays_of_any_format_are_read(form: str) -> None:
    tensor, _ = sparse_tensor((9, 14), torch.float32)
    matrix = scipy.sparse.csr_array(tensor.numpy()).asformat(form)
    again, kept = interop.from_scipy(matrix)
    assert torch.equal(again, tensor)
    assert torch.equal(kept, tensor != 0)


def test_duplicates_are_added_up() -> None:
    matrix = scipy.sparse.coo_array(([1.0, 2.0, 4.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    again, kept = interop.from_scipy(matrix)
    assert again.tolist() == [[0.0, 3.0], [4.0, 0.0]]
    assert int(kept.sum()) == 2
    assert matrix.nnz == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_binsparse_files_keep_values_and_masks(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor, mask = sparse_tensor(shape, torch.float32)
    binsparse.save_binsparse(interop.to_binsparse(tensor, mask), tmp_path / "w.npz")
    again, kept = interop.from_binsparse(binsparse.load_binsparse(tmp_path / "w.npz"), shape)
    assert torch.equal(again, tensor)
    assert torch.equal(kept, mask)


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_binsparse_matrices_by_others_are_read(form: str, tmp_path: Path) -> None:
    tensor, mask = sparse_tensor((9, 14), torch.float32)
    from binsparse.conversions.scipy import from_scipy

    matrix = interop.to_scipy(tensor, mask).asformat(form)
    binsparse.save_binsparse(from_scipy(matrix), tmp_path / "w.npz")
    again, kept = interop.from_binsparse(binsparse.load_binsparse(tmp_path / "w.npz"))
    assert torch.equal(again, tensor)
    assert torch.equal(kept, mask)


def test_what_others_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, mask = sparse_tensor((3, 4), torch.float32)
    for function in (interop.to_scipy, interop.to_binsparse):
        with pytest.raises(ArgumentTypeError, match=r"pass tensor.float\(\)"):
            function(tensor.bfloat16())
        with pytest.raises(ArgumentTypeError, match=r"expected torch.bool"):
            function(tensor, mask.float())
        with pytest.raises(ArgumentError, match=r"expected shape \(3, 4\), got \(4, 3\)"):
            function(tensor, mask.T)
        with pytest.raises(ArgumentError, match="non-zero values outside"):
            function(torch.ones(3, 4), mask)
    with pytest.raises(ArgumentError, match="expected 12 elements"):
        interop.from_scipy(interop.to_scipy(tensor), (3, 5))
    with pytest.raises(ArgumentTypeError, match="expected a SciPy sparse array, got ndarray"):
        interop.from_scipy(tensor.numpy())
    with pytest.raises(ArgumentTypeError, match="expected a sparse binsparse tensor"):
        interop.from_binsparse(3)
    monkeypatch.setitem(sys.modules, "binsparse", None)
    with pytest.raises(MissingExtraError, match="interop"):
        interop.to_binsparse(tensor)


def test_modules_pruned_by_torch_travel() -> None:
    def network() -> torch.nn.Sequential:
        layers = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3), torch.nn.Linear(5, 5))
        prune.random_unstructured(layers[0], "weight", amount=0.8)
        prune.ln_structured(layers[1], "weight", amount=0.4, n=2, dim=0)
        return layers

    source, target = network(), network()
    state, masks = interop.from_torch_prune(source.state_dict())
    assert set(state) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert torch.equal(state["0.weight"], source.get_parameter("0.weight_orig") * masks["0.weight"])
    payload = codec.encode(state, masks=masks)
    received, kept = codec.decode(payload), codec.decode_masks(payload)
    target.load_state_dict(interop.to_torch_prune(received, {name: kept[name] for name in masks}))
    x = torch.randn(1, 2, 7, 7, 7)
    assert torch.equal(target(x), source(x))


def test_names_that_only_look_pruned_stay() -> None:
    state = {"a_orig": torch.ones(2), "b_mask": torch.zeros(2), "c": torch.ones(1)}
    assert interop.from_torch_prune(state) == (state, {})
    with pytest.raises(ArgumentError, match=r"expected 'a_mask' of shape \(2,\)"):
        interop.from_torch_prune(state | {"a_mask": torch.ones(3)})


@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_arrays_are_those_of_the_tensors(name: str) -> None:
    base = base_of(name)
    arrays = None
    if base is not None:
        if any(tensor.dtype == torch.bfloat16 for tensor in base.values()):
            with pytest.raises(BaseMismatchError, match="expected the state"):
                decode_arrays(read(name), base={n: t.float().numpy() for n, t in base.items()})
            return
        arrays = {n: t.numpy() for n, t in base.items()}
    found = decode_arrays(read(name), base=arrays)
    for key, tensor in expected_state(name).items():
        exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert found[key].dtype == exact.numpy().dtype
        assert found[key].tobytes() == exact.numpy().tobytes()
        assert found[key].shape == tuple(tensor.shape)


def test_arrays_are_refused_as_tensors_are() -> None:
    payload = codec.encode({"w": torch.ones(100), "b": torch.ones(10).bfloat16()})
    assert decode_arrays(payload, max_bytes=460)["w"].size == 100
    with pytest.raises(BudgetError, match="460 bytes, the limit is 459"):
        decode_arrays(payload, max_bytes=459)
    spread = memoryview(bytes(byte for pair in zip(payload, payload, strict=True) for byte in pair))
    assert decode_arrays(spread[::2])["w"].size == 100
    with pytest.raises(ArgumentTypeError, match="payload: expected bytes"):
        decode_arrays("payload")  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="expected 'w' as an array of one of"):
        decode_arrays(read("same"), base={"w": np.ones(3, np.complex64)})


def test_payloads_are_read_without_torch(tmp_path: Path) -> None:
    code = """
    import sys
    sys.modules["torch"] = None
    from sparsekit.codec.arrays import decode_arrays
    for path in sys.argv[1:]:
        for name, array in decode_arrays(open(path, "rb").read()).items():
            print(name, array.dtype, array.tobytes().hex()[:2000])
    assert "numba" not in sys.modules
    """
    paths = [ROOT / f"tests/golden/{n}.spu" for n in ("example", "split", "rice", "int4-alone")]
    large = codec.encode({"w": torch.randn(400_000) * (torch.rand(400_000) < 0.1)}, level="fast")
    (tmp_path / "large.spu").write_bytes(large)
    paths.append(tmp_path / "large.spu")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, paths)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stderr == ""
    wanted = [
        f"{name} {array.dtype} {array.tobytes().hex()[:2000]}"
        for path in paths
        for name, array in decode_arrays(path.read_bytes()).items()
    ]
    assert done.stdout.splitlines() == wanted
