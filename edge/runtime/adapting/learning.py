"""The loop: micro-batches to steps, a look at the budget between them, a state after each, measured on held-back rows.

Everything that a step depends on is in the state (adapter, moments, step), and the order of rows follows from the seed and the
step alone: a training that was killed goes on to the same adapter, to the bit, on the same machine and threads.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from edge.runtime.adapting.adamw import AdamW, shortening
from edge.runtime.adapting.aside import Aside
from edge.runtime.adapting.budget import Meter
from edge.runtime.adapting.holdout import apart, others
from edge.runtime.adapting.passes import Example, Figures, Passes
from edge.runtime.adapting.personal import tensors, with_tensors
from edge.runtime.adapting.preference import Array
from edge.runtime.adapting.rows import Examples
from edge.runtime.adapting.state import State, Trail, check_room
from edge.runtime.gradient import Gradients
from edge.runtime.manifest import BundleManifest
from protocol.adapter import Adapter, Factors
from protocol.errors import ConfigurationError, DivergenceError, shown
from protocol.strict import Strict

Watch = Callable[[int, float], None]
# Sets of all trained tensors: start, now, best and two moments in both states and a draft, and what is put aside.
_KEPT: Final = 3 * 5 + 5


class Settings(Strict):
    """How a device learns."""

    r: PositiveInt = Field(8, le=1024, description="rank of a new adapter")
    alpha: PositiveFloat = Field(16.0, le=1e6, description="a new adapter's change is scaled by alpha / r")
    targets: tuple[str, ...] = Field(
        (), description="modules of a new adapter, by the end of their names; empty: all that can learn"
    )
    learning_rate: PositiveFloat = Field(1e-3, description="of a step, after warm-up")
    weight_decay: NonNegativeFloat = Field(0.0, le=1e3, description="decoupled, of a step")
    batch_size: PositiveInt = Field(4, le=1024, description="examples at once, in memory")
    accumulation: PositiveInt = Field(1, le=1024, description="micro-batches of a step")
    max_grad_norm: PositiveFloat = Field(1.0, description="longer gradients are shortened to it")
    warmup_steps: NonNegativeInt = Field(0, description="over which the rate climbs")
    epochs: PositiveInt = Field(3, le=10_000, description="passes over the rows, if the budget lets")
    beta: PositiveFloat = Field(0.1, le=1e6, description="DPO: how near the start it stays")
    method: Literal["gradient", "forward-only"] = Field(
        "gradient", description="forward-only steps need no more memory than an answer, and hundreds of times the steps"
    )
    perturbation: PositiveFloat = Field(1e-2, le=1e3, description="forward-only: how far both looks lie from the adapter")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the rows that measures and never trains, one at least")
    evaluate_every: PositiveInt = Field(20, description="steps between two measurements")
    patience: PositiveInt = Field(3, description="measurements without a better one after which it ends")
    replay_share: float = Field(0.5, ge=0, lt=1, description="share of a pass that are replayed rows, where there are any")
    most_forgetting: PositiveFloat | None = Field(
        None, description="by how much of itself the loss on held-back replay rows may rise before the adapter is not kept"
    )
    seed: NonNegativeInt = Field(0, description="of the order of rows and a new adapter")


@dataclass(frozen=True)
class Learnt:
    """How a training ended, or how far it came.

    Attributes:
        adapter: The best on held-back rows.
        before, after: Figures of the start and of it.
        forgot: The same on held-back replay rows, before and after; None where there are none.
        steps: All steps, of earlier processes too.
        ended: Why there are no more; empty where the budget ran out in the middle and the state waits.
        stopped: What of the budget ran out.
        said: What its user should know.
    """

    adapter: Adapter
    before: Figures
    after: Figures
    forgot: tuple[Figures, Figures] | None
    steps: int
    ended: str
    stopped: str = ""
    said: list[str] = field(default_factory=list)


def new_adapter(gradients: Gradients, settings: Settings) -> Adapter:
    """Factors whose change is zero: A uniform within 1 / sqrt(d_in), as PEFT draws it, B zero; and the base's own head.

    Raises:
        ConfigurationError: A target is the end of no module's name.
    """
    generator = np.random.default_rng(settings.seed)
    found = {end: [each for each in gradients.modules if f".{each}".endswith(f".{end}")] for end in settings.targets}
    if strange := [end for end, modules in found.items() if not modules]:
        raise ConfigurationError(
            "adapt", [f"targets: '{shown(strange[0], 100)}': none of the {len(gradients.modules)} that this bundle trains"]
        )
    chosen = {each for modules in found.values() for each in modules} or set(gradients.modules)
    factors = {}
    for module, (d_in, d_out) in gradients.modules.items():
        if module not in chosen:
            continue
        A = generator.uniform(-1, 1, (settings.r, d_in)).astype(np.float32) / np.float32(math.sqrt(d_in))
        factors[module] = Factors(A, np.zeros((d_out, settings.r), np.float32), settings.alpha / settings.r)
    return Adapter(factors, gradients.start_dense())


class Learning:
    """One training.

    Args:
        gradients: Of the bundle.
        examples: What is learnt.
        settings: How.
        start: The adapter that is trained; where a training goes on, it is the one that this began with.
        trail: Where the state is kept.
        frozen: An adapter beneath it that stays as it is; its modules' factors stand before the trained ones.
        replay: What is not to be forgotten; of the same task.
        watch: Told of each step and its loss.
    """

    def __init__(
        self,
        gradients: Gradients,
        examples: Examples,
        settings: Settings,
        start: Adapter,
        trail: Trail,
        *,
        frozen: Adapter | None = None,
        replay: Examples | None = None,
        watch: Watch = lambda step, loss: None,
    ) -> None:
        self._settings, self._task = settings, examples.task
        self._adapter, self._frozen, self._trail, self._watch = start, frozen or Adapter(), trail, watch
        kept = Aside(trail.folder)
        self._passes = Passes(gradients, self._task, settings.batch_size, beta=settings.beta, frozen=self._frozen, kept=kept)
        self._held_out, self._training = apart(examples.rows, settings.held_out)
        self._probe, self._replay = apart(others(replay.rows, examples.rows), settings.held_out) if replay else ([], [])
        self._unreplayed = bool(replay) and not self._replay
        self._optimiser = AdamW(settings.learning_rate, weight_decay=settings.weight_decay, warmup_steps=settings.warmup_steps)
        self._identity = self._identified(gradients.manifest)
        gradients.check(self._passes.whole(start))
        every = (*examples.rows, *(replay.rows if replay else ()))
        gradients.check_rows([row for rows in every for row in rows], self._passes.whole(start))

    def run(self, meter: Meter) -> Learnt:
        """Goes on until it has learnt, or the budget is spent.

        Raises:
            DivergenceError: The loss is no number any more; the state is forgotten.
            HardwareError: No room for the state.
        """
        with np.errstate(all="ignore"):  # what is no number is looked for where it matters
            return self._run(meter)

    def _run(self, meter: Meter) -> Learnt:
        check_room(self._trail.folder, _KEPT * sum(each.nbytes for each in tensors(self._adapter).values()))
        state, said = self._trail.newest()
        if self._unreplayed:
            said.append("every row to be replayed is among those that are learnt: nothing is replayed")
        if state is not None and state.facts.get("identity") != self._identity:
            said.append("a training of other rows, settings, weights or another start was unfinished here; it is given up")
            state = None
        if state is not None and not self._holds(state):
            said.append("the state of the unfinished training is not whole; it is given up")
            state = None
        if state is None:
            at = self._begun()
        else:
            at = _Place.of(state, self._trail.folder)
            self._refer_to(with_tensors(self._adapter, at.start))
        stopped = ""
        while not (ended := self._ended(at)) and not (stopped := meter.over()):
            stepped = self._step(at, meter)
            if stepped is None:
                stopped = meter.over() or "the budget"
                break
            at = stepped
            meter.steps += 1
            if at.step % self._settings.evaluate_every == 0:
                at = self._measured(at)
            self._trail.keep(at.state(self._identity))
        if stopped and not at.step:
            self._trail.keep(at.state(self._identity))  # or a short budget would go into the first measurement each time
        if at.step % self._settings.evaluate_every:
            at = self._measured(at)
        best = with_tensors(self._adapter, at.best)
        forgot = None
        if self._probe:
            forgot = self.measure(with_tensors(self._adapter, at.start), self._probe), self.measure(best, self._probe)
        return Learnt(best, at.before, at.found, forgot, at.step, ended, stopped, said)

    @property
    def has_held_out(self) -> bool:
        """Whether there are rows that measure."""
        return bool(self._held_out)

    def held_back(self, adapter: Adapter) -> Figures:
        """Figures of an adapter on the rows that never train."""
        return self.measure(adapter, self._held_out)

    def measure(self, adapter: Adapter, examples: Sequence[Example]) -> Figures:
        """Figures of an adapter on rows; of none the loss is 0."""
        return self._passes.figures(adapter, examples)

    # One step -----------------------------------------------------------------------------------------------------------

    def _step(self, at: "_Place", meter: Meter) -> "_Place | None":
        """The next place; None where the budget was spent on the way, and nothing of the step is kept."""
        examples = self._drawn(at.step)
        self._adapter = adapter = with_tensors(self._adapter, at.tensors)
        if self._settings.method == "gradient":
            loss = self._passes.gradient(adapter, examples, at.gradients, meter.over)
        else:
            loss = self._looked(adapter, examples, at, meter)
        if loss is None:
            return None
        shortened = shortening(at.gradients.values(), self._settings.max_grad_norm)
        if math.isfinite(loss) and math.isfinite(shortened):
            self._optimiser.step(at.tensors, at.gradients, at.moments, at.step + 1, shortened)
        if not (math.isfinite(loss) and math.isfinite(shortened) and _finite(at.tensors)):
            self._trail.forget()
            raise DivergenceError(
                f"step {at.step + 1}: the loss or a weight is no number any more; lower the learning rate; nothing is kept"
            )
        self._watch(at.step + 1, loss)
        return replace(at, step=at.step + 1)

    def _looked(self, adapter: Adapter, examples: Sequence[Example], at: "_Place", meter: Meter) -> float | None:
        """A gradient's estimate from two looks along one drawn direction (Malladi et al. 2023, arXiv:2305.17333, eq. 1)."""
        generator = np.random.default_rng((self._settings.seed, at.step))
        direction = {name: generator.standard_normal(each.shape, np.float32) for name, each in at.tensors.items()}
        step, losses = np.float32(self._settings.perturbation), []
        for sign in (1, -1):
            moved = with_tensors(adapter, {name: each + sign * step * direction[name] for name, each in at.tensors.items()})
            if meter.over():
                return None
            losses.append(self.measure(moved, examples).loss)
        slope = np.float32((losses[0] - losses[1]) / (2 * float(step)))
        at.gradients.update({name: slope * each for name, each in direction.items()})
        return sum(losses) / 2

    # Where it stands ------------------------------------------------------------------------------------------------------

    def _refer_to(self, start: Adapter) -> None:
        if self._task == "dpo":  # nothing else needs it in memory
            self._passes.refer_to(self._passes.whole(start))

    def _begun(self) -> "_Place":
        self._refer_to(self._adapter)
        own, folder = {name: each.copy() for name, each in tensors(self._adapter).items()}, self._trail.folder
        before = self.measure(self._adapter, self._held_out)
        moments = Aside(folder, self._optimiser.start(own))
        return _Place(0, Aside(folder, own), own, moments, Aside(folder), Aside(folder, own), before, before, 0)

    def _ended(self, at: "_Place") -> str:
        if at.step >= self._settings.epochs * self._steps():
            return f"{self._settings.epochs} passes over the rows"
        if self._held_out and at.worse >= self._settings.patience:
            return f"no better on held-back rows in {at.worse} measurements"
        return ""

    def _measured(self, at: "_Place") -> "_Place":
        if not self._held_out:
            return at.best_is_now(at.found)
        found = self.measure(with_tensors(self._adapter, at.tensors), self._held_out)
        return at.best_is_now(found) if found.loss < at.found.loss else at.no_better()

    def _steps(self) -> int:
        """Of a pass."""
        size = self._settings.batch_size * self._settings.accumulation
        return -(-(len(self._training) + self._replayed()) // size)

    def _replayed(self) -> int:
        share = self._settings.replay_share
        return round(len(self._training) * share / (1 - share)) if self._replay else 0

    def _drawn(self, step: int) -> list[Example]:
        """The examples of a step: of each pass all own rows and as many replayed ones as their share, mixed."""
        size, steps = self._settings.batch_size * self._settings.accumulation, self._steps()
        generator = np.random.default_rng((self._settings.seed, step // steps))
        rows = list(self._training)
        if self._replay:
            rows += [self._replay[at] for at in generator.integers(0, len(self._replay), self._replayed())]
        order = generator.permutation(len(rows))
        first = (step % steps) * size
        return [rows[at] for at in order[first : first + size]]

    def _holds(self, state: State) -> bool:
        """Whether a state has all that a training goes on from; whoever wrote it may have been another."""
        own, sets = tensors(self._adapter), ("start", "now", "best", "moment|m", "moment|v")
        shapes = {f"{part}|{name}": each.shape for part in sets for name, each in own.items()}
        if {name: each.shape for name, each in state.arrays.items()} != shapes or not _finite(state.arrays):
            return False
        counts, figures = ([state.facts.get(name) for name in names] for names in (("step", "worse"), ("before", "found")))
        pairs = [each if isinstance(each, list) else [] for each in figures]
        return all(type(each) is int and each >= 0 for each in counts) and all(
            list(map(type, each)) == [float, float] for each in pairs
        )

    def _identified(self, manifest: BundleManifest) -> str:
        """What a state belongs to: weights, rows, settings, places that are trained; where it began is in the state itself."""
        shapes = {name: list(each.shape) for name, each in tensors(self._adapter).items()}
        rows = [
            [[list(row.ids), row.labels if isinstance(row.labels, int) else list(row.labels)] for row in each]
            for each in (*self._held_out, *self._training, *self._probe, *self._replay)
        ]
        files = sorted((path, file.sha256) for path, file in manifest.files.items() if path.startswith(("model.", "training/")))
        told = [files, self._settings.model_dump(mode="json"), self._task, shapes, self._frozen.digest(), rows]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where a training stands after a step.

    Attributes:
        start: Where it began.
        tensors, moments: After the step; the next step changes them.
        gradients: Of the step.
        best: Tensors of the best measurement; the start's, where none was better.
        before, found: Figures of the start and of the best.
        worse: Measurements since.
    """

    step: int
    start: Aside
    tensors: dict[str, Array]
    moments: Aside
    gradients: Aside
    best: Aside
    before: Figures
    found: Figures
    worse: int

    @classmethod
    def of(cls, state: State, folder: Path) -> "_Place":
        facts = state.facts
        parts: dict[str, dict[str, Array]] = {"start": {}, "now": {}, "moment": {}, "best": {}}
        for name, array in state.arrays.items():
            part, _, own = name.partition("|")
            parts[part][own] = array
        return cls(
            int(facts["step"]),
            Aside(folder, parts["start"]),
            {name: each.copy() for name, each in parts["now"].items()},
            Aside(folder, parts["moment"]),
            Aside(folder),
            Aside(folder, parts["best"]),
            Figures(*facts["before"]),
            Figures(*facts["found"]),
            int(facts["worse"]),
        )

    def state(self, identity: str) -> State:
        facts: dict[str, Any] = {"identity": identity, "step": self.step, "worse": self.worse}
        facts |= {name: [each.loss, each.accuracy] for name, each in (("before", self.before), ("found", self.found))}
        parts = {"start": self.start, "now": self.tensors, "moment": self.moments, "best": self.best}
        return State(facts, {f"{part}|{name}": each for part, held in parts.items() for name, each in held.items()})

    def best_is_now(self, found: Figures) -> "_Place":
        self.best.update(self.tensors)
        return replace(self, found=found, worse=0)

    def no_better(self) -> "_Place":
        return replace(self, worse=self.worse + 1)


def _finite(arrays: Mapping[str, Array]) -> bool:
    return all(each.dtype == np.float32 and bool(np.isfinite(each).all()) for each in arrays.values())
