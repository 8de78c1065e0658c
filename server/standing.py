"""What the coordinator learns about nodes beside each other and over rounds: outliers, weights that nobody can claim, pauses.

The norm of a node's innovation (``server.admission.check``) is held against the cohort's. Norms are positive and spread by
factors: over ranks of 4 to 32 by two to three, over unequal data under a plan that counts epochs by six, and from the first
round of a federation to its last they fall by a hundred. So the bound is a factor, on the logarithms, from this round's own
median:

    outlier if  log norm > m + max(log 10, 3.5 * 1.4826 * MAD),     m = median of this round's log norms

with MAD the median distance from ``m`` in this round and, each from its own median, of what the five rounds before accepted
(the median's own distance of zero left out, or three nodes would look alike). Median and MAD hold while fewer than half of the
replies lie. 1.4826 makes MAD a standard deviation, and 3.5 of them is the cut of Iglewicz and Hoaglin (1993, How to detect and
handle outliers). The tenfold is for cohorts so alike, or so small, that MAD is next to nothing. Honest replies refused,
simulated with log-normal norms in a first round (and once five rounds are known):

    spread of log norms                                3 nodes          5 nodes          10 nodes
    0.5  (ranks 4 to 32 in real rounds: 0.1 to 0.4)    3e-5 (< 1e-4)    3e-5 (< 1e-4)    < 1e-4 (1e-4)
    1.0  (14 to 96 rows, epochs: 0.8)                  7e-3 (3e-3)      5e-3 (3e-3)      2e-3 (4e-4)

So where nodes have very unequal data, let the plan count steps.

A norm within the bound may still be an attack: that is what the robust rules are for. Only large norms are refused. A small
one takes nothing from the others but its share of the weight, and a first step at rate zero is honest.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from statistics import median_high, median_low
from typing import Any

from protocol.federation import RoundSettings

# Of fewer replies nobody can say which one is the outlier.
FEWEST = 3
TIMES, DEVIATIONS, WINDOW = 10.0, 3.5, 5
_TO_SIGMA = 1.4826
# Where most nodes made but a step at rate zero, norms of the others have no measure: liars may be most of them. The largest
# that was measured of an honest change is 25; with 600 modules of rank 64 whose entries moved by 6e-3 it would be 65.
UNCOMPARED = 1e3
MOST_KEPT = 100  # of a round's distances: as many say how far apart norms lie as do those of ten thousand nodes


class Standing:
    """Outliers of a round and nodes that failed again and again; the same after ``restore`` as if it had never stopped.

    Only quarantined replies count as failures. A node that is silent or answers with an error has put nothing into the
    merge and costs no more than the deadline; it may be an honest node on a poor line. Silence neither adds to a count nor
    ends it: only an accepted reply does, so that after its pause a node has one reply to show that it was mended.

    Args:
        settings: ``failures_allowed`` quarantined replies in a row, then left out for ``pause_rounds``.
    """

    def __init__(self, settings: RoundSettings) -> None:
        self._allowed = settings.failures_allowed
        self._pause = settings.pause_rounds
        self._known: list[list[float]] = []
        self._new: list[float] = []
        self._failures: dict[str, tuple[int, int]] = {}

    def outliers(self, norms: Mapping[int, float]) -> dict[int, str]:
        """Replies of one adapter in one round that changed it beyond what the cohort's norms explain.

        Args:
            norms: Of each reply's innovation, by node; finite. Zeros are nobody's outlier and nobody's measure.

        Returns:
            Reason by node; empty of fewer than three replies. Where fewer than three, or than half, changed anything, those
            are held to ``UNCOMPARED`` as well. The norms of the others are learnt once the round is ``note``d.
        """
        changed = {node: norm for node, norm in norms.items() if norm > 0}
        found = _beyond(changed, [old for before in self._known for old in before], "norm of the change")
        if len(norms) >= FEWEST and len(changed) < max(FEWEST, len(norms) / 2):
            found |= _too_large(changed, len(norms))
        usual = [math.log(norm) for node, norm in changed.items() if node not in found]
        if usual and len(changed) >= FEWEST:
            self._new += _from_the_median(usual)
        return found

    def cancelling(self, apart: Mapping[int, float]) -> dict[int, str]:
        """Replies of one adapter in one round whose directions are, one by one, beyond the cohort's, however they cancel.

        Rules take products and factors as they are, in float32 where they are many, and compare them by Gram matrices: what
        cancels within a reply comes back there as rounding of its directions. Nothing is remembered of other rounds: but for
        the first, directions begin alike, and there they spread as norms do.

        Args:
            apart: ``server.admission.Change.apart`` of each reply, by node.
        """
        return _beyond({node: size for node, size in apart.items() if size > 0}, [], "size of the directions apart")

    def note(self, number: int, accepted: Iterable[str], quarantined: Iterable[str]) -> None:
        """Round ``number`` is over: whose replies were merged, and whose were not. Nodes that were silent are in neither."""
        if self._new:
            thinned = sorted(self._new)[:: math.ceil(len(self._new) / MOST_KEPT)]
            self._known, self._new = [*self._known, thinned][-WINDOW:], []
        for name in accepted:
            self._failures.pop(name, None)
        for name in quarantined:
            self._failures[name] = (self._failures.get(name, (0, 0))[0] + 1, number)

    def paused(self, name: str, number: int) -> str | None:
        """Why a node is not asked in round ``number``; None if it is."""
        count, last = self._failures.get(name, (0, 0))
        if count < self._allowed or number > last + self._pause:
            return None
        replies = f"its last {count} replies were" if count > 1 else "its last reply was"
        return f"left out until round {last + self._pause}: {replies} quarantined, the latest in round {last}"

    def state(self) -> dict[str, Any]:
        """What must outlive the coordinator, between rounds; JSON."""
        return {"deviations": self._known, "failures": {name: list(self._failures[name]) for name in sorted(self._failures)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts ``state()`` of an earlier process back."""
        self._known, self._new = [list(map(float, before)) for before in state["deviations"]], []
        self._failures = {name: (int(count), int(last)) for name, (count, last) in state["failures"].items()}


def weights(examples: Mapping[int, int]) -> dict[int, int]:
    """The number of examples that each reply counts for: what its node says, up to a bound that the cohort sets.

    Under a plan that counts steps the largest claim is known (``server.admission.check``). Under one that counts epochs
    only the node knows how much data it has. A claim is capped, not quarantined: an honest node with much data still
    takes part, with the weight of a large one, and a liar gains no more. The bound is the median times ten, or times the
    number of the others if there are fewer, so that among nodes alike none outweighs all others together; it holds while
    fewer than half lie. Of fewer than three replies nobody can say which one lies, and nothing is capped.

    Args:
        examples: By node, at least 1.
    """
    if len(examples) < FEWEST:
        return dict(examples)
    limit = median_low(examples.values()) * min(int(TIMES), len(examples) - 1)
    return {node: min(count, limit) for node, count in examples.items()}


def _beyond(sizes: Mapping[int, float], known: Collection[float], what: str) -> dict[int, str]:
    """Which sizes are beyond the bound of their median; ``known`` are distances of other rounds from theirs."""
    if len(sizes) < FEWEST:
        return {}
    logs = [math.log(size) for size in sizes.values()]
    deviation = _TO_SIGMA * median_low([*_from_the_median(logs), *known])
    # Norms that far apart are no float's business.
    times = math.exp(min(max(math.log(TIMES), DEVIATIONS * deviation), 500.0))
    bound = math.exp(median_high(logs)) * times
    return {
        node: f"{what}: found {size:.3g}, expected at most {bound:.3g}, {times:.0f} times the median of {len(logs)} replies"
        for node, size in sorted(sizes.items())
        if size > bound
    }


def _too_large(norms: Mapping[int, float], replies: int) -> dict[int, str]:
    return {
        node: f"norm of the change: found {norm:.3g}, expected at most {UNCOMPARED:g} where {len(norms)} of {replies} replies "
        "changed anything"
        for node, norm in sorted(norms.items())
        if norm > UNCOMPARED
    }


def _from_the_median(logs: Collection[float]) -> list[float]:
    """Distances of all values but the median itself, whose own would make three nodes look alike."""
    middle = median_high(logs)
    return sorted(abs(value - middle) for value in logs)[1:]
