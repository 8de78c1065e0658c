"""Each row's own budget at this node: asked before a training, written before its update leaves, kept over restarts.

The ledger lies in the node's ``state`` folder and is one for all federations: whoever sees several sees what all of them tell
of a row. Nothing of a training that died is released, so that it costs nothing; every update that leaves is counted, also where
a round is asked for again and the coordinator has thrown the first answer away.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from client.node import Node
from protocol.durable import alone
from protocol.errors import ConfigurationError, PrivacyError
from protocol.plan import Plan
from protocol.privacy.accounting import Budget
from protocol.privacy.ledger import PrivacyLedger
from protocol.strict import changed
from strategies.example_budget import Sampled, batch_of, steps_of, with_noise

log = logging.getLogger("flwr")
FILE = "example-privacy.jsonl"


class ExampleLedger:
    """What a node's rows have told, held against a plan's promise.

    Args:
        plan: With ``training.example_privacy``.
        node: Its ``state`` keeps the ledger.
        rows: That a step draws from.
        rounds: Of the whole federation.

    Raises:
        ConfigurationError: The node has no ``state``, or would show one row several times.
        PrivacyError: The plan does not keep its own promise with so many rows.
    """

    def __init__(self, plan: Plan, node: Node, rows: int, rounds: int) -> None:
        _fit_for_it(plan, node)
        self.plan = with_noise(plan, rows, rounds)
        promised = self.plan.training.example_privacy
        if node.state is None or promised is None or promised.noise_multiplier is None:
            raise ValueError("checked above")
        self._path, self._budget, self._rounds = node.state / FILE, Budget(promised.epsilon, promised.delta), rounds
        settings = plan.training
        self._one = Sampled(rows, batch_of(settings), promised.noise_multiplier, steps_of(settings, rows))

    def check(self) -> None:
        """Refuses a training that the budget does not allow.

        Raises:
            PrivacyError: It is spent, or the ledger is not what was written.
        """
        with self._opened(self._one) as ledger:
            step, steps = self._one.mechanism, self._one.steps
            if not ledger.affords(step, steps):
                raise PrivacyError(
                    f"{self._path}: {steps} steps on {self._one.rows} rows would bring epsilon from {ledger.epsilon():.4g} to "
                    f"{ledger.after({step: steps}):.4g}, and {self._budget.epsilon:g} is promised each row at a delta of "
                    f"{self._budget.delta:g}; nothing is trained. Rows that were never trained on have a budget of their own, "
                    "under another state"
                )
            if ledger.entries and not ledger.affords(step, steps * self._rounds):
                log.warning("%s: the budget that is left does not last for %d rounds", self._path, self._rounds)

    def spend(self, sampled: Sampled, number: int) -> float:
        """Writes what a training told of each row. Only when this has returned may its update leave.

        Args:
            sampled: As it was done.
            number: The round's.

        Returns:
            Epsilon of all that was ever released.

        Raises:
            PrivacyError: The budget does not allow it; the update must not leave.
            OSError: The disk does not take it; the update must not leave.
        """
        with self._opened(sampled) as ledger:
            ledger.spend(sampled.mechanism, number, sampled.steps)
            return ledger.epsilon()

    @contextlib.contextmanager
    def _opened(self, sampled: Sampled) -> Iterator[PrivacyLedger]:
        """The ledger, for one process at a time; a line that a crash cut off is counted first."""
        with _alone(self._path.with_suffix(".lock")):
            ledger = PrivacyLedger(self._path, self._budget)
            ledger.mend({sampled.mechanism: 1}, sampled.steps)
            yield ledger


def spent(state: Path, plan: Plan) -> float:
    """Epsilon, at the plan's delta, of all that a node has released of each of its rows.

    Raises:
        PrivacyError: The ledger is not what was written.
    """
    promised = plan.training.example_privacy
    if promised is None:
        return 0.0
    return PrivacyLedger(state / FILE, Budget(promised.epsilon, promised.delta)).epsilon()


def _fit_for_it(plan: Plan, node: Node) -> None:
    several = "would show one row several times, and each is promised to count once; leave it out"
    problems = [f"{name}: {several}" for name in ("tasks", "replay") if getattr(node, name)]
    if changed(node.treating(plan).data, "augmentation"):
        problems.append(f"data_policy: augmentation {several}")
    if node.state is None:
        problems.append("state: missing; training.example_privacy needs a folder whose ledger outlives restarts")
    if problems:
        raise ConfigurationError("node config", problems)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Two trainings at once would each find the other's budget unspent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        path.chmod(0o600)
        alone(file.fileno())
        yield
