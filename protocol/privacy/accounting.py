"""What a plan of rounds costs: epsilon at a delta, by ``dp-accounting``; which noise reaches one; how many rounds it buys.

The record that is protected is a node: all that its rows did to every update that it ever sends. Each round adds the clipped
updates of a cohort up and releases the sum with noise; a noise multiplier is the noise's standard deviation over the norm ``C``
that an update is clipped to. How the cohort is chosen says what two neighbouring federations are, and what a sum may differ by:

- ``all``: one node's updates, or zeros in their place; C.
- ``poisson``: the same, and each node takes part in a round with probability cohort / nodes (Mironov et al. 2019,
  arXiv:1908.10530); C.
- ``fixed``: one node replaced by another, in cohorts of one known size (Wang et al. 2019, arXiv:1808.00087, theorem 27); 2 C,
  for one update goes and another comes. ``dp-accounting`` wants the multiplier over this sensitivity, and is given half of
  ours.

All that a round releases about one cohort (both phases of a sketch, the clipping's quantile bit) is one Gaussian mechanism of
multiplier ``(sum_i z_i^-2)^(-1/2)``, though each release may depend on those before it (Dong, Roth and Su 2019,
arXiv:1905.02383, section 3.2), and that one is sampled, for the cohort is the same.

Sampling protects from those who do not see who took part and cannot work it out: a cohort drawn from a seed that is published
protects from nobody. The coordinator sees it: where nodes add their own noise inside a secure sum (``discrete``), which is what
protects from the coordinator, every round counts whole.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from dp_accounting import dp_event, pld, rdp
from dp_accounting.gaussian_mechanism import get_epsilon_gaussian
from dp_accounting.mechanism_calibration import (
    BracketInterval,
    ExplicitBracketInterval,
    LowerEndpointAndGuess,
    NoBracketIntervalFoundError,
    calibrate_dp_mechanism,
)
from dp_accounting.privacy_accountant import NeighboringRelation, PrivacyAccountant

from protocol.errors import PrivacyError

Sampling = Literal["all", "poisson", "fixed"]
Accountant = Literal["rdp", "pld"]
# Beyond it an epsilon promises nothing, and the distribution of so large a loss only fills the memory.
_LARGEST_BY_PLD = 50.0
_MOST_EPSILON = 1e3
_LEAST_NOISE = 1e-6  # below it, as above its inverse squared, squares leave the range of floats
_MOST_ROUNDS = 1_000_000
_MOST_NOISE = 1024.0  # for what is left of a budget: beyond it nothing of a sum is seen
# To which a multiplier is searched: a look into tables takes seconds.
_STEP: Mapping[Accountant, float] = {"rdp": 1e-6, "pld": 1e-4}
# An order that it leaves out makes a bound looser and nothing wrong; it says so for each of them, each time.
logging.getLogger("absl").addFilter(lambda record: "Excluding this order" not in str(record.msg))


@dataclass(frozen=True)
class Mechanism:
    """What one round releases about its cohort.

    Args:
        noise_multipliers: Of each release, standard deviation of the noise over the norm that bounds a node's part in it.
        nodes: How many there are to choose from.
        cohort: How many take part: with ``fixed`` exactly, with ``poisson`` on average.
        sampling: How they are chosen.
        noise: ``discrete`` for the nodes' own noise inside a secure sum, which is proven as concentrated differential privacy.

    Raises:
        PrivacyError: Numbers that make no mechanism.
    """

    noise_multipliers: tuple[float, ...]
    nodes: int
    cohort: int
    sampling: Sampling = "all"
    noise: Literal["gaussian", "discrete"] = "gaussian"

    def __post_init__(self) -> None:
        problems = []
        if not self.noise_multipliers or not all(_LEAST_NOISE <= z < 1 / _LEAST_NOISE**2 for z in self.noise_multipliers):
            told = ", ".join(f"{z:g}" for z in self.noise_multipliers) or "none"
            problems.append(
                f"noise_multipliers: found {told}; expected positive numbers, {_LEAST_NOISE:g} at least, one for each release "
                "of a round"
            )
        if self.nodes < 1 or not 1 <= self.cohort <= self.nodes:
            problems.append(
                f"cohort: found {self.cohort} of {self.nodes} nodes; expected 1 to all of them, a sampling rate of at most 1"
            )
        elif self.sampling == "all" and self.cohort != self.nodes:
            problems.append(
                f"sampling: found all beside a cohort of {self.cohort} of {self.nodes} nodes; take poisson or fixed, or count "
                f"every round as if all took part (a cohort of {self.nodes})"
            )
        if self.noise == "discrete" and self.sampling != "all":
            problems.append(
                f"sampling: found {self.sampling} beside the nodes' own noise; the coordinator, from which that protects, "
                "knows the cohort; take all"
            )
        if problems:
            raise PrivacyError(f"privacy: {'; '.join(problems)}")

    @property
    def noise_multiplier(self) -> float:
        """Of the one release that costs what all of the round's do together."""
        return float(math.fsum(z**-2 for z in self.noise_multipliers) ** -0.5)

    def event(self) -> dp_event.DpEvent:
        """The round as ``dp-accounting`` describes it."""
        z = self.noise_multiplier
        if self.noise == "discrete":
            return dp_event.ZCDpEvent(rho=0.5 / z**2)
        if self.sampling == "poisson":
            return dp_event.PoissonSampledDpEvent(self.cohort / self.nodes, dp_event.GaussianDpEvent(z))
        if self.sampling == "fixed":
            return dp_event.SampledWithoutReplacementDpEvent(self.nodes, self.cohort, dp_event.GaussianDpEvent(z / 2))
        return dp_event.GaussianDpEvent(z)


Rounds = Mapping[Mechanism, int]


@dataclass(frozen=True)
class Budget:
    """What may be spent: whatever is released is at most ``exp(epsilon)`` times as likely with a node, but for ``delta``.

    Raises:
        PrivacyError: Not a positive epsilon of at most 1000, or a delta that is no probability.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= _MOST_EPSILON:  # far above, where nothing is promised, no search for the noise ends
            raise PrivacyError(
                f"privacy: found an epsilon of {self.epsilon:g}; expected a positive number, {_MOST_EPSILON:g} at most"
            )
        _check_delta(self.delta, 1)


def counted(rounds: Iterable[Mechanism]) -> dict[Mechanism, int]:
    """How many there are of each kind."""
    found: dict[Mechanism, int] = {}
    for mechanism in rounds:
        found[mechanism] = found.get(mechanism, 0) + 1
    return found


def epsilon(rounds: Rounds, delta: float, accountant: Accountant | None = None) -> float:
    """What rounds cost together.

    Args:
        rounds: How many of each kind.
        delta: At which.
        accountant: Renyi differential privacy or privacy loss distributions; without it the second where it knows all rounds.

    Returns:
        Epsilon. Both accountants bound the same thing; of ``pld`` the smaller of the two comes back, for the other may be the
        tighter below its discretisation (1e-4), and stands in above 50, where its tables outgrow the memory. Where all take
        part in every round the loss is Gaussian, and its epsilon exact (Balle and Wang 2018, arXiv:1805.06530, theorem 8).

    Raises:
        PrivacyError: A delta that promises nothing, kinds of rounds whose neighbours differ, or an accountant that does not
            know a kind.
    """
    used = {mechanism: count for mechanism, count in rounds.items() if count}
    _check_delta(delta, max((mechanism.nodes for mechanism in used), default=1))
    by, by_rdp = _chosen(used, accountant), _bound("rdp", used, delta)
    if by == "rdp" or (by_rdp > _LARGEST_BY_PLD and not _whole(used)):
        return by_rdp
    return min(by_rdp, _bound("pld", used, delta))


def noise_multiplier(rounds: Callable[[float], Rounds], budget: Budget, accountant: Accountant | None = None) -> float:
    """The least noise with which rounds stay within a budget.

    Args:
        rounds: What is released with a multiplier; noise that does not depend on it (a quantile bit's) stays as it is.
        budget: To stay within.
        accountant: As for ``epsilon``.

    Returns:
        A multiplier at most 1e-4 above the least.

    Raises:
        PrivacyError: None reaches it.
    """
    _check_delta(budget.delta, max((mechanism.nodes for mechanism in rounds(1.0)), default=1))
    by = _chosen(rounds(1.0), accountant)
    try:
        found = _calibrated("rdp", rounds, budget, LowerEndpointAndGuess(1e-3, 1.0))
    except PrivacyError:
        # What was spent before may be all that Renyi's looser bound allows, and leave something by the tighter one.
        found = 1.0
        while by == "pld" and found < _MOST_NOISE and epsilon(rounds(found), budget.delta) > budget.epsilon:
            found *= 2
        if by == "rdp" or found >= _MOST_NOISE:
            raise
    if by == "rdp":
        return found
    if _bound("pld", rounds(found), budget.delta) >= budget.epsilon:  # below its discretisation
        return found
    lower = 0.8 * found
    while epsilon(rounds(lower), budget.delta) <= budget.epsilon:
        lower *= 0.8
    return _calibrated("pld", rounds, budget, ExplicitBracketInterval(lower, found))


def affordable(mechanism: Mechanism, budget: Budget, spent: Rounds | None = None, accountant: Accountant | None = None) -> int:
    """How many more rounds a budget allows, at most a million."""

    def fits(more: int) -> bool:
        together = dict(spent or {})
        together[mechanism] = together.get(mechanism, 0) + more
        return epsilon(together, budget.delta, accountant) <= budget.epsilon

    if (accountant or _chosen([mechanism, *(spent or {})], None)) == "pld":
        low = affordable(mechanism, budget, spent, "rdp")  # never more, and soon found
    else:
        low = 0
    step = 1 + low // 8
    while low < _MOST_ROUNDS and fits(low + step):
        low, step = low + step, 2 * step
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, _MOST_ROUNDS)


def _check_delta(delta: float, nodes: int) -> None:
    if not 0 < delta < 1 / nodes:
        raise PrivacyError(
            f"privacy: found a delta of {delta:g}; expected one above 0 and below 1/{nodes} = {1 / nodes:.3g}: to publish all "
            "of one node, drawn at random, would keep it"
        )


def _chosen(rounds: Iterable[Mechanism], accountant: Accountant | None) -> Accountant:
    only_rdp = any(mechanism.sampling == "fixed" or mechanism.noise == "discrete" for mechanism in rounds)
    if accountant == "pld" and only_rdp:
        raise PrivacyError("privacy: pld knows neither cohorts of a fixed size nor discrete noise; take rdp")
    return accountant or ("rdp" if only_rdp else "pld")


def _whole(rounds: Rounds) -> bool:
    return all(mechanism.sampling == "all" for mechanism in rounds)


def _relation(rounds: Rounds) -> NeighboringRelation:
    fixed = {mechanism.sampling == "fixed" for mechanism in rounds}
    if len(fixed) > 1:
        raise PrivacyError(
            "privacy: cohorts of a fixed size beside others; the ones compare a node with another in its place, the others "
            "with none, and their epsilons do not add up; take one kind of sampling"
        )
    return NeighboringRelation.REPLACE_ONE if True in fixed else NeighboringRelation.ADD_OR_REMOVE_ONE


class _Gaussian(PrivacyAccountant):  # type: ignore[misc]
    """Of Gaussian noise on what all take part in: one Gaussian mechanism, whose loss needs no table."""

    def __init__(self) -> None:
        super().__init__(NeighboringRelation.ADD_OR_REMOVE_ONE)
        self._inverse_variance = 0.0

    def _maybe_compose(self, event: dp_event.DpEvent, count: int, do_compose: bool) -> None:
        for kind in event.events if do_compose else ():
            self._inverse_variance += count * kind.count / kind.event.noise_multiplier**2

    def get_epsilon(self, target_delta: float) -> float:
        return float(get_epsilon_gaussian(self._inverse_variance**-0.5, target_delta))


def _accountant(by: Accountant, rounds: Rounds) -> PrivacyAccountant:
    if by == "pld" and _whole(rounds):
        return _Gaussian()
    kind = rdp.RdpAccountant if by == "rdp" else pld.PLDAccountant
    return kind(neighboring_relation=_relation(rounds))


def _event(rounds: Rounds) -> dp_event.DpEvent:
    return dp_event.ComposedDpEvent([dp_event.SelfComposedDpEvent(mech.event(), count) for mech, count in rounds.items()])


def _bound(by: Accountant, rounds: Rounds, delta: float) -> float:
    return _computed(by, frozenset(rounds.items()), delta) if rounds else 0.0


@lru_cache(maxsize=256)
def _computed(by: Accountant, rounds: frozenset[tuple[Mechanism, int]], delta: float) -> float:
    ordered = dict(sorted(rounds, key=repr))  # so that it does not depend on how strings are hashed today
    return float(_accountant(by, ordered).compose(_event(ordered)).get_epsilon(delta))


def _calibrated(by: Accountant, rounds: Callable[[float], Rounds], budget: Budget, bracket: BracketInterval) -> float:
    try:
        return float(
            calibrate_dp_mechanism(
                lambda: _accountant(by, rounds(1.0)),
                lambda z: _event(rounds(z)),
                budget.epsilon,
                budget.delta,
                bracket,
                tol=_STEP[by],
            )
        )
    except NoBracketIntervalFoundError:
        least = _bound(by, rounds(1e6), budget.delta)
        raise PrivacyError(
            f"privacy: no noise on the sums reaches an epsilon of {budget.epsilon:g}; what else is released costs {least:.3g} "
            "alone; give that more noise, or take fewer rounds"
        ) from None
