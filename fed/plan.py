"""What the server asks of a site and what the site answers, as plain values that travel as JSON."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import torch

from sparsekit import flops
from sparsekit.errors import FormatError
from sparsekit.fed.config import RunConfig
from sparsekit.fed.pruning import regrown_share
from sparsekit.fed.seeds import derive_seed
from sparsekit.models import BrainAgeCNN
from sparsekit.types import Size3

TASK_TRAIN = "train"
TASK_EVALUATE = "evaluate"

_Record = TypeVar("_Record", bound="TrainPlan | Hello | Report")


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One round's work order; with the payload and the site's scans it decides the reply.

    The network sees ``in_shape`` voxels of each scan from ``first_voxel`` on. ``local_sparsity``
    is None where the site does not prune. ``masked`` says whether the payload's masks bind the
    training. ``regrow`` is the share of pruned weights that the site proposes to bring back, None
    for no regrowth.
    """

    round: int
    task: str
    evaluate: bool
    epochs: int
    batch: int
    max_steps: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    flips: bool
    shift: int
    seed: int
    first_voxel: list[int]
    in_shape: list[int]
    width: float
    dropout: float
    mean_age: float
    age_scale: float
    masked: bool
    local_sparsity: float | None
    regrow: float | None
    regrow_scans: int
    scope: str
    min_per_filter: int
    paper: bool
    values: str
    level: str


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a site says of itself before the first round: counts and the sum of ages.

    ``content`` is a hash of its people, scans and split: a resumed run needs the same.
    """

    site: str
    n_train: int
    n_test: int
    age_sum: float
    preprocessing_id: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What accompanies a site's update: measures, never scans or single people's values.

    ``test_*`` belong to the model as received, before this round's training.
    """

    round: int
    site: str
    n_train: int
    samples: int
    steps: int
    train_loss: float | None
    test_n: int
    test_abs_error_sum: float | None
    flops_counted: int
    flops_executed: int


def to_control(record: TrainPlan | Hello | Report) -> dict[str, Any]:
    """Return the record as a JSON object."""
    return dataclasses.asdict(record)


def from_control(kind: type[_Record], control: Mapping[str, Any]) -> _Record:
    """Rebuild a record, checking names and kinds of value.

    Raises
    ------
    FormatError
        If a field is missing, unknown or of another JSON type.
    """
    hints = get_type_hints(kind)
    if set(control) != set(hints):
        wrong = sorted(set(control) ^ set(hints))
        raise FormatError(f"control: expected the fields of {kind.__name__}, differing: {wrong}")
    values: dict[str, Any] = dict(control)
    for name, hint in hints.items():
        value = values[name]
        if not isinstance(value, _JSON_TYPES[hint]) or (
            isinstance(value, bool) and hint is not bool
        ):
            raise FormatError(f"control: {name} has type {type(value).__name__}, expected {hint}")
        if name in _COUNTS and isinstance(value, int) and value < 0:
            raise FormatError(f"control: {name} is {value}, expected a count >= 0")
    return kind(**values)


_COUNTS = frozenset(
    {"n_train", "n_test", "test_n", "samples", "steps", "flops_counted", "flops_executed"}
)

# JSON writes 1.0 as a float and 1 as an integer: both are fine where a float is expected.
_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    str: (str,),
    float: (int, float),
    float | None: (int, float, type(None)),
    list[int]: (list,),
}


def plan_for(
    config: RunConfig,
    *,
    round_number: int,
    task: str,
    first_voxel: Size3,
    in_shape: Size3,
    mean_age: float,
    masked: bool,
    local_sparsity: float | None,
) -> TrainPlan:
    """Write the work order of one round, the same for every site."""
    return TrainPlan(
        round=round_number,
        task=task,
        # The model that travels with round t is that of round t - 1.
        evaluate=task == TASK_EVALUATE or (round_number - 1) % config.evaluate_every == 0,
        epochs=config.epochs,
        batch=config.batch,
        max_steps=config.max_steps,
        optimizer=config.optimizer,
        lr=config.learning_rate(min(round_number, config.rounds)),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        flips=config.flips,
        shift=config.shift,
        seed=derive_seed(config.seed, "round", round_number),
        first_voxel=list(first_voxel),
        in_shape=list(in_shape),
        width=config.width,
        dropout=config.dropout,
        mean_age=mean_age,
        age_scale=config.age_scale,
        masked=masked,
        local_sparsity=local_sparsity,
        regrow=regrown_share(config, round_number) if masked and task == TASK_TRAIN else None,
        regrow_scans=config.regrow_scans,
        scope=config.scope,
        min_per_filter=config.min_per_filter,
        paper=config.paper,
        values=config.values,
        level=config.level,
    )


def box_of(plan: TrainPlan) -> tuple[slice, slice, slice]:
    """Return the part of each scan that the network sees."""
    edges = zip(plan.first_voxel, plan.in_shape, strict=True)
    a, b, c = (slice(first, first + extent) for first, extent in edges)
    return a, b, c


@functools.lru_cache(maxsize=8)
def work_per_weight(width: float, in_shape: Size3) -> Mapping[str, int]:
    """Count what one weight of each layer costs in a training step, for ``scope="flops"``."""
    # Shapes are enough.
    with torch.device("meta"):
        model = BrainAgeCNN(in_shape=in_shape, width=width)
    return flops.work_per_weight(model, (1, 1, *in_shape))


def build_model(plan: TrainPlan) -> BrainAgeCNN:
    """Build the network that the plan describes, with untrained weights."""
    depth, height, width = plan.in_shape
    return BrainAgeCNN(
        in_shape=(depth, height, width),
        width=plan.width,
        mean_age=plan.mean_age,
        dropout=plan.dropout,
        age_scale=plan.age_scale,
    )
