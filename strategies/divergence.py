"""Watches the loss of a training: where it becomes NaN or grows far above where it began, going on would be for nothing."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_WINDOW = 5


class Diverged(Exception):  # noqa: N818 - a signal within training, not an error that anyone is shown
    """A training has diverged.

    Attributes:
        step: The optimizer step at which it was seen.
        good: The last step whose weights are not under suspicion.
        what: What was seen.
    """

    def __init__(self, step: int, good: int, what: str) -> None:
        super().__init__(what)
        self.step, self.good, self.what = step, good, what


class Watch:
    """The losses of one training, a number per optimizer step.

    The mean of the last five steps is held against the first step, which was taken with the weights that training began with:
    one hard batch later on is no divergence.

    Args:
        factor: How many times the first may be exceeded.
        floor: What counts as the first where it is less: a training that begins with next to no loss may well have more.
            Infinite where the loss says nothing (reinforcement learning); NaN is seen all the same.
    """

    def __init__(self, factor: float, floor: float) -> None:
        self._factor, self._floor = factor, floor
        self._first: float | None = None
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._total = 0.0
        self._count = 0

    @property
    def mean(self) -> float:
        """Of all steps' losses, those before a crash with them."""
        return self._total / max(1, self._count)

    def note(self, loss: float, step: int) -> None:
        """Takes the loss of a step.

        Raises:
            Diverged: It is not finite, or the last ones are too large.
        """
        if not math.isfinite(loss):
            raise Diverged(step, step - 1, f"its loss is {loss}")
        self._total += loss
        self._count += 1
        self._last.append(loss)
        self._first = loss if self._first is None else self._first
        now = math.fsum(self._last) / _WINDOW
        if len(self._last) == _WINDOW and now > self._factor * max(self._first, self._floor):
            what = f"its loss is {now:.4g} in the mean of {_WINDOW} steps and began at {self._first:.4g}"
            raise Diverged(step, max(0, step - 2 * _WINDOW), what)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"first": self._first, "last": list(self._last), "total": self._total, "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts ``state()`` back."""
        self._first, self._last = state["first"], deque(state["last"], maxlen=_WINDOW)
        self._total, self._count = state["total"], state["count"]
