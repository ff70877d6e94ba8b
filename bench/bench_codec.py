"""Encode and decode a pruned BrainAgeCNN: sparsekit beside what people use otherwise.

``pytest bench/bench_codec.py`` prints one group per direction and sparsity. Inputs are in main
memory and caches as the rounds before left them (warm). The state is the paper's network with
heavy-tailed random weights (Student t, 5 degrees of freedom), pruned by global magnitude; 11.8 MB
dense. ``extra_info`` has the bytes of each payload, bits per weight and the versions. `memcpy`
copies the dense bytes: the yardstick for speed.
"""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from sparsekit import codec
from sparsekit.models import BrainAgeCNN

State = dict[str, Tensor]

SPARSITIES = (0.0, 0.5, 0.9, 0.95, 0.99)


@cache
def pruned_state(sparsity: float) -> State:
    """Weights of the paper's network, of which the given share is zero; biases stay."""
    generator = np.random.default_rng(1990)
    state = {
        name: torch.from_numpy(generator.standard_t(5, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in BrainAgeCNN().state_dict().items()
    }
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    sizes = torch.cat([weight.abs().reshape(-1) for weight in weights])
    cut = int(sparsity * sizes.numel())
    threshold = sizes.sort().values[cut]
    for weight in weights:
        weight[weight.abs() < threshold] = 0.0
    return state


def encode_torch(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def decode_torch(payload: bytes) -> State:
    loaded: State = torch.load(io.BytesIO(payload), weights_only=True)
    return loaded


def encode_savez(state: State) -> bytes:
    buffer = io.BytesIO()
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def decode_savez(payload: bytes) -> State:
    with np.load(io.BytesIO(payload)) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def encode_packbits(state: State) -> bytes:
    """Do it by hand: packed mask and kept values of each tensor, names and shapes left out."""
    parts = []
    for tensor in state.values():
        array = tensor.numpy().reshape(-1)
        keep = array != 0
        parts += [np.packbits(keep).tobytes(), array[keep].tobytes()]
    return b"".join(parts)


def packbits_decoder(like: State) -> Callable[[bytes], State]:
    """Return a decoder for `encode_packbits`, which needs names and shapes from elsewhere."""

    def decode(payload: bytes) -> State:
        state, at = {}, 0
        for name, tensor in like.items():
            n = tensor.numel()
            packed = np.frombuffer(payload, np.uint8, -(-n // 8), at)
            keep = np.unpackbits(packed, count=n).view(np.bool_)
            at += packed.size
            array = np.zeros(n, np.float32)
            values = np.frombuffer(payload[at : at + 4 * np.count_nonzero(keep)], np.float32)
            array[keep] = values
            at += 4 * values.size
            state[name] = torch.from_numpy(array.reshape(tuple(tensor.shape)))
        return state

    return decode


CODECS: dict[str, tuple[Callable[[State], bytes], Callable[[bytes], State] | None]] = {
    "sparsekit": (codec.encode, codec.decode),
    "sparsekit-bitmap": (lambda state: codec.encode(state, mask_encoding="bitmap"), codec.decode),
    "sparsekit-csr": (lambda state: codec.encode(state, mask_encoding="csr"), codec.decode),
    "torch.save": (encode_torch, decode_torch),
    "savez_compressed": (encode_savez, decode_savez),
    "packbits": (encode_packbits, None),
}


def note(benchmark: BenchmarkFixture, payload: bytes, state: State, sparsity: float) -> None:
    elements = sum(tensor.numel() for tensor in state.values())
    benchmark.extra_info.update(
        sparsity=sparsity,
        payload_bytes=len(payload),
        bits_per_weight=8 * len(payload) / elements,
        dense_bytes=4 * elements,
        device="cpu",
        torch=torch.__version__,
        numpy=np.__version__,
    )


def same(left: State, right: State) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_encode(benchmark: BenchmarkFixture, name: str, sparsity: float) -> None:
    state = pruned_state(sparsity)
    encode, decode = CODECS[name]
    benchmark.group = f"encode at {sparsity:.0%}"
    payload = benchmark(encode, state)
    note(benchmark, payload, state, sparsity)
    assert same((decode or packbits_decoder(state))(payload), state)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_decode(benchmark: BenchmarkFixture, name: str, sparsity: float) -> None:
    state = pruned_state(sparsity)
    encode, decode = CODECS[name]
    payload = encode(state)
    benchmark.group = f"decode at {sparsity:.0%}"
    decoded = benchmark(decode or packbits_decoder(state), payload)
    note(benchmark, payload, state, sparsity)
    assert same(decoded, state)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_decode_masks(benchmark: BenchmarkFixture, sparsity: float) -> None:
    state = pruned_state(sparsity)
    payload = codec.encode(state)
    benchmark.group = f"decode at {sparsity:.0%}"
    masks = benchmark(codec.decode_masks, payload)
    note(benchmark, payload, state, sparsity)
    assert same(masks, {name: tensor != 0 for name, tensor in state.items()})


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_encode_against_a_base_of_the_same_mask(
    benchmark: BenchmarkFixture, sparsity: float
) -> None:
    base = pruned_state(sparsity)
    state = {name: 0.5 * tensor for name, tensor in base.items()}
    benchmark.group = f"encode at {sparsity:.0%}"
    payload = benchmark(codec.encode, state, base=base)
    note(benchmark, payload, state, sparsity)
    assert same(codec.decode(payload, base=base), state)
    assert codec.inspect(payload).mask_bytes == 0


def test_memcpy(benchmark: BenchmarkFixture) -> None:
    state = pruned_state(0.0)
    dense = np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])
    target = np.empty_like(dense)
    benchmark.group = "memcpy of the dense bytes"
    benchmark(np.copyto, target, dense)
    note(benchmark, dense.tobytes(), state, 0.0)
    assert np.array_equal(target, dense)
