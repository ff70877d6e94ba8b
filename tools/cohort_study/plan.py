"""What the study consists of: draws of people, and what is fitted to each."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sparsekit.fed.cohort.make.cohort import RECIPE
from tools.cohort_study.network import Recipe

SMALL, FULL = "small CNN", "full CNN"
SIMPLE = (
    "mean predictor",
    "ventricle count",
    "nine measured volumes",
    "ridge on 8 mm voxels",
    "ridge, pose undone",
    "eight image features",
    "boosted trees",
    "eight features, pose known",
    "nine volumes, site known",
    "nine rendered volumes",
)
"""All but the networks, fitted to all training people of a draw."""


@dataclass(frozen=True)
class Study:
    """Sizes and settings; the standard ones are those of docs/results/cohort.md.

    Attributes
    ----------
    seeds : tuple of int
        Each is a draw of people, sites and scanners, and of the networks' weights and order.
    scales : tuple of float
        ``--residual-scale`` of the cohorts; the first is the one that claims are made for.
    curve : tuple of int
        Numbers of training people, from few to all, for the small network at the first scale.
    held_out, sites : int
        Of each draw; people are shared out equally, so all sizes are multiples of ``sites``.
    chunk : int
        People rendered as one job.
    small, full : Recipe
        How the networks are trained, for any number of people.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = (0.5, 1.0)
    curve: tuple[int, ...] = (1504, 3000, 6000)
    held_out: int = 1000
    sites: int = 8
    chunk: int = 500
    small: Recipe = field(default_factory=Recipe)
    full: Recipe = field(default_factory=lambda: Recipe(width=1.0, updates=3750, lr=5e-4))

    @property
    def people(self) -> int:
        """Training people of a whole draw."""
        return self.curve[-1]

    def fingerprint(self) -> str:
        """Digest of all that the numbers of a draw and a fit depend on, but for its job's."""
        settings = asdict(self)
        for asked_for in ("seeds", "scales", "curve"):
            del settings[asked_for]
        text = json.dumps([RECIPE, self.people, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Draw:
    """One cohort of people: a seed at a residual scale."""

    seed: int
    scale: float

    def folder(self, root: Path) -> Path:
        """Where its people and fits are kept."""
        return root / f"scale-{self.scale:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Job:
    """A piece of work that leaves one file.

    Attributes
    ----------
    draw : Draw
    kind : str
        ``"render"``, or the name of a predictor.
    number : int
        First person of the chunk that is rendered, or number of training people.
    """

    draw: Draw
    kind: str
    number: int

    def target(self, root: Path) -> Path:
        """The file that says that the job is done."""
        folder = self.draw.folder(root)
        if self.kind == "render":
            return folder / f"people-{self.number:05d}.npz"
        return folder / f"{self.kind.replace(',', '').replace(' ', '-')}-{self.number}.json"

    def __str__(self) -> str:
        what = (
            f"people from {self.number}"
            if self.kind == "render"
            else f"{self.kind}, {self.number} people"
        )
        return f"scale {self.draw.scale:g}, seed {self.draw.seed}: {what}"


def renderings(study: Study, draw: Draw) -> Iterator[Job]:
    """Jobs that make a draw's people."""
    for first in range(0, study.people + study.held_out, study.chunk):
        yield Job(draw, "render", first)


def jobs(study: Study) -> Iterator[Job]:
    """All jobs, what matters most first; a draw's people come before what is fitted to them."""
    first, *others = ([Draw(seed, scale) for seed in study.seeds] for scale in study.scales)
    *fewest, fewer = study.curve[:-1]
    for draws in (first, *others):
        for draw in draws:
            yield from renderings(study, draw)
            for name in (SMALL, *SIMPLE):
                yield Job(draw, name, study.people)
        if draws is first:
            for draw in draws:
                yield Job(draw, SMALL, fewer)
    for people in reversed(fewest):
        for draw in first:
            yield Job(draw, SMALL, people)
    for draws in (first, *others):
        for draw in draws:
            yield Job(draw, FULL, study.people)
