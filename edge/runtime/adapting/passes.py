"""What examples say of an adapter: a step's gradient over micro-batches, and figures without one; for whoever trains here."""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge.runtime.adapting.personal import on_top
from edge.runtime.adapting.preference import Array, dpo
from edge.runtime.adapting.rows import Task
from edge.runtime.gradient import Gradients, Side
from edge.runtime.training_rows import Row, Scored, learnt
from protocol.adapter import Adapter

Example = tuple[Row, ...]


@dataclass(frozen=True)
class Figures:
    """What was measured on rows that never trained.

    Attributes:
        loss: Mean over learnt tokens, rows or pairs.
        accuracy: Share of tokens or rows that were the likeliest, or of pairs in the right order.
    """

    loss: float
    accuracy: float


class Passes:
    """Forward and backward passes over examples of one task.

    Args:
        gradients: Of the bundle.
        task: What the examples are for.
        size: Examples at once, in memory.
        beta: DPO: how near the reference it stays.
        frozen: An adapter beneath the trained one that stays as it is.
        reference: DPO: the adapter to stay near, with everything that is beneath it.
        kept: Holds what goes into some layers until the way back; by default memory does.
    """

    def __init__(
        self,
        gradients: Gradients,
        task: Task,
        size: int,
        *,
        beta: float = 0.1,
        frozen: Adapter | None = None,
        reference: Adapter | None = None,
        kept: MutableMapping[str, Array] | None = None,
    ) -> None:
        self._gradients, self._task, self._size, self._beta = gradients, task, size, beta
        self._frozen, self._reference = frozen or Adapter(), reference or Adapter()
        self._known: dict[int, Array] = {}
        self._kept = kept

    def refer_to(self, reference: Adapter) -> None:
        """Takes another reference."""
        self._reference, self._known = reference, {}

    def whole(self, adapter: Adapter) -> Adapter:
        """An adapter with what is beneath it."""
        return on_top(self._frozen, adapter)

    def scored(self, adapter: Adapter, examples: Sequence[Example]) -> Scored:
        """A forward pass over examples, row by row; of none, none."""
        whole = self.whole(adapter)
        found = [self._gradients.score([row for rows in part for row in rows], whole) for part in self._parts(examples)]
        if not found:
            return Scored(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        return Scored(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def margins(self, adapter: Adapter, examples: Sequence[Example]) -> Array:
        """DPO: how much more an adapter has come to prefer the chosen answer of each pair than its reference does."""
        gain = self.scored(adapter, examples).log_probabilities - self._known_of(examples)
        margins: Array = self._beta * (gain[0::2] - gain[1::2])
        return margins

    def figures(self, adapter: Adapter, examples: Sequence[Example]) -> Figures:
        """Figures of an adapter on examples; of none the loss is 0."""
        if not examples:
            return Figures(0.0, 0.0)
        if self._task == "dpo":
            margin = self.margins(adapter, examples)
            return Figures(float(np.logaddexp(0, -margin).mean()), float((margin > 0).mean()))
        scored = self.scored(adapter, examples)
        count = int(scored.tokens.sum())
        return Figures(-float(scored.log_probabilities.sum()) / count, int(scored.hits.sum()) / count)

    def gradient(
        self,
        adapter: Adapter,
        examples: Sequence[Example],
        into: MutableMapping[str, Array],
        stop: Callable[[], object] = lambda: False,
    ) -> float | None:
        """Loss and gradient of one step, micro-batch by micro-batch, as of all its examples at once.

        Args:
            adapter: What is trained.
            examples: Of the step.
            into: Takes the gradients, by ``personal.tensors``' names; what was in it is forgotten.
            stop: Asked between micro-batches.

        Returns:
            The loss; None where it was told to stop.
        """
        into.clear()
        parts = self._parts(examples)
        total = sum(map(self._weight, parts))
        whole = self.whole(adapter)

        def put(side: Side, name: str, array: Array) -> None:
            if name in (adapter.dense if side == "D" else adapter.factors):
                key, own = f"{side}|{name}", self._own(side, name, array, adapter)
                into[key] = into[key] + own if key in into else own

        loss = 0.0
        for number, part in enumerate(parts):
            if number and stop():
                return None
            rows = [row for each in part for row in each]
            objective = dpo(self._known_of(part), self._beta, int(total)) if self._task == "dpo" else None
            loss += self._gradients.learn(rows, whole, put, objective=objective, count=total, kept=self._kept)[0]
        return loss

    def _own(self, side: Side, name: str, array: Array, adapter: Adapter) -> Array:
        """Of a gradient what is of the trained adapter, with respect to it."""
        below = self._frozen.factors.get(name) if side != "D" else None
        if below is None:
            return array
        if side == "A":
            return array[below.r :]
        own: Array = np.float32(adapter.factors[name].scaling) * array[:, below.r :]  # the joined B holds the scaling
        return own

    def _parts(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        return [examples[first : first + self._size] for first in range(0, len(examples), self._size)]

    def _weight(self, part: Sequence[Example]) -> float:
        """What a micro-batch counts in its step: learnt tokens, rows or pairs."""
        if self._task != "sft":
            return float(len(part))
        return float(len(learnt([row for rows in part for row in rows]).target))

    def _known_of(self, part: Sequence[Example]) -> Array:
        """Log-probabilities under the reference, of the rows of some pairs: asked once for each pair."""
        missing = [rows for rows in part if id(rows) not in self._known]
        for some in self._parts(missing):
            scored = self._gradients.score([row for rows in some for row in rows], self._reference)
            for rows, pair in zip(some, scored.log_probabilities.reshape(-1, 2), strict=True):
                self._known[id(rows)] = pair
        return np.concatenate([self._known[id(rows)] for rows in part])
