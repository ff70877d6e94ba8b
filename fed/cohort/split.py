"""Hold out test people: a pure function of a seed and the people's names."""

import hashlib
from collections.abc import Sequence

import numpy as np

from sparsekit.errors import ArgumentError


def split_participants(
    participants: Sequence[str], *, seed: int, test_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Split scans into training and test scans, by person.

    Every person gets a number from a hash of seed and name, and those with the lowest numbers
    are tested on. So the order of the list, the number of scans of a person, and the machine
    make no difference.

    Parameters
    ----------
    participants : sequence of str
        The person of every scan.
    seed : int
    test_fraction : float
        Share of the people to test on, above 0 and below 1. The number of people is rounded,
        but with two people or more each side has at least one. A lone person is trained on.

    Returns
    -------
    train, test : ndarray, int64
        Ascending indices into `participants`; together they are all of it.

    Raises
    ------
    ArgumentError
        `test_fraction` is not between 0 and 1.
    """
    if not 0 < test_fraction < 1:
        raise ArgumentError(
            f"test_fraction: expected above 0 and below 1, got {test_fraction}; "
            "0.2 tests on a fifth of the people"
        )
    people = sorted(set(participants), key=lambda name: (_draw(seed, name), name))
    n_test = max(1, min(len(people) - 1, round(test_fraction * len(people))))
    tested = set(people[:n_test]) if len(people) > 1 else set()
    is_test = np.array([name in tested for name in participants], bool)
    return np.flatnonzero(~is_test).astype(np.int64), np.flatnonzero(is_test).astype(np.int64)


def _draw(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=16).digest()
