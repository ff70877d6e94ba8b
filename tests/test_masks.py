"""Pruned stays pruned: after every step of any torch optimizer, through copies and moves."""

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from sparsekit import masks, prune
from sparsekit.errors import ArgumentError, ArgumentTypeError
from sparsekit.nn import densify, sparsify


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


Parameters = Iterable[nn.Parameter]
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd-foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "adam-foreach": lambda p: Adam(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adam-fused": lambda p: Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-amsgrad": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw-fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4),
}


def make_model(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 3, 3), nn.ReLU(), nn.Conv3d(3, 2, 2), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def make_masks(model: nn.Module, sparsity: float = 0.6) -> dict[str, Tensor]:
    """Masks of weights and of a bias, not by magnitude, so that large weights are pruned too."""
    random = torch.Generator().manual_seed(3)
    wanted = {
        name: torch.rand(p.shape, generator=random) >= sparsity
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    return wanted | {"0.bias": torch.tensor([True, False, True])}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 5
) -> Iterator[None]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(2, 1, 5, 5, 5, generator=random)

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(x) - 3.0).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        yield


def assert_held(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in wanted.items():
        values = parameters[name].detach()
        assert torch.equal(values[~mask], torch.zeros_like(values[~mask])), name
        assert bool((values[mask] != 0).any()), name
        assert torch.equal(masks.masks_of(model)[name], mask), name


@pytest.mark.parametrize("skipping", [True, False], ids=["sparsify", "apply_masks"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_hold_after_every_step(name: str, skipping: bool) -> None:
    model = make_model()
    wanted = make_masks(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    # Steps before the mask leave momentum at what is pruned later.
    for _ in train(model, optimizer, steps=2):
        pass
    if skipping:
        sparsify(model, wanted)
    else:
        prune.apply_masks(model, wanted)
    assert_held(model, wanted)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in train(model, optimizer):
        assert_held(model, wanted)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_without_a_mask_the_same_steps_move_those_entries() -> None:
    model = make_model()
    wanted = make_masks(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    prune.zero_outside(dict(model.named_parameters()), wanted)
    for _ in train(model, optimizer):
        pass
    with pytest.raises(AssertionError):
        assert_held(model, wanted)


def test_a_mask_that_shrinks_holds_at_once_and_one_that_grows_starts_at_zero() -> None:
    model: Any = sparsify(make_model(), make_masks(make_model(), 0.3))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    smaller = {n: m & (torch.arange(m.numel()).reshape(m.shape) % 2 == 0)
               for n, m in masks.masks_of(model).items()}  # fmt: skip
    for _ in train(model, optimizer):
        pass
    prune.apply_masks(model, smaller)
    assert_held(model, smaller)
    for _ in train(model, optimizer):
        assert_held(model, smaller)
    larger = {name: torch.ones_like(mask) for name, mask in smaller.items()}
    prune.apply_masks(model, larger)
    for name, mask in smaller.items():
        assert float(model.get_parameter(name).detach()[~mask].abs().sum()) == 0.0
    for _ in train(model, optimizer, steps=1):
        pass
    assert bool((model[0].weight.detach()[~smaller["0.weight"]] != 0).all())


def by_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def by_spawned_process(model: nn.Module) -> nn.Module:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(copy.deepcopy, model).result(timeout=120)


def by_moving(model: nn.Module) -> nn.Module:
    moved: Any = copy.deepcopy(model).double()
    return moved.to(memory_format=torch.channels_last_3d).float()  # type: ignore[no-any-return]


def by_assigning(model: nn.Module) -> nn.Module:
    other: nn.Module = sparsify(make_model(seed=8), make_masks(model, 0.2))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


COPIES = [copy.deepcopy, by_pickle, by_torch_save, by_spawned_process, by_moving, by_assigning]


@pytest.mark.parametrize("skipping", [True, False], ids=["sparsify", "apply_masks"])
@pytest.mark.parametrize("make_copy", COPIES, ids=lambda f: f.__name__)
def test_copies_hold_their_own_masks(
    make_copy: Callable[[nn.Module], nn.Module], skipping: bool
) -> None:
    model = make_model()
    wanted = make_masks(model)
    (sparsify if skipping else prune.apply_masks)(model, wanted)
    copied = make_copy(model)
    assert_held(copied, wanted)
    # Not a forward pass before the first step: the copy must hold by itself.
    for parameter in copied.parameters():
        parameter.grad = torch.ones_like(parameter)
    SGD(copied.parameters(), lr=0.1).step()
    assert_held(copied, wanted)
    for _ in train(copied, OPTIMIZERS["adam"](copied.parameters())):
        assert_held(copied, wanted)

    none = {name: torch.zeros_like(mask) for name, mask in wanted.items()}
    prune.apply_masks(copied, none)
    assert masks.sparsity(copied).prunable == 1.0
    assert_held(model, wanted)


def test_threads_training_different_models_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            model = make_model(seed)
            wanted = {n: m.roll(seed) for n, m in make_masks(model).items()}
            start.wait(timeout=60)
            sparsify(model, wanted)
            for _ in train(model, OPTIMIZERS["adam"](model.parameters()), steps=15, seed=seed):
                assert_held(model, wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures


def test_layers_that_share_a_weight_share_its_mask() -> None:
    model: Any = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.Conv3d(1, 1, 3, padding=1))
    model[1].weight = model[0].weight
    mask = torch.arange(27).reshape(1, 1, 3, 3, 3) % 2 == 0
    sparsify(model, {"0.weight": mask})
    assert torch.equal(model[1].mask, mask)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    for _ in range(3):
        model(torch.ones(1, 1, 4, 4, 4)).square().sum().backward()
        optimizer.step()
        assert_held(model, {"0.weight": mask})


def test_a_functional_call_leaves_the_hold_alone() -> None:
    model = sparsify(make_model(), make_masks(make_model()))
    lent = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.func.functional_call(model, lent, (torch.ones(1, 1, 5, 5, 5),))
    holds = masks.module_holds(model[0])
    assert holds["weight"].parameter is model[0].weight
    assert copy.deepcopy(model[0]).density == model[0].density


def test_masks_die_with_their_model() -> None:
    before = len(masks.live_holds())
    model: Any = sparsify(make_model(), make_masks(make_model()))
    assert len(masks.live_holds()) == before + 4
    del model
    assert len(masks.live_holds()) == before


def test_densify_lets_go() -> None:
    model = make_model()
    wanted = make_masks(model)
    assert densify(sparsify(model, wanted)) is model
    assert masks.masks_of(model) == {}
    assert list(model.state_dict()) == list(make_model().state_dict())
    for _ in train(model, OPTIMIZERS["sgd"](model.parameters())):
        pass
    moved = model[0].weight.detach()[~wanted["0.weight"]]
    assert bool((moved != 0).any())
    fresh = make_model()
    for layer, plain in zip(model, fresh, strict=True):
        for attribute in ("_forward_pre_hooks", "_load_state_dict_pre_hooks",
                          "_load_state_dict_post_hooks", "_buffers"):  # fmt: skip
            assert len(getattr(layer, attribute)) == len(getattr(plain, attribute)), attribute


def test_a_dense_checkpoint_loads_strictly_and_lifts_the_masks() -> None:
    dense = make_model(seed=2)
    model: Any = sparsify(make_model(), make_masks(make_model()))
    model.load_state_dict(dense.state_dict(), strict=True)
    assert all(bool(m.all()) for m in masks.masks_of(model).values())
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_masked_checkpoint_makes_the_round_trip() -> None:
    model: Any = sparsify(make_model(), make_masks(make_model()))
    state = copy.deepcopy(model.state_dict())
    wanted = {n: m.clone() for n, m in masks.masks_of(model).items()}
    assert {n for n in state if n.endswith("_mask")} == {f"{n}_mask" for n in wanted}
    other = sparsify(make_model(seed=2), make_masks(model, 0.1))
    other.load_state_dict(state, strict=True)
    assert_held(other, wanted)
    for _ in train(other, OPTIMIZERS["adam"](other.parameters())):
        assert_held(other, wanted)
    plain = make_model(seed=2)
    plain.load_state_dict(densify(other).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(state, strict=True)


def test_a_checkpoint_with_values_at_pruned_places_is_zeroed_there() -> None:
    model: Any = sparsify(make_model(), make_masks(make_model()))
    state: dict[str, Any] = dict(copy.deepcopy(model.state_dict()))
    state["0.weight"] = torch.full_like(state["0.weight"], 7.0)
    model.load_state_dict(state)
    mask = masks.masks_of(model)["0.weight"]
    assert torch.equal(model[0].weight.detach(), torch.where(mask, 7.0, 0.0))


def test_a_parameter_of_another_name_or_shape_is_refused() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(ArgumentError, match="Linear has no parameter 'w' of its own"):
        masks.attach(layer, "w", torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"expected the parameter's shape \(3, 2\), got \(2"):
        masks.attach(layer, "weight", torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ArgumentTypeError, match=r"expected a bool Tensor, got torch\.float32"):
        masks.attach(layer, "weight", torch.ones(3, 2))
    with pytest.raises(ArgumentTypeError, match="expected a bool Tensor, got list"):
        masks.attach(layer, "weight", [True])  # type: ignore[arg-type]
    assert not layer._buffers
    with pytest.raises(ArgumentError, match="masks: the model has no parameter 'w'"):
        masks.sparsity(layer, {"w": torch.ones(2, dtype=torch.bool)})
