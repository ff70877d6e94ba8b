"""Who a membership audit asks about: as many trained-on as held-out people, of like ages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from sparsekit.fed.prepare import PooledScans
from sparsekit.fed.seeds import derive_seed
from sparsekit.fed.site import SitePeople
from sparsekit.fed.training import Scans

AGE_STRATA = 4
LEAST_PEOPLE = 5
"""Fewest members, and non-members, with which a site takes part."""


@dataclass(frozen=True)
class Asked:
    """The people of one site that an audit asks about, members first.

    Attributes
    ----------
    site : str
    scans : Scans
        All scans of the site; ``rows`` are the ones that count, one for each person.
    rows : ndarray, (n,), int64
    member : ndarray, (n,), bool
        Whether the site trained on the person; exactly half of them.
    stratum : ndarray, (n,), int64
        Age group; each holds as many members as non-members.
    """

    site: str
    scans: Scans
    rows: npt.NDArray[np.int64]
    member: npt.NDArray[np.bool_]
    stratum: npt.NDArray[np.int64]

    @property
    def ages(self) -> npt.NDArray[np.float64]:
        """Years, (n,)."""
        return self.scans.ages[self.rows].astype(np.float64)

    @property
    def digest(self) -> str:
        """Hash of who is asked about, and of who is a member."""
        names = [self.scans.participants[row] for row in self.rows]
        text = repr((self.site, list(zip(names, self.member.tolist(), strict=True))))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def shuffled(self, seed: int) -> npt.NDArray[np.bool_]:
        """Return membership dealt out anew within each age group."""
        random = np.random.default_rng(derive_seed(seed, "shuffle", self.site))
        dealt = self.member.copy()
        for one in np.unique(self.stratum):
            here = np.flatnonzero(self.stratum == one)
            dealt[here] = random.permutation(self.member[here])
        return dealt


def people_to_ask(site: SitePeople, *, seed: int = 0) -> Asked:
    """Choose as many members as non-members from each age group of a site.

    Both come from the site's own split, which is drawn without looking at ages. What is left of
    a difference by chance is removed here, so that no attack can live on age alone. A person
    with several scans counts once, with the first of them.

    Parameters
    ----------
    site : SitePeople
    seed : int
        Draws who is left out of the larger side of a group.
    """
    scans = PooledScans([site.train, site.test])
    rows = _first_scans(scans.participants)
    is_member = rows < len(site.train)
    ages = scans.ages[rows]
    edges = np.quantile(ages, np.arange(1, AGE_STRATA) / AGE_STRATA)
    stratum = np.searchsorted(edges, ages, side="right")
    random = np.random.default_rng(derive_seed(seed, "asked", site.name))
    chosen: dict[bool, list[npt.NDArray[np.int64]]] = {True: [], False: []}
    for one in range(AGE_STRATA):
        sides = {side: np.flatnonzero((stratum == one) & (is_member == side)) for side in chosen}
        count = min(map(len, sides.values()))
        for side, people in sides.items():
            chosen[side].append(np.sort(random.permutation(people)[:count]))
    order = np.concatenate(chosen[True] + chosen[False])
    return Asked(site.name, scans, rows[order], is_member[order], stratum[order].astype(np.int64))


def _first_scans(participants: Sequence[str]) -> npt.NDArray[np.int64]:
    first: dict[str, int] = {}
    for row, person in enumerate(participants):
        first.setdefault(person, row)
    return np.fromiter(first.values(), np.int64)
