"""What of a round is bounded, added up and noised, and what a rule is given of it.

A node's part is its whole change in product space, shortened to ``C``, as the vectors of a sketch
(``protocol.privacy.clipping``, ``protocol.secure_sum.sketch``):

    first:   1, everything that goes into the first sum, its vote where the norm is learnt
    second:  1, the other side of every module

What lies between the first entry and the vote is no longer than ``C`` in either. Nodes and rows all weigh alike, and the sums
are divided by a number that nobody's data decides, so that nothing but these vectors says anything of a node: not how many rows
it has, nor which rows of a head it trained. The noise of both sums is that of one Gaussian mechanism
(``protocol.privacy.accounting``); what is made of them costs nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from protocol.adapter import Adapter, Array
from protocol.errors import SecureSumError
from protocol.privacy.clipping import AdaptiveNorm, Clipped, bounded, clipped
from protocol.privacy.noise import noised
from protocol.privacy.promise import Promise
from protocol.secure_sum.contribution import Layout
from protocol.secure_sum.sketch import Innovation, Sketch, Vector
from protocol.secure_sum.stages import FIRST, SECOND

_VOTE = 0.5
_TAILS = 9.0  # standard deviations, beyond which a norm of noise is once in 1e17


@dataclass(frozen=True)
class PrivateSum:
    """The sums of one round under a promise.

    Args:
        layout: Of the vectors; it has the promise.
        promise: The same.
        expected: By how many the sums are divided.
        step: Largest error of a value of one node before it is added up: a step of the secure sum's fixed point, or none.
    """

    layout: Layout
    promise: Promise
    expected: int
    step: float = 0.0

    def releases(self) -> int:
        """Noised sums, votes apart."""
        return 2 if self.layout.sketch().modules else 1

    def empty(self, phase: int) -> Vector:
        """What no node adds up to."""
        sketch = self.layout.sketch()
        length = sketch.first_length() if phase == FIRST else sketch.second_length()
        return np.zeros(length + self.promise.votes(phase))

    def released(self, phase: int, total: Vector) -> Vector:
        """The sum as it may be known; unchanged where nodes have noised their parts.

        Rounding moves each value of a node by less than a step, and its part by ``step`` times the root of their number; the
        noise is made longer by as much.
        """
        if self.promise.noise == "nodes":
            return total
        found, end = total.copy(), total.size - self.promise.votes(phase)
        norm = self._sensitivity(end - 1)
        found[1:end] = noised(total[1:end], self.promise.noise_multiplier * norm, norm)
        if self.promise.bit_noise and end < total.size:
            norm = _VOTE + self.step
            found[end:] = noised(total[end:], AdaptiveNorm(self.promise.bit_noise).noise_multiplier * norm, norm)
        return found

    def ranges(self, first: Vector) -> dict[str, Array]:
        """The basis that the first sum gives the second."""
        return self.layout.sketch().ranges(first)

    def votes(self, first: Vector) -> float:
        """The sum of votes, with its noise."""
        return float(first[-1])

    def partial(
        self, first: Vector, ranges: Mapping[str, Array], second: Vector, updates: int, deviation: float | None = None
    ) -> dict[str, Array]:
        """Both sums as a rule's ``merge_partial`` takes them, divided by the expected number of updates.

        Args:
            first: As released.
            ranges: The basis of the second.
            second: As released.
            updates: How many are in the first.
            deviation: Of the noise on each value, where others than this coordinator have added it.

        Raises:
            SecureSumError: Vectors of that length and noise of that size have no such sum: somebody's was longer.
        """
        first, second = first.copy(), second.copy()
        first[0] = second[0] = self.expected
        sketch = self.layout.sketch()
        total = sketch.totalled(first[: sketch.first_length()], ranges, second)
        self._check_length(first[1 : sketch.first_length()], updates, deviation)
        if self.releases() > SECOND:
            self._check_length(second[1:], updates, deviation)
        return self.layout.arrays(total, updates, self.expected)

    def _sensitivity(self, values: int) -> float:
        return self.promise.clipping_norm + self.step * math.sqrt(values)

    def _check_length(self, values: Vector, updates: int, deviation: float | None) -> None:
        """Of noise on ``d`` values the norm is below ``std (sqrt(d) + t)`` but for ``exp(-t^2 / 2)``."""
        norm = self._sensitivity(values.size)
        std = self.promise.noise_multiplier * norm * 1.001 if deviation is None else deviation
        most = updates * norm + std * (math.sqrt(values.size) + _TAILS)
        found = float(np.linalg.norm(values))
        if not found <= most:
            raise SecureSumError(
                f"privacy: the noised sum of {updates} updates of norm {self.promise.clipping_norm:g} at most has the norm "
                f"{found:.3g}, expected {most:.3g} at most; somebody's was longer, and whose, a sum does not tell"
            )


def own_part(layout: Layout, promise: Promise, trained: Adapter, start: Adapter, rows: Mapping[str, Array]) -> Clipped:
    """A node's whole change, clipped; rows that it did not train are zero and are named no more.

    Raises:
        PrivacyError: A tensor has no start, or the change is not finite.
    """
    found = clipped(layout.change(trained, start, rows), promise.clipping_norm)
    return replace(found, innovation=Innovation(found.innovation.modules, found.innovation.dense))


def first_vector(sketch: Sketch, promise: Promise, own: Clipped) -> Vector:
    """A node's part in the first sum."""
    vector = _within(sketch.first(own.innovation, 1.0), promise)
    return np.append(vector, _VOTE if own.within else -_VOTE) if promise.votes(FIRST) else vector


def second_vector(sketch: Sketch, promise: Promise, own: Innovation, ranges: Mapping[str, Array]) -> Vector:
    """A node's part in the second sum; a basis that lengthens makes it no longer."""
    return _within(sketch.second(own, ranges, 1.0), promise)


def _within(vector: Vector, promise: Promise) -> Vector:
    return np.append(vector[:1], bounded(vector[1:], promise.clipping_norm))
