"""How sparsity grows over the rounds of a training run."""

import math
import warnings
from dataclasses import dataclass

from sparsekit.errors import ArgumentError, ArgumentTypeError, ScheduleWarning


@dataclass(frozen=True)
class PolynomialSchedule:
    """Sparsity that rises from `initial` to `final` along a polynomial.

    ``s(t) = final + (initial - final) * (1 - (every * floor(t / every) - start) / (rounds - start))
    ** exponent``: the gradual schedule of Zhu and Gupta (arXiv 1710.01878) in the form that
    FedSparsify uses (arXiv 2204.12430).

    Parameters
    ----------
    final : float
        Sparsity at the last round, from 0 to 1.
    rounds : int
        Last round, T; rounds are counted from 1.
    start : int
        Round at which the curve leaves `initial`. Before it nothing is pruned: ``s(t) = 0.0``.
    every : int
        The sparsity changes only at multiples of this many rounds, F.
    exponent : float
        Degree of the polynomial, n. Larger values prune earlier.
    initial : float
        Sparsity at round `start`, from 0 to `final`.

    Raises
    ------
    ArgumentError
        A value is out of range, or ``rounds <= start``.

    Warns
    -----
    ScheduleWarning
        `every` does not divide `rounds`, so the last round stays below `final`.

    Examples
    --------
    >>> schedule = PolynomialSchedule(0.95, rounds=40)
    >>> round(schedule(10), 6), schedule(40), schedule(0)
    (0.517592, 0.95, 0.0)
    """

    final: float
    rounds: int
    start: int = 1
    every: int = 1
    exponent: float = 3
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.final <= 1.0:
            raise ArgumentError(f"final: expected a sparsity from 0 to 1, got {self.final}")
        if not 0.0 <= self.initial <= self.final:
            raise ArgumentError(
                f"initial: expected a sparsity from 0 to final = {self.final}, got {self.initial}"
            )
        for name in ("rounds", "start", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"{name}: expected an int, got {value!r}")
        if self.start < 0:
            raise ArgumentError(f"start: expected a round >= 0, got {self.start}")
        if self.every < 1:
            raise ArgumentError(f"every: expected at least 1 round, got {self.every}")
        if self.rounds <= self.start:
            raise ArgumentError(
                f"rounds: expected more than start = {self.start}, got {self.rounds}; "
                "choose an earlier start or more rounds"
            )
        if not (math.isfinite(self.exponent) and self.exponent > 0):
            raise ArgumentError(f"exponent: expected a positive number, got {self.exponent}")
        if self.rounds % self.every:
            warnings.warn(
                f"every = {self.every} does not divide rounds = {self.rounds}: the last round "
                f"reaches sparsity {self(self.rounds):.4f}, not final = {self.final}",
                ScheduleWarning,
                stacklevel=3,
            )

    def __call__(self, t: int) -> float:
        """Sparsity to prune to at the end of round `t`.

        Parameters
        ----------
        t : int
            Round, counted from 1; rounds past the last one give the last one's value.

        Returns
        -------
        float
            From 0 to `final`; 0.0 (nothing is pruned) while the formula has not started.
        """
        if t < 0:
            raise ArgumentError(f"t: expected a round >= 0, got {t}")
        step = self.every * (min(t, self.rounds) // self.every)
        if step < self.start:
            return 0.0
        left = 1.0 - (step - self.start) / (self.rounds - self.start)
        return float(self.final + (self.initial - self.final) * left**self.exponent)
