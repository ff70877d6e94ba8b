"""Encode and decode a sparse state, beside what people use otherwise: cases and their table.

`make bench-codec` and `sparsekit bench codec` measure these. Every rival has to give the state back
bit for bit before anything is timed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sparsekit import codec
from sparsekit.bench.figures import Row, one, percent
from sparsekit.bench.pairs import Case, Turns, quartiles
from sparsekit.bench.rivals import SLOW, Rival, State, rivals
from sparsekit.codec.core import Level
from sparsekit.errors import DisagreementError
from sparsekit.models import BrainAgeCNN

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
QUICK_SPARSITIES = (0.8, 0.95)
MEMCPY = "memcpy"
_LARGE = 50_000
_ROUNDS, _QUICK_ROUNDS = 5, 2


def random_state(sparsity: float) -> State:
    """Heavy-tailed random weights of `BrainAgeCNN`, pruned by global magnitude; biases stay."""
    generator = np.random.default_rng(1990)
    state = {
        name: torch.from_numpy(generator.standard_t(5, tuple(tensor.shape)).astype(np.float32))
        for name, tensor in BrainAgeCNN().state_dict().items()
    }
    weights = [tensor for tensor in state.values() if tensor.ndim > 1]
    sizes = torch.cat([weight.abs().reshape(-1) for weight in weights])
    threshold = sizes.sort().values[int(sparsity * sizes.numel())]
    for weight in weights:
        weight[weight.abs() < threshold] = 0.0
    return state


def codec_case(
    state: State,
    what: str,
    labels: Mapping[str, Any],
    *,
    own: Mapping[str, Rival] | None = None,
    slow: bool = True,
) -> Case:
    """One direction of one state by every rival that is installed, and by this library.

    Parameters
    ----------
    state : dict of str to Tensor
        float32 tensors on the CPU.
    what : {"encode", "decode"}
    labels : mapping
        What the row is about, beside `what`.
    own : mapping of str to Rival, optional
        More rivals.
    slow : bool, default True
        With those that take seconds, which run in every hundredth round.

    Raises
    ------
    DisagreementError
        A rival that should be exact gives back other bits.
    """
    # +0.0 for -0.0, which is all that this library would change.
    state = {name: tensor + 0.0 for name, tensor in state.items()}
    found, missing = rivals()
    found = {name: rival for name, rival in found.items() if slow or name not in SLOW}
    found |= {**(own or {}), "sparsekit, fast": _ours("fast"), "sparsekit": _ours("balanced")}
    sides: dict[str, Callable[[], object]] = {MEMCPY: _copier(state)}
    sizes = {}
    for name, rival in found.items():
        payload = rival.encode(state)
        if rival.exact and not _same(rival.decode(payload, state), state):
            raise DisagreementError(f"{name}: gives back other bits than it was given")
        sizes[name] = len(payload)

        def encode(rival: Rival = rival) -> object:
            return rival.encode(state)

        def decode(rival: Rival = rival, payload: bytes = payload) -> object:
            return rival.decode(payload, state)

        sides[name] = encode if what == "encode" else decode
    n = sum(tensor.numel() for tensor in state.values())
    notes = {
        "bytes": sizes, "missing": missing, "dense_bytes": 4 * n,
        "kept": sum(int(t.count_nonzero()) for t in state.values()),
        **_masks_of(codec.encode(state)),
    }  # fmt: skip
    return Case({"what": what, **labels}, sides, notes, dict.fromkeys(SLOW, 100))


def _ours(level: Level) -> Rival:
    return Rival(
        lambda state: codec.encode(state, level=level), lambda payload, _: codec.decode(payload)
    )


def _copier(state: State) -> Callable[[], object]:
    dense = np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()])
    target = np.empty_like(dense)
    return lambda: np.copyto(target, dense)


def _same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(tensor.view(torch.int32), right[name].view(torch.int32))
        for name, tensor in left.items()
    )


def _entropy(n: int, k: int) -> float:
    """Bits of a mask that keeps `k` of `n` at random."""
    p = k / n
    return 0.0 if p in (0, 1) else -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def _masks_of(payload: bytes) -> dict[str, Any]:
    """Bits of the masks beside their entropy: of large tensors one by one, and of all."""
    records = codec.inspect(payload).records
    bits = [(8 * r.mask_bytes, _entropy(r.n, r.k), r.n) for r in records if r.n]
    large = [b / h for b, h, n in bits if n >= _LARGE and h]
    return {
        "worst_large": max(large, default=None),
        "mask_bits": sum(b for b, _, _ in bits),
        "mask_entropy": sum(h for _, h, _ in bits),
        "bound_bits": sum(h for _, h, _ in bits) + 32 * sum(r.k for r in records),
    }


@dataclass(frozen=True, slots=True)
class CodecPlan:
    """What `sparsekit bench codec` measures: states by the title of their column."""

    states: Mapping[str, Callable[[], State]]
    rounds: int
    slow: bool

    @property
    def steps(self) -> int:
        """Number of cases."""
        return 2 * len(self.states)


def codec_plan(quick: bool, own: State | None = None) -> CodecPlan:
    """Random states by sparsity, or one of your own."""
    rounds = _QUICK_ROUNDS if quick else _ROUNDS
    if own is not None:
        n = sum(tensor.numel() for tensor in own.values())
        kept = sum(int(tensor.count_nonzero()) for tensor in own.values())
        return CodecPlan({percent(1 - kept / n): partial(dict, own)}, rounds, not quick)
    sparsities = QUICK_SPARSITIES if quick else SPARSITIES
    states = {percent(s): partial(random_state, s) for s in sparsities}
    return CodecPlan(states, rounds, not quick)


def measure(plan: CodecPlan) -> Iterator[Row]:
    """Yield a row for each state and direction as it is done, on one thread.

    Raises
    ------
    DisagreementError
        A rival gives back other bits.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for title, make in plan.states.items():
            for what in ("encode", "decode"):
                case = codec_case(make(), what, {"state": title}, slow=plan.slow)
                yield Turns(case).run(plan.rounds).row()
    finally:
        torch.set_num_threads(threads)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of the table, the first its header: bits a weight and GB/s of dense bytes."""
    titles = list(dict.fromkeys(row["state"] for row in rows))
    header = ["what", *(f"{t}: {cell}" for t in titles for cell in ("bits", "enc", "dec"))]
    lines = []
    for name in rows[0]["milliseconds"]:
        cells = []
        for title in titles:
            pair = [one(rows, what=what, state=title) for what in ("encode", "decode")]
            cells += [_bits(pair[0], name), *(_gigabytes(row, name) for row in pair)]
        lines.append([name, *cells])
    return [header, *lines]


def _bits(row: Row | None, name: str) -> str:
    if row is None or name not in row["notes"]["bytes"]:
        return "-"
    return f"{32 * row['notes']['bytes'][name] / row['notes']['dense_bytes']:.3g}"


def _gigabytes(row: Row | None, name: str) -> str:
    if row is None:
        return "-"
    seconds = 1e-3 * quartiles(row["milliseconds"][name])[1]
    return f"{row['notes']['dense_bytes'] / seconds / 1e9:.3g}"


def footnote(rows: Sequence[Row]) -> str:
    """What the table's numbers mean, and which rivals are missing here."""
    notes = rows[0]["notes"]
    text = (
        "bits: of the payload, for each weight; float32 has 32. enc, dec: GB of dense weights in "
        f"a second, medians on one thread; {notes['dense_bytes'] / 1e6:.3g} MB dense. Every rival "
        "gave back the same bits before it was timed. memcpy copies the dense bytes."
    )
    if notes["missing"]:
        names = ", ".join(notes["missing"])
        text += f" Not installed here: {names} (pip install 'sparsekit3d[bench]' has most)."
    return text
