"""Who is at which site: the three environments of the FedSparsify papers, for any size.

The profiles are aggregates (size, mean and SD of age per learner) of the 8-site UK Biobank
partitions published with the code of Gupta et al. 2021 (PMLR 143:228-251) and of FedSparsify
(arXiv 2208.11669). No participant of theirs is in here.
"""

from dataclasses import dataclass

from sparsekit.errors import UsageError

ENVIRONMENTS = ("uniform-iid", "uniform-noniid", "skewed-noniid")
"""Names that `plan_sites` and ``sparsekit cohort make --environment`` know."""

MIN_PEOPLE_PER_SITE = 4
"""A site needs a test subject and a few to train on."""

AGE_RANGE = (45.0, 82.0)
"""Youngest and oldest age in years; every age distribution is cut to it."""

SKEW_RATIO = 1.355
"""Each site of the skewed environment has this many times the people of the next."""

_IID_AGES = ((62.7, 7.4),)
_UNIFORM_NONIID_AGES = (
    (55.4, 5.2),
    (60.5, 5.6),
    (65.8, 5.3),
    (68.8, 5.2),
    (55.4, 5.2),
    (60.5, 5.9),
    (66.0, 5.4),
    (68.8, 4.9),
)
_SKEWED_NONIID_AGES = (
    (66.5, 4.9),
    (64.5, 5.3),
    (58.4, 5.4),
    (53.5, 3.7),
    (70.8, 4.1),
    (65.9, 6.7),
    (56.5, 6.1),
    (51.6, 3.4),
)
_AGES = dict(zip(ENVIRONMENTS, (_IID_AGES, _UNIFORM_NONIID_AGES, _SKEWED_NONIID_AGES), strict=True))
_IXI_SITES = (("guys", 282), ("hh", 181), ("iop", 55))
_IXI_AGE_RANGE = (20.0, 86.0)
_PAPER_SKEWED_SIZES = (2401, 1765, 1303, 964, 714, 528, 391, 290)


@dataclass(frozen=True)
class SitePlan:
    """One site before anybody is drawn.

    Attributes
    ----------
    label : str
        ``site-1`` and so on.
    people : int
        Number of participants, at least `MIN_PEOPLE_PER_SITE`.
    age_mean, age_sd : float
        Of the normal distribution of age in years before it is cut.
    age_range : tuple of two float
        What it is cut to.
    ixi_site : int, optional
        Position of the site of IXI whose volumes the site has (Guy's, HH, IOP); by default the
        site draws its own.
    """

    label: str
    people: int
    age_mean: float
    age_sd: float
    age_range: tuple[float, float] = AGE_RANGE
    ixi_site: int | None = None


def plan_sites(environment: str, *, subjects: int, sites: int) -> tuple[SitePlan, ...]:
    """Share the subjects out over the sites and give each site its ages.

    Sizes: equal (the first sites take the remainder), or in the skewed environment those of the
    paper for 8 sites and falling by `SKEW_RATIO` from site to site for any other number, scaled
    to ``subjects`` with at least `MIN_PEOPLE_PER_SITE` each. Ages: site k takes the paper's
    learner k, and from the ninth site on the eight profiles repeat.

    Parameters
    ----------
    environment : str
        One of `ENVIRONMENTS`.
    subjects : int
        Participants in all, at least `MIN_PEOPLE_PER_SITE` per site.
    sites : int
        Number of sites, at least 1.

    Returns
    -------
    tuple of SitePlan
        ``sites`` plans whose sizes sum to ``subjects``.

    Raises
    ------
    UsageError
        If the environment is unknown, or there are too few sites or subjects.
    """
    if environment not in ENVIRONMENTS:
        raise UsageError(
            f"environment: unknown name {environment!r}; choose {', '.join(ENVIRONMENTS)}"
        )
    if sites < 1:
        raise UsageError(f"sites: expected at least 1, got {sites}")
    if subjects < MIN_PEOPLE_PER_SITE * sites:
        raise UsageError(
            f"subjects: {sites} sites need at least {MIN_PEOPLE_PER_SITE * sites} people "
            f"({MIN_PEOPLE_PER_SITE} each), got {subjects}; "
            "ask for more subjects or fewer sites"
        )
    if environment != "skewed-noniid":
        weights = [1.0] * sites
    elif sites == len(_PAPER_SKEWED_SIZES):
        weights = [float(size) for size in _PAPER_SKEWED_SIZES]
    else:
        weights = [SKEW_RATIO**-site for site in range(sites)]
    ages = _AGES[environment]
    return tuple(
        SitePlan(f"site-{site + 1}", people, *ages[site % len(ages)])
        for site, people in enumerate(_share(subjects, weights))
    )


def plan_ixi(subjects: int) -> tuple[SitePlan, ...]:
    """Lay out the three sites of the IXI data set, to compare a cohort with its fitted table.

    Sizes are in the proportion of the 518 people of the fit. Ages are uniform over their range,
    20 to 86 years, at every site: the ages of the real sites are not part of the table.

    Parameters
    ----------
    subjects : int
        Participants in all.

    Returns
    -------
    tuple of SitePlan
        Guy's, HH and IOP.

    Raises
    ------
    UsageError
        If there are too few subjects.
    """
    if subjects < MIN_PEOPLE_PER_SITE * len(_IXI_SITES):
        raise UsageError(
            f"subjects: the three sites of IXI need at least "
            f"{MIN_PEOPLE_PER_SITE * len(_IXI_SITES)} people, got {subjects}"
        )
    # So wide a normal distribution is flat between the limits.
    middle, wide = sum(_IXI_AGE_RANGE) / 2, 1e4
    sizes = _share(subjects, [float(people) for _, people in _IXI_SITES])
    return tuple(
        SitePlan(label, people, middle, wide, _IXI_AGE_RANGE, site)
        for site, ((label, _), people) in enumerate(zip(_IXI_SITES, sizes, strict=True))
    )


def _share(subjects: int, weights: list[float]) -> list[int]:
    """Split by largest remainder after everybody's minimum; earlier sites win ties."""
    shares = [subjects * weight / sum(weights) for weight in weights]
    # Sites below the minimum are lifted to it; the others share what is left, in proportion.
    small = {site for site, share in enumerate(shares) if share < MIN_PEOPLE_PER_SITE}
    while True:
        rest = subjects - MIN_PEOPLE_PER_SITE * len(small)
        weight_left = sum(weight for site, weight in enumerate(weights) if site not in small)
        shares = [
            float(MIN_PEOPLE_PER_SITE) if site in small else rest * weight / weight_left
            for site, weight in enumerate(weights)
        ]
        lifted = {site for site, share in enumerate(shares) if share < MIN_PEOPLE_PER_SITE - 1e-9}
        if not lifted:
            break
        small |= lifted
    sizes = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda site: sizes[site] - shares[site])
    for site in by_remainder[: subjects - sum(sizes)]:
        sizes[site] += 1
    return sizes
