"""Which sites take part in a round: drawn from the run's seed, the same on every engine."""

import math
from collections.abc import Iterable

from sparsekit.errors import UsageError
from sparsekit.fed.config import RunConfig
from sparsekit.fed.seeds import derive_seed


def drawn_sites(config: RunConfig, round_number: int, sites: Iterable[str]) -> list[str]:
    """Return the sites that a round asks, sorted by name.

    The final hand-out, round ``rounds + 1``, goes to all. The draw depends on the seed, the round
    and the names alone, so that a resumed run asks the same sites.

    Raises
    ------
    UsageError
        If more sites are to be drawn than there are.
    """
    names = sorted(sites)
    count = _count(config, len(names))
    if round_number > config.rounds or count == len(names):
        return names
    lots = {site: derive_seed(config.seed, "participants", round_number, site) for site in names}
    return sorted(sorted(names, key=lambda site: (lots[site], site))[:count])


def _count(config: RunConfig, total: int) -> int:
    if config.strategy == "centralized":
        return total
    if config.sites_per_round > total:
        raise UsageError(
            f"sites_per_round: expected at most {total}, the number of sites, got "
            f"{config.sites_per_round}"
        )
    # A hair less, so that 0.1 of 10 sites is one and not two.
    return config.sites_per_round or max(1, math.ceil(config.participation * total - 1e-9))
