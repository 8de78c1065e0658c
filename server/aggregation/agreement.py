"""Agreement: nodes whose changes keep pointing away from everyone else's, or nowhere, are set aside.

Honest changes of one round hardly agree where nodes have different data (cosines of 0.03 to 0.1), so that rules which look at
distances within a round (krum, geometric median) see noise; and when the model is nearly done their changes sum to nothing, so
that such a round says nothing about who lies. What two nodes had in common is therefore remembered over rounds, each weighing
by how far it went. With innovations ``x_i`` cut to 1.25 times the round's median length,

    C_ij <- 0.9 C_ij + <x_i, x_j>,    a_i = cosine of node i with the sum of the others, read off C (pairs by their mean)

One by one, up to a third of the nodes less one, the node of least ``a_i`` is set aside if it has less than a third of the
median's; after each the others are looked at anew, for what a liar sends lowers the agreement of the honest too. The others
are averaged with one vote each, cut as they are. An innovation shorter than a tenth of the median is no vote at all (a free
rider that sends its start back).

This is our own rule. Directions and clipping are as in FLAME (Nguyen et al. 2022, arXiv:2101.02281), the memory answers
Karimireddy et al. 2021 (arXiv:2012.10333): a rule without one can be outlasted by liars who stay within every round's spread.
Nothing is proved of it; what it holds against is measured in benchmarks/LOG.md (``python -m benchmarks.attackers``).
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from protocol.adapter import Array
from server.aggregation.weighing import Details, Share, Weighing

MEMORY = 0.9
SHARE = 1 / 3
LONGEST, SHORTEST = 1.25, 0.1


class Agreement(Weighing):
    """The clipped mean of innovations from nodes that agree with the others, which are remembered by their names.

    Args:
        rank_cap: Largest rank of the global adapter.
        server_learning_rate: Factor on the merged change.
    """

    def __init__(self, rank_cap: int, server_learning_rate: float = 1.0) -> None:
        super().__init__(rank_cap, server_learning_rate)
        self._remembered: dict[tuple[str, str], tuple[float, float]] = {}

    def state(self) -> dict[str, Array]:
        """What is remembered of pairs of nodes."""
        pairs = sorted(self._remembered)
        names = np.frombuffer(json.dumps(pairs).encode(), np.uint8)
        return {"pairs": names, "agreement": np.array([self._remembered[pair] for pair in pairs]).reshape(-1, 2)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Puts ``state()`` of an earlier process back."""
        pairs = json.loads(state["pairs"].tobytes()) if "pairs" in state else []
        numbers = state.get("agreement", np.zeros((0, 2)))
        self._remembered = {(one, other): (float(a), float(b)) for (one, other), (a, b) in zip(pairs, numbers, strict=True)}

    def _shares(self, gram: Array, nodes: Sequence[str]) -> tuple[Sequence[Share], Details]:
        norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
        median = float(np.median(norms[norms > 0])) if np.any(norms) else 0.0
        voting = np.flatnonzero(norms > SHORTEST * median).tolist()
        cut = np.minimum(1.0, LONGEST * median / norms[voting])
        common = self._common([nodes[at] for at in voting], gram[np.ix_(voting, voting)] * np.outer(cut, cut), median**2)
        aside = set_aside(common, (len(nodes) - 1) // 3)
        shares = [Share(0.0)] * len(nodes)
        for place, at in enumerate(voting):
            if place not in aside:
                shares[at] = Share(1.0, float(cut[place]))
        without = sorted(node for node, share in zip(nodes, shares, strict=True) if not share.weight)
        return shares, {"set aside": ", ".join(without)}

    def _common(self, nodes: Sequence[str], products: Array, weight: float) -> Array:
        """What each pair had in common per round that they met in, this one included; a round weighs by its length."""
        found = np.empty_like(products)
        for i, one in enumerate(nodes):
            for j, other in enumerate(nodes):
                total, weights = self._remembered.get((one, other), (0.0, 0.0))
                total, weights = MEMORY * total + float(products[i, j]), MEMORY * weights + weight
                self._remembered[one, other] = total, weights
                found[i, j] = total / weights
        return found


def agreement(common: Array) -> Array:
    """Cosine of each of K vectors with the sum of the others, from their Gram matrix ``(K, K)``."""
    row, own = common.sum(axis=1), np.diag(common)
    others = np.maximum(common.sum() - 2 * row + own, 0.0)
    found: Array = (row - own) / np.sqrt(np.maximum(own * others, np.finfo(np.float64).tiny))
    return found


def set_aside(common: Array, most: int) -> set[int]:
    """Which of K nodes agree least with those that are left, no more than ``most``."""
    left = list(range(len(common)))
    while left and len(common) - len(left) < most:  # nobody votes where nobody changed anything
        agreed = agreement(common[np.ix_(left, left)])
        least = int(np.argmin(agreed))
        if agreed[least] >= SHARE * np.median(agreed):
            break
        left.pop(least)
    return set(range(len(common))) - set(left)
