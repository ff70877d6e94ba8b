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
    curve: tuple[int, ...] = (752, 1504, 3000, 6000)
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
        """Digest of all that a draw's and a fit's numbers depend on, but for seed and scale."""
        settings = {
            key: value for key, value in asdict(self).items() if key not in ("seeds", "scales")
        }
        text = json.dumps([RECIPE, settings], sort_keys=True)
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
    draws = [Draw(seed, scale) for scale in study.scales for seed in study.seeds]
    for draw in draws:
        yield from renderings(study, draw)
        for name in (*SIMPLE, SMALL):
            yield Job(draw, name, study.people)
        if draw.scale == study.scales[0]:
            for people in study.curve[:-1]:
                yield Job(draw, SMALL, people)
    for draw in draws:
        yield Job(draw, FULL, study.people)
