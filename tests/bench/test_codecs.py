"""The comparison of codecs and the choice of layers, on states and layers that cost nothing."""

import pickle

import pytest
import torch

from sparsekit.bench import codecs, speedup
from sparsekit.bench.network import random_mask
from sparsekit.bench.rivals import Rival
from sparsekit.errors import DisagreementError, UsageError


def small_state() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, 3, generator=random)
    weight[torch.rand(weight.shape, generator=random) < 0.75] = 0.0
    return {"conv.weight": weight, "conv.bias": torch.tensor([-0.0, 1.0])}


def pickled(exact: bool = True, change: float = 0.0) -> Rival:
    def decode(payload: bytes, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert payload
        return {name: tensor + change for name, tensor in like.items()}

    return Rival(pickle.dumps, decode, exact)


def test_a_state_of_ones_own_is_one_column() -> None:
    wanted = codecs.codec_plan(quick=True, own=small_state())
    rows = list(codecs.measure(wanted))
    assert len(rows) == wanted.steps == 2
    header, *lines = codecs.table(rows)
    assert len(header) == 4
    assert all(len(line) == 4 for line in lines)
    cells = {line[0]: line[1:] for line in lines}
    assert cells["memcpy"][0] == "-"
    # 32 bits of every fourth weight and less than one of mask, less what coding saves.
    assert 6 < float(cells["sparsekit"][0]) < 9
    assert float(cells["torch.save"][0]) > 32
    assert "zstd-19" not in cells
    assert "0.0138 MB" in codecs.footnote(rows)


def test_the_random_states_have_the_sparsity_of_their_column() -> None:
    wanted = codecs.codec_plan(quick=True)
    assert list(wanted.states) == ["80 %", "95 %"]
    weights = [t for t in wanted.states["95 %"]().values() if t.ndim > 1]
    kept = sum(int(t.count_nonzero()) for t in weights)
    assert kept / sum(t.numel() for t in weights) == pytest.approx(0.05, abs=1e-4)


def test_a_rival_that_changes_bits_stops_the_comparison() -> None:
    own = {"mine": pickled(change=1.0)}
    with pytest.raises(DisagreementError, match="mine"):
        codecs.codec_case(small_state(), "decode", {}, own=own, slow=False)


@pytest.mark.parametrize("own", [pickled(), pickled(exact=False, change=1.0)])
def test_a_rival_of_ones_own_takes_part(own: Rival) -> None:
    case = codecs.codec_case(small_state(), "encode", {}, own={"mine": own}, slow=False)
    assert case.notes["bytes"]["mine"] > 4 * 3458
    assert "mine" in case.sides
    assert list(case.sides)[-1] == "sparsekit"


@pytest.mark.parametrize(
    ("text", "kernel"), [("4,8,5x6x7", 3), ("4, 8, 5x6x7", 3), ("4,8,5x6x7,1", 1)]
)
def test_a_layer_is_read(text: str, kernel: int) -> None:
    layer = speedup.layer_of(text)
    assert (layer.c_in, layer.c_out, layer.grid, layer.kernel) == (4, 8, (5, 6, 7), kernel)
    mask = random_mask("mine", 0.5, layer)
    assert mask.shape == (8, 4, kernel, kernel, kernel)
    assert int(mask.sum()) == mask.numel() // 2


@pytest.mark.parametrize("text", ["", "4,8", "4,8,5x6", "0,8,5x6x7", "4,8,5x0x7", "4,8,5x6x7,2"])
def test_what_is_no_layer_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--layer: expected"):
        speedup.plan(quick=True, own=[text])


def test_layers_of_ones_own_replace_the_network() -> None:
    wanted = speedup.plan(quick=True, own=["4,8,5x6x7,1", "2,2,3x3x3"])
    assert wanted.steps == 8
    rows = [
        {
            "what": f"masked_conv3d {what}",
            "layer": name,
            "sparsity": sparsity,
            "milliseconds": {"stock": [3.0], "ours": [1.0]},
        }
        for what in ("forward", "forward + gradients")
        for name in wanted.layers
        for sparsity in wanted.sparsities
    ]
    _, *lines = speedup.table(rows, wanted)
    assert lines[0] == ["4 to 8 channels, 5x6x7, kernel 1, forward", "3x", "3x"]
    assert len(lines) == 4
    assert "Whole step" not in speedup.footnote(wanted)
