"""The settings of one run: defaults, the paper's preset, checks, and the TOML file for them."""

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from sparsekit.codec.core import Level, Values
from sparsekit.errors import UsageError
from sparsekit.fed import pruning
from sparsekit.fed.checks import choice as _choice
from sparsekit.fed.checks import in_range as _in_range
from sparsekit.fed.engines.options import (
    FlareOptions,
    FlowerOptions,
    options_of,
    require_extra,
)
from sparsekit.fed.typed import typed
from sparsekit.types import Size3

STRATEGIES = ("centralized", "fedavg", "fedsparsify-global", "fedsparsify-local")
ENGINES = ("processes", "inprocess", "flare", "flower")
SCOPES = ("global", "layer", "erk", "flops")
NORMALISATIONS = ("brain-zscore", "volume-zscore", "percentile")
OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("constant", "cosine")
VALUES = get_args(Values)
LEVELS = get_args(Level)

# Conv grids of the Montreal space at the two resolutions that the cohort generator writes.
GRIDS: dict[int, Size3] = {2: (91, 109, 91), 4: (46, 55, 46)}

# The part of each grid that holds the brain, with room for large heads: first voxel and extent.
BRAIN_BOXES: dict[int, tuple[Size3, Size3]] = {
    2: ((4, 2, 0), (84, 104, 84)),
    4: ((2, 1, 0), (42, 52, 42)),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run's result, bit for bit, on one type of machine.

    Attributes
    ----------
    cohort : str
        A BIDS tree with participants.tsv, or a CSV with path, age and site.
    strategy : str
        One of `STRATEGIES`. ``centralized`` pools all sites' scans into one place.
    sparsity : float
        Final sparsity of the prunable weights; 0 for a dense run, ignored by ``fedavg``.
    rounds, epochs, batch : int
        Rounds of the federation, local passes per round, scans per optimizer step.
    max_steps : int
        Optimizer steps after which a site ends its round, 0 for none: large sites then see part
        of their scans, another part each round.
    optimizer, lr, momentum, weight_decay, lr_schedule, lr_final_fraction
        Local training. Every round starts a new optimizer. Under ``cosine`` the rate falls over
        the rounds from ``lr`` to ``lr * lr_final_fraction``.
    width, dropout : float
        Of `sparsekit.models.BrainAgeCNN`.
    mean_age : float or None
        Initial output in years; None takes the mean of the training ages.
    age_scale : float
        Years per unit of the network's output and of the loss.
    flips : bool
        Mirror each training scan left-right with probability one half.
    shift : int
        Move each training scan by up to this many voxels along each axis, at random.
    scope, granularity, min_per_filter
        Of the pruning; see `sparsekit.prune.magnitude_masks`.
    schedule, exponent, prune_start, prune_end, prune_every
        See `sparsekit.schedule`. The final sparsity is there after round ``prune_end``, 0 for the
        last one.
    initial_sparsity : float
        Sparsity before the first round, chosen from the initial weights; 0 for a dense start.
    regrow, regrow_every, regrow_end, regrow_scans
        Every ``regrow_every`` rounds before ``regrow_end`` (0: three quarters of them) replace a
        share of each layer's weights, which falls from ``regrow``, by pruned ones with large
        gradients, found with ``regrow_scans`` scans per site (`sparsekit.fed.regrow`).
    paper : bool
        Prune as the released FedSparsify code does: biases too, ties kept, masks from the
        non-zero pattern.
    resolution : int or None
        Voxel size in mm of the grid to train on, 2 or 4; None follows the first scan.
    crop : bool
        Train on the part of the grid that holds the brain, a fifth less to compute.
    normalisation, on_problem, test_fraction
        How scans are read and which are held out.
    evaluate_every : int
        Evaluate the model of every so many rounds on held-out people; the last one's always.
    values : {"lossless", "bf16", "fp16", "int8", "int4"}
        Precision of the weights that travel, both ways; of "int8" and "int4" the precision of what
        has changed. Numbers that it cannot hold make that payload lossless.
    level : {"fast", "balanced", "small"}
        Speed against bytes of the codec.
    quorum : float
        Fraction of the sites asked that must reply for a round to count.
    participation : float
        Fraction of the sites that each round asks, at least one, drawn anew from the seed. The
        final model goes to all.
    sites_per_round : int
        The same as a number of sites; 0 for `participation`.
    max_update_norm : float or None
        Largest Euclidean distance, over all weights, between a site's model and the one that it
        was sent; an update beyond it is left out. None for no bound.
    engine, threads, device, seed
        Where it runs: each site in a process of its own with TCP to the server, or all in one.
        ``threads`` is the total over all sites trained at the same time.
    deadline : float
        Seconds within which a site's process must have replied; a later one is out for the round.
    cache : str
        Folder of prepared scans; empty for ``cache`` beside the run's folder.
    keep_checkpoints : int
        How many of the newest checkpoints stay on disk; 0 keeps every round's.
    flare, flower : FlareOptions, FlowerOptions or None
        Of these engines; a table each in the TOML file. Where the sites are other machines there
        is no ``cohort``: each has its own (docs/two-machines.md).
    """

    cohort: str
    strategy: str = "fedsparsify-global"
    sparsity: float = 0.95
    rounds: int = 20
    epochs: int = 2
    batch: int = 4
    max_steps: int = 0
    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 1e-3
    lr_schedule: str = "cosine"
    lr_final_fraction: float = 0.1
    width: float = 0.25
    dropout: float = 0.0
    mean_age: float | None = None
    age_scale: float = 10.0
    flips: bool = True
    shift: int = 0
    scope: str = "global"
    granularity: str = "weight"
    schedule: str = "polynomial"
    exponent: float = 3.0
    prune_start: int = 1
    prune_end: int = 0
    prune_every: int = 1
    initial_sparsity: float = 0.0
    regrow: float = 0.0
    regrow_every: int = 10
    regrow_end: int = 0
    regrow_scans: int = 8
    min_per_filter: int = 1
    paper: bool = False
    resolution: int | None = None
    crop: bool = False
    normalisation: str = "brain-zscore"
    on_problem: str = "refuse"
    test_fraction: float = 0.25
    evaluate_every: int = 1
    values: Values = "lossless"
    level: Level = "small"
    quorum: float = 0.5
    participation: float = 1.0
    sites_per_round: int = 0
    max_update_norm: float | None = None
    engine: str = "processes"
    deadline: float = 3600.0
    threads: int = 2
    device: str = "cpu"
    seed: int = 0
    cache: str = ""
    keep_checkpoints: int = 2
    flare: FlareOptions | None = None
    flower: FlowerOptions | None = None

    def __post_init__(self) -> None:
        for name in ("cohort", "cache"):
            path = getattr(self, name)
            if any("\ud800" <= letter <= "\udfff" for letter in path):
                raise UsageError(f"{name}: {path!r} is not UTF-8; rename that file or folder")
        _choice("strategy", self.strategy, STRATEGIES)
        _choice("engine", self.engine, ENGINES)
        self._check_deployment()
        _choice("scope", self.scope, SCOPES)
        _choice("normalisation", self.normalisation, NORMALISATIONS)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _choice("values", self.values, VALUES)
        _choice("level", self.level, LEVELS)
        _choice("on_problem", self.on_problem, ("refuse", "skip"))
        _choice("device", self.device, ("cpu", "cuda"))
        for name in ("rounds", "epochs", "batch", "prune_every", "evaluate_every"):
            _in_range(name, getattr(self, name), 1, _MOST)
        for name in ("prune_start", "min_per_filter", "keep_checkpoints", "sites_per_round"):
            _in_range(name, getattr(self, name), 0, _MOST)
        # The thread library ends the process when it cannot start as many as it was told to.
        _in_range("threads", self.threads, 1, 1024)
        _in_range("shift", self.shift, 0, 8)
        _in_range("max_steps", self.max_steps, 0, _MOST)
        _in_range("seed", self.seed, 0, 2**63 - 1)
        _in_range("weight_decay", self.weight_decay, 0.0, None)
        _in_range("exponent", self.exponent, 0.0, None, open_below=True)
        for name in ("sparsity", "dropout"):
            _in_range(name, getattr(self, name), 0.0, 1.0, open_above=True)
        _in_range("momentum", self.momentum, 0.0, 1.0, open_above=True)
        _in_range("lr_final_fraction", self.lr_final_fraction, 0.0, 1.0)
        _in_range("quorum", self.quorum, 0.0, 1.0)
        _in_range("participation", self.participation, 0.0, 1.0, open_below=True)
        if self.sites_per_round and self.participation != 1.0:
            raise UsageError(
                "sites_per_round: give it or participation, not both, got "
                f"{self.sites_per_round} and {self.participation}"
            )
        if self.max_update_norm is not None:
            _in_range("max_update_norm", self.max_update_norm, 0.0, None, open_below=True)
        _in_range("test_fraction", self.test_fraction, 0.0, 1.0, open_below=True, open_above=True)
        for name in ("lr", "age_scale"):
            _in_range(name, getattr(self, name), 0.0, None, open_below=True)
        # The system's clocks take no more than some hundred years of nanoseconds.
        _in_range("deadline", self.deadline, 0.0, 1e6, open_below=True)
        # 16 makes 750 million weights; far beyond, building the network exhausts the memory.
        _in_range("width", self.width, 0.0, 16.0, open_below=True)
        if self.mean_age is not None:
            _in_range("mean_age", self.mean_age, 0.0, 150.0)
        if self.resolution not in (None, *GRIDS):
            raise UsageError(f"resolution: expected 2 or 4 (mm), got {self.resolution}")
        pruning.check(self)

    def _check_deployment(self) -> None:
        if not self.deployed:
            return
        if self.cohort:
            raise UsageError(
                "cohort: not with sites on other machines, which say where their scans are "
                f"themselves; got {self.cohort}"
            )
        if self.strategy == "centralized":
            raise UsageError("strategy: centralized would have to pool the scans of all machines")
        if self.resolution is None:
            raise UsageError("resolution: missing; sites on other machines need one, 2 or 4 (mm)")

    @property
    def deployed(self) -> bool:
        """Whether the sites are other machines, with scans that the server does not see."""
        options = {"flare": self.flare, "flower": self.flower}.get(self.engine)
        return options is not None and options.deployed

    def box(self, resolution: int) -> tuple[Size3, Size3]:
        """Return first voxel and extent of the part of the grid that is trained on."""
        return BRAIN_BOXES[resolution] if self.crop else ((0, 0, 0), GRIDS[resolution])

    @property
    def sparse(self) -> bool:
        """Whether this run prunes at all."""
        return self.strategy != "fedavg" and self.sparsity > 0

    def learning_rate(self, round_number: int) -> float:
        """Return the local learning rate of round 1..rounds."""
        if self.lr_schedule == "constant" or self.rounds == 1:
            return self.lr
        progress = (round_number - 1) / (self.rounds - 1)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * (self.lr_final_fraction + (1 - self.lr_final_fraction) * cosine)


_MOST = 10**9  # of any count: a slip of the finger, not a wish

# What the released FedSparsify code sets for brain age (README and configs of
# dstripelis/FedSparsify): the whole-volume z-score, plain SGD, one scan a step, 40 x 4 epochs.
PAPER_PRESET: dict[str, Any] = {
    "resolution": 2,
    "crop": False,
    "scope": "global",
    "granularity": "weight",
    "exponent": 3.0,
    "prune_start": 1,
    "prune_every": 1,
    "dropout": 0.0,
    "rounds": 40,
    "epochs": 4,
    "batch": 1,
    "max_steps": 0,
    "optimizer": "sgd",
    "lr": 5e-5,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "lr_schedule": "constant",
    "width": 1.0,
    "mean_age": 62.68,
    "age_scale": 1.0,
    "flips": False,
    "shift": 0,
    "min_per_filter": 0,
    "normalisation": "volume-zscore",
    "paper": True,
}


def make_config(*layers: Mapping[str, Any]) -> RunConfig:
    """Build a checked `RunConfig` from layers of settings, later ones winning.

    A layer that sets ``paper = true`` brings the paper's preset in underneath all layers.

    Raises
    ------
    UsageError
        On an unknown setting, a wrong type, a value out of range or a device that is not here.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    if merged.get("paper") is True:
        merged = {**PAPER_PRESET, **merged}
    for name, kind in (("flare", FlareOptions), ("flower", FlowerOptions)):
        if name in merged:
            merged[name] = options_of(kind, name, merged[name])
    hints = get_type_hints(RunConfig)
    for name, value in merged.items():
        if name not in hints:
            raise UsageError(f"{name}: unknown setting; known: {', '.join(sorted(hints))}")
        # Settings with named values are checked by RunConfig itself.
        merged[name] = typed(name, value, hints[name])
    given = "cohort" in merged
    merged.setdefault("cohort", "")
    config = RunConfig(**merged)
    if not given and not config.deployed:
        raise UsageError("cohort: missing; give --cohort PATH or set cohort in the config file")
    require_extra(config.engine)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "device: torch can use no GPU here (see `sparsekit doctor`); choose --device cpu"
        )
    return config


def load_config_file(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file.

    Raises
    ------
    UsageError
        If the file is missing, cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config: no file {path}") from None
    except OSError as error:
        raise UsageError(f"config: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"config: {path} is not a TOML file: {error}") from None


def dump_config(config: RunConfig) -> str:
    """Write the settings as TOML; a setting of None is left out."""
    lines = ["# Settings of this run. Change nothing here: `sparsekit fed resume` reads it."]
    tables: list[str] = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            tables += [f"[{name}]", *(f"{key} = {_toml(one)}" for key, one in value.items())]
        elif value is not None:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml(value: str | float | bool | tuple[str, ...]) -> str:
    # JSON's numbers, booleans and most strings are TOML's too. JSON would write an emoji as two
    # halves, which TOML forbids, and leave the control code 127 as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
