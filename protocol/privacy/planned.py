"""What a federation's own rounds cost: mechanisms from its settings, the noise that fits its budget, why it cannot begin."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import PrivacyError
from protocol.plan import COMPRESSED, LOW_RANK
from protocol.privacy.accounting import Budget, Mechanism, Rounds, affordable, counted, epsilon, noise_multiplier
from protocol.privacy.clipping import AdaptiveNorm
from protocol.privacy_settings import SUMMED, PrivacySettings

if TYPE_CHECKING:
    from protocol.federation import Federation

# Without other words votes get so much noise that they cost a fiftieth of what two sums do.
_BIT_NOISE = 2.5


@dataclass(frozen=True)
class PlannedRounds:
    """The rounds of a federation as an accountant sees them.

    Args:
        settings: Its privacy.
        budget: Of epsilon and delta.
        releases: Noised sums of each round, votes apart.
        nodes: How many there are to choose from.
        cohort: How many a round hears: exactly, or on average.
    """

    settings: PrivacySettings
    budget: Budget
    releases: tuple[int, ...]
    nodes: int
    cohort: int

    @classmethod
    def of(cls, federation: "Federation") -> "PlannedRounds":
        """The federation's.

        Raises:
            PrivacyError: It has no budget, or one that promises nothing.
        """
        settings, rounds = federation.privacy, federation.rounds
        if settings.epsilon is None:
            raise PrivacyError("privacy.epsilon: missing; say what all rounds together may cost")
        products = SUMMED.get(federation.aggregation.rule) == "products"
        plans = max(federation.schedules().values(), key=len)
        releases = tuple(2 if products and plan.method in (*LOW_RANK, *COMPRESSED) else 1 for plan in plans)
        known = max(rounds.minimum_nodes, rounds.cohort or 0)
        nodes = settings.nodes or known
        sampled = settings.sampling != "all"
        budget = Budget(settings.epsilon, settings.delta)
        return cls(settings, budget, releases, nodes, rounds.cohort or known if sampled else nodes)

    def mechanism(self, z: float, releases: int) -> Mechanism:
        """What a round costs.

        Args:
            z: Noise multiplier of each sum.
            releases: Sums of the round.
        """
        votes = () if (bits := self.bit_noise(z)) is None else (AdaptiveNorm(bits).noise_multiplier,)
        discrete = self.settings.noise == "nodes"
        return Mechanism(
            (*(z,) * releases, *votes), self.nodes, self.cohort, self.settings.sampling, "discrete" if discrete else "gaussian"
        )

    def bit_noise(self, z: float) -> float | None:
        """Standard deviation of the noise on the votes, in nodes; None where the norm is not learnt."""
        if self.settings.quantile is None:
            return None
        return self.settings.bit_noise or _BIT_NOISE * z

    def after(self, number: int) -> Callable[[float], Rounds]:
        """The rounds after round ``number``, by their noise multiplier."""
        return lambda z: counted(self.mechanism(z, releases) for releases in self.releases[number:])

    def noise_multiplier(self, number: int = 0, spent: Rounds | None = None) -> float:
        """The settings', or the least with which the rounds after round ``number`` fit what is left of the budget.

        Raises:
            PrivacyError: None does.
        """
        if self.settings.noise_multiplier is not None:
            return self.settings.noise_multiplier
        before = dict(spent or {})
        if not self.releases[number:]:
            return 1.0
        try:
            return noise_multiplier(lambda z: together(before, self.after(number)(z)), self.budget)
        except PrivacyError as error:
            if not before:
                raise
            raise PrivacyError(
                f"privacy: epsilon is {epsilon(before, self.budget.delta):.4g} of {self.budget.epsilon:g} at a delta of "
                f"{self.budget.delta:g}, which leaves nothing for {len(self.releases) - number} rounds; {error}"
            ) from None

    def problems(self) -> Iterator[str]:
        """Why the plan cannot begin, in numbers."""
        if not 0 < self.settings.delta < 1 / self.nodes:
            yield (
                f"privacy.delta: found {self.settings.delta:g}, expected below 1/{self.nodes} = {1 / self.nodes:.3g}: to "
                "publish all of one institution, drawn at random, would keep it; name a smaller one"
            )
            return
        z = self.settings.noise_multiplier
        cost = epsilon(self.after(0)(1e6 if z is None else z), self.budget.delta)
        if cost <= self.budget.epsilon:
            return
        if z is None:
            yield (
                f"privacy.bit_noise: found {self.settings.bit_noise:g} nodes, whose votes alone cost an epsilon of {cost:.3g} "
                f"over {len(self.releases)} rounds, the budget is {self.budget.epsilon:g}; raise it, or leave it out"
            )
            return
        buys = affordable(self.mechanism(z, max(self.releases)), self.budget)
        yield (
            f"privacy.epsilon: {len(self.releases)} rounds at a noise multiplier of {z:g} end at {cost:.4g}, the budget is "
            f"{self.budget.epsilon:g} and buys {buys} such rounds; take fewer, or leave privacy.noise_multiplier out, so that "
            "the least that fits is taken"
        )


def together(one: Rounds, other: Rounds) -> Rounds:
    """Both, added up."""
    found = dict(one)
    for mechanism, count in other.items():
        found[mechanism] = found.get(mechanism, 0) + count
    return found
