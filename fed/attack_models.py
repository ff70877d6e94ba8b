"""The attacks: classifiers that tell members from non-members by what a model says of them.

The protocol is that of Gupta et al. 2021 (PMLR 143:228-251): for each kind of feature an encoder of
one linear layer, shared between the models of the last rounds, whose logits are averaged. Of the
error alone a logistic regression is enough. Smaller batches where people are few, and the absolute
error beside prediction and age, are ours: a site here has tens of people, there a thousand.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from sparsekit.fed.attack_features import MAGNITUDES, NECK, OUTPUT, PREDICTION, Features
from sparsekit.fed.seeds import derive_seed

ERROR = "error"
ATTACKS: dict[str, tuple[str, ...]] = {
    ERROR: (PREDICTION,),
    "prediction": (PREDICTION,),
    "gradient-magnitudes": (MAGNITUDES,),
    "last-layers": (OUTPUT, NECK),
    "all": (PREDICTION, MAGNITUDES, OUTPUT, NECK),
}
"""Each attack and the kinds of feature that it sees; the first two look at no weights."""

Scorer = Callable[[Features], npt.NDArray[np.float64]]
"""From features (n, rounds, width) to a logit for each person, above 0 for "member"."""

_HIDDEN = 64
_DROPOUT = 0.5
_LEARNING_RATE = 1e-3
_LARGEST_BATCH = 64
_SMALLEST_BATCH = 8
_LEAST_STEPS = 4
_MOST_EPOCHS = 100
_PATIENCE = 20
_VALIDATION = 0.2
_FARTHEST = 10.0
_RIDGE = 1e-3


def train_attack(
    attack: str, features: Features, member: npt.NDArray[np.bool_], *, seed: int
) -> Scorer:
    """Train one attack on the attacker's own members and non-members.

    Parameters
    ----------
    attack : str
        One of `ATTACKS`.
    features : dict of ndarray, (n, rounds, width)
    member : ndarray, (n,), bool
    seed : int
        Same seed, same scores.
    """
    if attack == ERROR:
        return _train_on_error(features, member)
    groups = ATTACKS[attack]
    scales = {group: _Scale(_seen(features, group)) for group in groups}

    def inputs(given: Features) -> list[Tensor]:
        return [scales[group](_seen(given, group)) for group in groups]

    network = _train_network(inputs(features), member, seed)

    def score(given: Features) -> npt.NDArray[np.float64]:
        with torch.no_grad():
            logits: npt.NDArray[np.float64] = network(inputs(given)).double().numpy()
        return logits

    return score


def _seen(features: Features, group: str) -> npt.NDArray[np.float32]:
    """Return one kind of feature; predictions with their absolute error.

    From fewer than a thousand people the network does not learn to subtract and take a modulus.
    """
    part = features[group]
    if group != PREDICTION:
        return part
    error = np.abs(part[..., :1] - part[..., 1:])
    return np.concatenate([part, error], axis=2)


def mean_error(features: Features) -> npt.NDArray[np.float64]:
    """Return each person's absolute error in years, averaged over the rounds' models, (n,)."""
    pair = features[PREDICTION].astype(np.float64)
    error: npt.NDArray[np.float64] = np.abs(pair[..., 0] - pair[..., 1]).mean(axis=1)
    return error


def _train_on_error(features: Features, member: npt.NDArray[np.bool_]) -> Scorer:
    error = mean_error(features)
    middle, spread = float(error.mean()), float(error.std()) or 1.0
    slope, offset = fit_logistic((error - middle) / spread, member)
    return lambda given: slope * (mean_error(given) - middle) / spread + offset


def fit_logistic(x: npt.NDArray[np.float64], member: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Fit P(member) = 1 / (1 + exp(-(slope x + offset))); a slight ridge on the slope."""
    sign = np.where(member, 1.0, -1.0)

    def loss(two: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        margin = sign * (two[0] * x + two[1])
        pull = -sign / (1.0 + np.exp(np.clip(margin, -500, 500)))
        value = float(np.logaddexp(0.0, -margin).mean()) + _RIDGE * two[0] ** 2
        return value, np.array([(pull * x).mean() + 2 * _RIDGE * two[0], pull.mean()])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", options={"ftol": 1e-12})
    return float(found.x[0]), float(found.x[1])


class _Scale:
    """Brings features to mean 0 and standard deviation 1 over the attacker's own people."""

    def __init__(self, part: npt.NDArray[np.float32]) -> None:
        flat = torch.from_numpy(part).flatten(0, 1).double()
        self._middle = flat.mean(dim=0)
        spread = flat.std(dim=0, correction=0)
        self._spread = torch.where(spread > 0, spread, 1.0)

    def __call__(self, part: npt.NDArray[np.float32]) -> Tensor:
        scaled = (torch.from_numpy(part).double() - self._middle) / self._spread
        # What hardly moves at the attacker's site may be far off at another.
        return scaled.clamp(-_FARTHEST, _FARTHEST).float()


class _Network(nn.Module):
    """One encoder for each kind of feature, dropout, one logit, averaged over rounds."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(nn.Linear(width, _HIDDEN) for width in widths)
        self.head = nn.Linear(_HIDDEN * len(widths), 1)

    def forward(self, parts: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Return logits (n,) of parts (n, rounds, width); drops only if given a generator."""
        codes = [encode(part) for encode, part in zip(self.encoders, parts, strict=True)]
        x = functional.relu(torch.cat(codes, dim=2))
        if generator is not None:
            keep = torch.empty_like(x).bernoulli_(1 - _DROPOUT, generator=generator)
            x = x * keep / (1 - _DROPOUT)
        logits: Tensor = self.head(x)
        return logits.squeeze(2).mean(dim=1)


def _train_network(parts: Sequence[Tensor], member: npt.NDArray[np.bool_], seed: int) -> _Network:
    """Train with Adam; of all epochs, the one with the least loss on a fifth of the people."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "attack", "start"))
        network = _Network([part.shape[2] for part in parts])
    generator = torch.Generator().manual_seed(derive_seed(seed, "attack", "dropout"))
    random = np.random.default_rng(derive_seed(seed, "attack", "order"))
    truth = torch.from_numpy(member).float()
    held = _held_out(member, random)
    learned = np.flatnonzero(~held)
    aside = torch.from_numpy(held)
    held_parts, held_truth = [part[aside] for part in parts], truth[aside]
    optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    batch_size = min(_LARGEST_BATCH, max(_SMALLEST_BATCH, len(learned) // _LEAST_STEPS))
    least, since = float("inf"), 0
    best = copy.deepcopy(network.state_dict())
    for _ in range(_MOST_EPOCHS):
        order = random.permutation(learned)
        for start in range(0, len(order), batch_size):
            batch = torch.from_numpy(order[start : start + batch_size])
            optimizer.zero_grad(set_to_none=True)
            logits = network([part[batch] for part in parts], generator)
            functional.binary_cross_entropy_with_logits(logits, truth[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = network(held_parts)
            loss = float(functional.binary_cross_entropy_with_logits(logits, held_truth))
        if loss < least:
            least, since = loss, 0
            best = copy.deepcopy(network.state_dict())
        else:
            since += 1
            if since == _PATIENCE:
                break
    network.load_state_dict(best)
    return network


def _held_out(member: npt.NDArray[np.bool_], random: np.random.Generator) -> npt.NDArray[np.bool_]:
    held = np.zeros(len(member), bool)
    for side in (True, False):
        people = np.flatnonzero(member == side)
        held[random.permutation(people)[: max(1, round(_VALIDATION * len(people)))]] = True
    return held
