"""What DP-SGD costs each row: the mechanism that a training is, its steps, and the noise with which all rounds fit a promise.

A row is one training row as it stands after cleaning, splitting and dropping what cannot be learnt from: one text, one question
with its answer, one answer of a conversation. Two neighbouring sets of rows differ by one row that is there or not. Each step
takes each row with probability ``batch / rows`` (Poisson sampling), so a step is a sampled Gaussian mechanism of sensitivity
``clipping_norm`` (Mironov et al. 2019, arXiv:1908.10530), and a training is as many of them as it has steps.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from protocol.errors import PrivacyError
from protocol.example_privacy_settings import ExamplePrivacySettings
from protocol.plan import Plan
from protocol.privacy.accounting import Budget, Mechanism, epsilon, noise_multiplier
from protocol.training_settings import TrainingSettings

_NEAR = 0.01


@dataclass(frozen=True)
class Sampled:
    """All that the cost of a training depends on.

    Attributes:
        rows: That a step draws from.
        batch: Rows of a step, in the mean.
        noise_multiplier: Of each step's noise, over the clipping norm.
        steps: Optimizer steps.
    """

    rows: int
    batch: int
    noise_multiplier: float
    steps: int

    @property
    def mechanism(self) -> Mechanism:
        """One step."""
        batch = min(self.batch, self.rows)
        return Mechanism((self.noise_multiplier,), self.rows, batch, "all" if batch == self.rows else "poisson")

    def epsilon(self, delta: float) -> float:
        """What all of its steps together tell of one row at most."""
        return epsilon({self.mechanism: self.steps}, delta)


def batch_of(settings: TrainingSettings) -> int:
    """Rows of an optimizer step, in the mean."""
    return settings.batch_size * settings.gradient_accumulation_steps


def steps_of(settings: TrainingSettings, rows: int) -> int:
    """Optimizer steps of one training."""
    return settings.max_steps or math.ceil(settings.num_train_epochs * math.ceil(rows / batch_of(settings)))


def with_noise(plan: Plan, rows: int, rounds: int = 1) -> Plan:
    """The plan with the noise that keeps its promise over all rounds: its own, or the least.

    Args:
        plan: With ``training.example_privacy``.
        rows: That a step draws from.
        rounds: Trainings that are promised together.

    Raises:
        PrivacyError: Its own noise does not keep the promise, or ``delta`` promises nothing for so many rows.
    """
    settings, wanted = plan.training, _promise(plan)
    if wanted.delta * rows >= 1:
        raise PrivacyError(
            f"training.example_privacy.delta: found {wanted.delta:g}, expected one below 1/{rows} = {1 / rows:.3g}: to publish "
            "one row of all, drawn at random, would keep it"
        )
    batch, steps = batch_of(settings), rounds * steps_of(settings, rows)
    least = wanted.noise_multiplier or _least(rows, batch, steps, wanted.epsilon, wanted.delta)
    if (spent := Sampled(rows, batch, least, steps).epsilon(wanted.delta)) > wanted.epsilon:
        raise PrivacyError(
            f"training.example_privacy.noise_multiplier: found {least:g}, with which {steps} steps of {min(batch, rows)} of "
            f"{rows} rows cost an epsilon of {spent:.4g}, and {wanted.epsilon:g} is promised; leave it out for the least noise "
            f"({_least(rows, batch, steps, wanted.epsilon, wanted.delta):.4g}), or take fewer steps"
        )
    private = wanted.model_copy(update={"noise_multiplier": least})
    return plan.model_copy(update={"training": settings.model_copy(update={"example_privacy": private})})


def _promise(plan: Plan) -> ExamplePrivacySettings:
    if plan.training.example_privacy is None:
        raise ValueError("a plan without training.example_privacy promises nothing")
    return plan.training.example_privacy


@lru_cache(maxsize=64)
def _least(rows: int, batch: int, steps: int, budget: float, delta: float) -> float:
    """To a hundredth: of many steps, each look into the tables of loss distributions takes seconds."""
    high = noise_multiplier(lambda z: {Sampled(rows, batch, z, steps).mechanism: steps}, Budget(budget, delta), "rdp")
    low = 0.7 * high
    while high - low > _NEAR * high:
        middle = (low + high) / 2
        low, high = (low, middle) if Sampled(rows, batch, middle, steps).epsilon(delta) <= budget else (middle, high)
    return high
