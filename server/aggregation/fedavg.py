"""FedAvg on factors: A and B averaged apart (McMahan et al. 2017, arXiv:1602.05629, Algorithm 1).

    A <- A + eta * sum_k w_k (A_k - A),    B <- B + eta * sum_k w_k (B_k - B),     w_k = n_k / sum n

With ``eta`` = 1 that is the weighted mean of the nodes' factors. It is what one gets by giving LoRA's tensors to an ordinary
FedAvg (FedIT, Zhang et al. 2023, arXiv:2305.05644). The product of the means is not the mean of the products: cross terms
``B_i A_j`` of different nodes come in, and the result depends on the basis in which a node happens to hold its factors.

Against the paper: ranks differ here, so all nodes train the lowest one (``fixed_shape``); the scaling is inside B, so that
nodes of different ``lora_alpha`` can be averaged; means are of changes, which on an exact wire is the same.
"""

from collections.abc import Mapping
from typing import Self

from protocol.adapter import Adapter, Array
from protocol.update import Update
from server.aggregation.dense import RowMean
from server.aggregation.fixed_shape import FixedShape
from server.aggregation.rule import MergeReport


class FedAvg(FixedShape):
    """The weighted mean of A, of B and of every dense tensor."""

    def begin(self, current: Adapter) -> None:
        """Starts a round."""
        super().begin(current)
        self._mean = RowMean(self._before)

    def add(self, update: Update, start: Adapter, node: str = "") -> None:  # noqa: ARG002
        """Adds one update, weighted by its examples."""
        self._count(update)
        begun = self._read(start)
        for name, tensor in self._read(update.adapter).items():
            value, leading = self._widened(name, tensor)
            before = self._widened(name, begun[name])[0] if name in begun else None
            rows = update.rows.get(name[2:]) if name[0] == "D" else leading
            self._mean.add(name, value, before, rows, update.manifest.num_examples)

    def merge(self, other: Self) -> None:
        """Adds the sums of another instance."""
        self._updates += other._updates
        self._examples += other._examples
        self._mean.merge(other._mean)

    def merge_partial(self, arrays: Mapping[str, Array]) -> None:
        """Adds a sum: counts, and of each tensor what ``RowMean.partial`` says."""
        self._updates += int(arrays["updates"])
        self._examples += int(arrays["examples"])
        self._mean.merge(RowMean.from_partial(arrays))

    def finalise(self) -> tuple[Adapter, MergeReport]:
        """The averaged factors and tensors; nothing is cut off, so no energy is discarded."""
        changes = self._mean.changes()
        known = {name: change for name, change in changes.items() if name in self._before}
        # Before the first merge nobody here has seen a tensor's start, so there is nothing to take a step away from.
        return self._finished(self._mean.moved(changes | self._steps(known)))

    def _steps(self, changes: Mapping[str, Array]) -> dict[str, Array]:
        """The server's step by name, from the mean change."""
        return {name: self.server_learning_rate * change for name, change in changes.items()}
