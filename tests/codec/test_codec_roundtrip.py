"""What goes into a payload comes out of it: exact bits, exact masks, same bytes each time."""

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsekit import codec
from sparsekit.codec.core import Values
from tests.codec.memory import peak_bytes

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)


def integers(tensor: Tensor) -> Tensor:
    """Bit patterns of a tensor as signed integers of the same width."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(getattr(torch, f"int{8 * tensor.element_size()}"))


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(integers(left), integers(right))
    )


def positive_zeros(tensor: Tensor) -> Tensor:
    """Copy with +0.0 for -0.0 and all other bits as they are."""
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern of the dtype: NaN payloads, infinities, denormals and -0.0 too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.bool)
    size = torch.empty(0, dtype=dtype).element_size()
    n = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (n * size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def kept(shape: tuple[int, ...], density: str, seed: int) -> Tensor:
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    n = mask.numel()
    count = {"none": 0, "one": min(1, n), "half": n // 2, "tenth": n // 10, "all": n}[density]
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return mask.reshape(shape)


shapes = st.one_of(
    st.sampled_from(
        [(), (1,), (0,), (3, 0, 2), (1, 1, 1, 1, 1), (17, 13), (7, 5, 3, 3, 3), (2, 0)]
    ),
    st.lists(st.integers(0, 9), max_size=5).map(tuple),
)
densities = st.sampled_from(["none", "one", "tenth", "half", "all"])
seeds = st.integers(0, 2**31)


@given(shape=shapes, dtype=st.sampled_from(DTYPES), density=densities, seed=seeds)
@settings(max_examples=400, deadline=None)
def test_any_bits_under_any_mask_come_back(
    shape: tuple[int, ...], dtype: torch.dtype, density: str, seed: int
) -> None:
    mask = kept(shape, density, seed)
    bits = random_bits(shape, dtype, seed)
    tensor = torch.where(mask, bits, torch.zeros_like(bits))

    payload = codec.encode({"w": tensor}, masks={"w": mask})

    assert same_bits(codec.decode(payload)["w"], positive_zeros(tensor))
    assert same_bits(codec.decode_masks(payload)["w"], mask)
    assert codec.encode({"w": tensor}, masks={"w": mask}) == payload


@given(shape=shapes, dtype=st.sampled_from(DTYPES), density=densities, seed=seeds)
@settings(max_examples=400, deadline=None)
def test_any_bits_without_a_mask_come_back(
    shape: tuple[int, ...], dtype: torch.dtype, density: str, seed: int
) -> None:
    bits = random_bits(shape, dtype, seed)
    tensor = torch.where(kept(shape, density, seed), bits, torch.zeros_like(bits))

    payload = codec.encode({"w": tensor})

    assert same_bits(codec.decode(payload)["w"], positive_zeros(tensor))
    record = codec.inspect(payload).records[0]
    mask = codec.decode_masks(payload)["w"]
    assert same_bits(mask, torch.ones_like(mask) if record.k == record.n else tensor != 0)


@given(
    shape=shapes.filter(lambda shape: len(shape) >= 2),
    encoding=st.sampled_from(["bitmap", "rice", "csr", "same"]),
    dtype=st.sampled_from(DTYPES),
    density=densities,
    seed=seeds,
)
@settings(max_examples=300, deadline=None)
def test_every_mask_encoding_carries_every_mask(
    shape: tuple[int, ...],
    encoding: Literal["bitmap", "rice", "csr", "same"],
    dtype: torch.dtype,
    density: str,
    seed: int,
) -> None:
    mask = kept(shape, density, seed)
    tensor = random_bits(shape, dtype, seed) & mask if dtype == torch.bool else mask.to(dtype)
    base = {"other": torch.ones(2), "w": -mask.float()}

    payload = codec.encode(
        {"w": tensor}, masks={"w": mask}, base=base, mask_encoding=encoding, round=3
    )

    assert same_bits(codec.decode(payload, base=base)["w"], tensor)
    assert same_bits(codec.decode_masks(payload, base=base)["w"], mask)
    partial = 0 < int(mask.sum()) < mask.numel()
    got = codec.inspect(payload).records[0].mask_encoding
    assert got == (
        encoding if partial else "all-zero" if mask.numel() and not mask.any() else "dense"
    )


@pytest.mark.parametrize("columns", [1, 2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("rows", [1, 5])
def test_csr_holds_the_last_column(rows: int, columns: int) -> None:
    tensor = torch.zeros(rows, columns)
    tensor[:, -1] = 2.0
    tensor[0, -1] = 0.0
    payload = codec.encode({"w": tensor}, mask_encoding="csr")
    assert same_bits(codec.decode(payload)["w"], tensor)


@pytest.mark.parametrize("encoding", ["bitmap", "rice", "csr", "same"])
@pytest.mark.parametrize("density", [0.005, 0.05, 0.3, 0.95])
def test_tensors_of_many_chunks_come_back(
    encoding: Literal["bitmap", "rice", "csr", "same"], density: float
) -> None:
    shape = (37, 4001)  # more rows times columns than any chunk, and no multiple of one
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < density
    tensor = torch.where(mask, random_bits(shape, torch.float32, 6), 0.0)
    payload = codec.encode(
        {"w": tensor}, masks={"w": mask}, base={"w": mask}, mask_encoding=encoding
    )
    assert same_bits(codec.decode(payload, base={"w": mask})["w"], positive_zeros(tensor))
    assert torch.equal(codec.decode_masks(payload, base={"w": mask})["w"], mask)


def test_csr_of_more_rows_than_a_chunk() -> None:
    tensor = torch.zeros(50_001, 3)
    tensor[::1000, 1] = 1.0
    tensor[-1] = 2.0
    payload = codec.encode({"w": tensor}, mask_encoding="csr")
    assert same_bits(codec.decode(payload)["w"], tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_negative_zero_becomes_positive_and_costs_nothing(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[-0.0, 1.0, -0.0, -2.0, 0.0, -0.0, -0.0, -0.0] * 3], dtype=dtype)
    mask = torch.ones_like(tensor, dtype=torch.bool)
    mask[0, 0] = False
    plain = positive_zeros(tensor)
    for given_masks in (None, {"w": mask}):
        payload = codec.encode({"w": tensor}, masks=given_masks)
        assert same_bits(codec.decode(payload)["w"], plain)
        assert payload == codec.encode({"w": plain}, masks=given_masks)
    dense = codec.encode({"w": tensor}, mask_encoding="dense")
    assert same_bits(codec.decode(dense)["w"], plain)


def test_a_kept_weight_may_be_zero() -> None:
    mask = torch.tensor([[True, True, False, False]])
    payload = codec.encode({"w": torch.tensor([[0.0, 3.0, 0.0, -0.0]])}, masks={"w": mask})
    assert torch.equal(codec.decode_masks(payload)["w"], mask)
    assert codec.inspect(payload).k == 2


def test_denormals_survive_flush_to_zero() -> None:
    tensor = torch.zeros(4, 64)
    tensor[1, 2] = 1e-42
    try:
        torch.set_flush_denormal(True)
        payload = codec.encode({"w": tensor})
        state = codec.decode(payload)
    finally:
        torch.set_flush_denormal(False)
    assert codec.inspect(payload).k == 1
    assert same_bits(state["w"], tensor)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.transpose(0, 1), id="transposed"),
        pytest.param(lambda t: t[::2, 1::3], id="strided"),
        pytest.param(lambda t: t[:1].expand(5, -1), id="expanded"),
        pytest.param(lambda t: t.flip(0), id="flipped"),
        pytest.param(lambda t: torch.nn.Parameter(t), id="parameter"),
        pytest.param(lambda t: t[3], id="row"),
        pytest.param(lambda t: torch.complex(t, t).conj().imag, id="lazily-negated"),
    ],
)
def test_memory_layout_leaves_no_trace(view: Callable[[Tensor], Tensor]) -> None:
    tensor = view(torch.arange(63.0).reshape(7, 9) % 5)
    payload = codec.encode({"w": tensor})
    assert payload == codec.encode({"w": tensor.detach().clone().contiguous()})
    assert same_bits(codec.decode(payload)["w"], positive_zeros(tensor.detach()))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_decoded_tensors_own_their_memory(
    kind: type[bytes] | type[bytearray] | type[memoryview],
) -> None:
    state = {str(dtype): (torch.arange(40).reshape(4, 10) % 3).to(dtype) for dtype in DTYPES} | {
        "sparse": torch.eye(30),
        "scalar": torch.tensor(3.0),
    }
    payload = bytearray(codec.encode(state))
    decoded = codec.decode(kind(payload))
    payload[:] = bytes(len(payload))
    for name, tensor in decoded.items():
        assert same_bits(tensor, state[name])
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        tensor.zero_()
    assert len({tensor.data_ptr() for tensor in decoded.values()}) == len(decoded)


def test_a_memoryview_with_gaps_is_read() -> None:
    payload = codec.encode({"w": torch.eye(3)})
    doubled = bytearray(2 * len(payload))
    doubled[::2] = payload
    assert torch.equal(codec.decode(memoryview(doubled)[::2])["w"], torch.eye(3))


def test_levels_differ_in_bytes_and_not_in_values() -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(60, 60, generator=random)
    state = {"w": torch.where(weight.abs() > 1, weight, 0.0), "b": torch.ones(3)}
    fast, balanced, small = (
        codec.encode(state, level="fast"),
        codec.encode(state, level="balanced"),
        codec.encode(state, level="small"),
    )
    assert len(balanced) < len(fast)
    assert len(small) < len(balanced)
    assert codec.inspect(fast).version == (1, 0)
    assert codec.inspect(balanced).version == (1, 1)
    assert codec.inspect(small).version == (1, 2)
    for payload in (fast, balanced, small):
        assert torch.equal(codec.decode(payload)["w"], state["w"])


@pytest.mark.parametrize(
    ("tensor", "encoding"),
    [
        pytest.param(torch.ones(4, 5), "dense", id="no-zero"),
        pytest.param(torch.zeros(4, 5), "all-zero", id="only-zeros"),
        pytest.param((torch.arange(64) % 4 == 0).float().reshape(8, 8), "bitmap", id="quarter"),
        pytest.param((torch.arange(4096) == 9).float().reshape(2, -1), "rice", id="one"),
        pytest.param((torch.arange(64) > 0).float().reshape(8, 8), "rice", id="one-zero"),
        pytest.param((torch.arange(320) > 31).to(torch.int16), "rice", id="int16-tenth-zero"),
        pytest.param((torch.arange(64) % 4 == 0).reshape(8, 8), "dense", id="bool"),
        pytest.param((torch.arange(4096) == 9).reshape(2, -1), "rice", id="bool-one"),
    ],
)
def test_the_smallest_encoding_is_chosen(tensor: Tensor, encoding: str) -> None:
    payload = codec.encode({"w": tensor})
    assert codec.inspect(payload).records[0].mask_encoding == encoding
    masked = codec.encode({"w": tensor}, masks={"w": tensor != 0})
    assert torch.equal(codec.decode_masks(masked)["w"], tensor != 0)


def test_a_mask_equal_to_the_base_costs_nothing() -> None:
    mask = torch.rand(64, 27, generator=torch.Generator().manual_seed(1)) < 0.1
    base = {"w": mask * 3.0, "b": torch.ones(64)}
    state = {"w": mask * 0.25, "b": torch.zeros(64)}
    payload = codec.encode(state, masks={"w": mask}, base=base)
    info = codec.inspect(payload)
    assert [r.mask_encoding for r in info.records] == ["same", "all-zero"]
    assert info.mask_bytes == 0
    assert info.base_digest == codec.base_digest(base)
    mask[0, 0] = ~mask[0, 0]
    moved = codec.encode({"w": mask * 0.25}, masks={"w": mask}, base=base, level="fast")
    assert codec.inspect(moved).base_digest is None
    assert torch.equal(codec.decode(moved)["w"], mask * 0.25)


def test_base_digest_depends_on_content_alone() -> None:
    left = {"a": torch.tensor([0.0, 1.0]), "b": torch.arange(6).reshape(2, 3)}
    right = {"b": left["b"].T.contiguous().T, "a": torch.tensor([-0.0, 1.0])}
    assert codec.base_digest(left) == codec.base_digest(right)
    assert codec.base_digest(codec.decode(codec.encode(left))) == codec.base_digest(left)
    others: list[dict[str, Tensor]] = [
        {},
        {"a": left["a"]},
        {**left, "a": torch.tensor([1.0, 0.0])},
        {**left, "a": torch.tensor([[0.0, 1.0]])},
        {**left, "a": left["a"].view(torch.int32)},
        {"a": left["b"], "b": left["a"]},
    ]
    digests = {codec.base_digest(state) for state in [left, *others]}
    assert len(digests) == 1 + len(others)
    assert all(len(digest) == 16 for digest in digests)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("values", ["lossless", "bf16", "fp16"])
def test_decoding_compressed_values_takes_little_beside_them(values: Values, kept: float) -> None:
    random = torch.Generator().manual_seed(3)
    mask = torch.rand(2_000_000, generator=random) < kept
    tensor = torch.randn(2_000_000, generator=random) * mask
    payload = codec.encode({"w": tensor}, masks={"w": mask}, values=values, level="balanced")
    peak = peak_bytes(lambda: codec.decode(payload))
    assert 4 * tensor.numel() <= peak < 4 * tensor.numel() + 2**20


def test_any_byte_but_0_is_true() -> None:
    odd = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    clean = torch.tensor([False, True, True, True])
    payload = codec.encode({"flags": odd})
    assert payload == codec.encode({"flags": clean})
    assert codec.decode(payload)["flags"].view(torch.uint8).tolist() == [0, 1, 1, 1]
    weights = {"w": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    assert codec.encode(weights, masks={"w": odd}) == codec.encode(weights, masks={"w": clean})


@pytest.mark.parametrize("encoding", ["bitmap", "csr"])
def test_decoding_takes_little_beside_its_result(encoding: Literal["bitmap", "csr"]) -> None:
    tensor = torch.zeros(64 * 20_000)
    tensor[::7] = 1.0
    payload = codec.encode({"w": tensor.reshape(64, -1)}, mask_encoding=encoding)
    peak = peak_bytes(lambda: codec.decode(payload))
    assert 4 * tensor.numel() <= peak < 4 * tensor.numel() + 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_tensors_are_copied_to_the_cpu() -> None:
    state = {"w": torch.eye(9), "b": torch.ones(3).bfloat16()}
    on_gpu = {name: tensor.cuda() for name, tensor in state.items()}
    payload = codec.encode(on_gpu, masks={"w": on_gpu["w"] != 0}, base=on_gpu)
    assert payload == codec.encode(state, masks={"w": state["w"] != 0}, base=state)
    assert codec.base_digest(on_gpu) == codec.base_digest(state)
    assert codec.decode(payload, base=on_gpu, template=on_gpu)["w"].device.type == "cpu"
