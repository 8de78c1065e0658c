"""What a federation's rounds spend of its privacy budget: the noise of the next one, and the line that is written before it."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from typing import Any

from protocol.errors import BudgetSpentError, PrivacyError
from protocol.federation import Federation
from protocol.privacy.accounting import Mechanism
from protocol.privacy.clipping import AdaptiveNorm
from protocol.privacy.ledger import FILE, PrivacyLedger
from protocol.privacy.planned import PlannedRounds
from protocol.privacy.promise import Promise

log = logging.getLogger("flwr")


class Spending:
    """The privacy of one federation, from round to round.

    Args:
        federation: Its ``privacy`` is enabled.

    Raises:
        PrivacyError: The ledger is none, or somebody changed it.
        OSError: It cannot be read.
    """

    def __init__(self, federation: Federation) -> None:
        self.settings = federation.privacy
        self.planned = PlannedRounds.of(federation)
        self.ledger = PrivacyLedger(self.settings.ledger or federation.output / FILE, self.planned.budget)
        self._width = self.settings.width or federation.aggregation.rank_cap
        self._cohort = federation.rounds.cohort
        self._norm = self.settings.clipping_norm
        self._z = self.settings.noise_multiplier or 0.0  # 0: not chosen yet

    @property
    def width(self) -> int:
        """Columns of a sketch."""
        return self._width

    def begin(self, done: int) -> None:
        """Looks into the ledger before anything is sent, in every process.

        A run that goes on after round ``done`` may have spent more than was planned, for what crashed is paid for: it goes on
        while it can. One that has not begun must be able to end.

        Raises:
            PrivacyError: It cannot, or the ledger misses releases.
        """
        self._choose(done)
        self.ledger.mend(self._plan(done))
        self._choose(done)  # what was cut off may have cost more than it was planned for
        self.ledger.begin({} if done else self._plan(done), released=done)
        total = self.ledger.after(self._plan(done))
        log.warning(
            "privacy: epsilon %.4g of %.4g is spent at a delta of %g, every round done it is %.4g; noise multiplier %.4g",
            self.ledger.epsilon(),
            self.planned.budget.epsilon,
            self.planned.budget.delta,
            total,
            self._z,
        )

    def prepare(self, number: int) -> None:
        """Makes sure that an attempt at round ``number`` can be released.

        Where earlier attempts have cost what was planned for later rounds, and the federation names no noise of its own, the
        least with which all rounds left fit is chosen anew.

        Raises:
            BudgetSpentError: It cannot.
        """
        budget = self.planned.budget
        if self.ledger.after(self._plan(number - 1)) > budget.epsilon and self.ledger.epsilon() < budget.epsilon:
            self._choose(number - 1)
        self._afford(self.planned.mechanism(self._z, self.planned.releases[number - 1]))

    def promise(self) -> Promise:
        """What nodes are told of the next round."""
        return Promise(
            epsilon=self.planned.budget.epsilon,
            delta=self.planned.budget.delta,
            clipping_norm=self._norm,
            noise_multiplier=self._z,
            noise=self.settings.noise,
            colluders=self.settings.colluders,
            bit_noise=self.planned.bit_noise(self._z),
        )

    def expected(self, asked: int) -> int:
        """By how many a sum is divided: nothing that a node does decides it.

        Args:
            asked: How many nodes were asked in this round; it counts where neither a cohort nor a number of nodes is settled.
        """
        return self._cohort or self.settings.nodes or asked

    def spend(self, number: int, releases: int) -> None:
        """Writes that so many sums of round ``number`` are released. Only when this has returned may they be.

        Raises:
            BudgetSpentError: The budget does not allow it; nothing is written.
            OSError: The disk does not take it; nothing may be released.
        """
        mechanism = self.planned.mechanism(self._z, releases)
        self._afford(mechanism)
        self.ledger.spend(mechanism, number)

    def figures(self) -> dict[str, float]:
        """What the newest release was made with, and what all have cost; for the round's record."""
        return {
            "epsilon": self.ledger.epsilon(),
            "delta": self.planned.budget.delta,
            "budget": self.planned.budget.epsilon,
            "noise_multiplier": self._z,
            "clipping_norm": self._norm,
        }

    def voted(self, votes: float, expected: int) -> None:
        """Moves the norm; after ``figures``, which tell of the round that voted."""
        settings = self.settings
        if settings.quantile is None:
            return
        bits = AdaptiveNorm(self.planned.bit_noise(self._z) or 0.0, settings.quantile, settings.quantile_rate)
        self._norm = min(max(bits.after(self._norm, votes, expected), 1e-9), 1e5)

    def state(self) -> dict[str, Any]:
        """What must outlive the coordinator beside the ledger; JSON."""
        return {"norm": self._norm, "noise_multiplier": self._z}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts ``state()`` of an earlier process back."""
        self._norm, self._z = float(state["norm"]), float(state["noise_multiplier"])

    def _plan(self, done: int) -> dict[Mechanism, int]:
        return dict(self.planned.after(done)(self._z))

    def _choose(self, done: int) -> None:
        """The run's noise so far while it fits, so that rounds after a restart are as those before it."""
        if self._z and self.ledger.after(self._plan(done)) <= self.planned.budget.epsilon:
            return
        # What is left may be too little for all rounds left and yet enough for the next.
        with suppress(PrivacyError) if done and self._z else nullcontext():
            self._z = self.planned.noise_multiplier(done, self.ledger.spent())

    def _afford(self, mechanism: Mechanism) -> None:
        if self.ledger.affords(mechanism):
            return
        raise BudgetSpentError(
            f"the privacy budget is spent: epsilon is {self.ledger.epsilon():.4g} of {self.planned.budget.epsilon:g} at a "
            f"delta of {self.planned.budget.delta:g}, and one more round would bring it to "
            f"{self.ledger.after({mechanism: 1}):.4g}"
        )
