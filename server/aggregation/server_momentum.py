"""Server momentum around another rule: FedAvgM (Hsu et al. 2019, arXiv:1909.06335, section 3).

    v <- beta v + Delta,    G <- G + v,    Delta = what the rule alone would have added to G in this round

For rules in product space G, Delta and v are low-rank products: ``v <- SVD_cap(beta v + Delta)`` and
``G <- SVD_cap(G + Delta + beta v)``, never dense; the report tells the largest discarded energy. For rules on tensors of one
shape v has a number for every entry of A, of B and of the dense tensors. A step that goes on for ever grows to
``1 / (1 - beta)`` of itself, as in the paper; lower ``server_learning_rate`` by as much to keep its length.

Against the paper: a row of a dense tensor that nobody trained in a round keeps its value and its momentum; a tensor that the
coordinator sees for the first time is taken as it is.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import ConfigurationError
from protocol.product_space import compress, effective_rank
from protocol.update import Update
from server.aggregation.dense import changed_rows
from server.aggregation.fixed_shape import FixedShape, assembled, mean_effective_rank, tensors
from server.aggregation.rule import MergeReport, Rule, Start

_OWN = "momentum|"


class ServerMomentum(Rule):
    """Takes a share of the last step again.

    Args:
        rule: Merges the updates.
        beta: Share of the last step, in [0, 1).
        rank_cap: Largest rank of the global adapter, and of the momentum.

    Raises:
        ConfigurationError: ``beta`` is outside its range.
    """

    def __init__(self, rule: Rule, beta: float, rank_cap: int) -> None:
        if not 0 <= beta < 1:
            raise ConfigurationError("aggregation", [f"server_momentum: found {beta}, expected at least 0 and below 1"])
        self.rule, self.beta, self.rank_cap = rule, beta, rank_cap
        # Names as in ``fixed_shape.tensors``; a product's momentum is a pair of them.
        self._momentum: dict[str, Array] = {}
        self.begin(Adapter())

    @property
    def individual(self) -> bool:  # type: ignore[override]  # that of the rule inside, which only the instance knows
        """Whether the rule inside looks at single updates."""
        return self.rule.individual

    @property
    def nearest_sum(self) -> str:  # type: ignore[override]  # likewise
        """The nearest rule that needs only sums."""
        return self.rule.nearest_sum

    def initial(self, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], seed: int) -> Adapter:
        """As the rule inside."""
        return self.rule.initial(modules, ranks, seed)

    def start(self, current: Adapter, r: int, number: int) -> Start:
        """As the rule inside."""
        return self.rule.start(current, r, number)

    def begin(self, current: Adapter) -> None:
        """Starts a round."""
        self._current = current
        self.rule.begin(current)

    def add(self, update: Update, start: Adapter, node: str = "") -> None:
        """Adds one update to the rule inside."""
        self.rule.add(update, start, node)

    def merge(self, other: Self) -> None:
        """Adds what the other's rule has gathered."""
        self.rule.merge(other.rule)

    def merge_partial(self, arrays: Mapping[str, Array]) -> None:
        """Adds a sum to the rule inside."""
        self.rule.merge_partial(arrays)

    def finalise(self) -> tuple[Adapter, MergeReport]:
        """The rule's result and a share of the last step beyond it."""
        merged, report = self.rule.finalise()
        if isinstance(self.rule, FixedShape):
            adapter = assembled(self._moved(tensors(self._current), tensors(merged)))
            return adapter, replace(report, effective_rank=mean_effective_rank(adapter))
        dense = self._moved(tensors(Adapter({}, self._current.dense)), tensors(Adapter({}, merged.dense)))
        factors, discarded, ranks = {}, [report.discarded_energy], [0.0] * (not merged.factors)
        for module, pair in sorted(merged.factors.items()):
            before = [(-1.0, self._current.factors[module])] if module in self._current.factors else []
            again = [(1.0, pair), *self._again(module)]
            step, whole = compress(again + before, pair.shape, self.rank_cap), compress(again, pair.shape, self.rank_cap)
            self._momentum |= {f"A|{module}": step.factors.A, f"B|{module}": step.factors.B}
            factors[module] = Factors(whole.factors.A.astype(np.float32), whole.factors.B.astype(np.float32))
            discarded += [step.discarded_energy, whole.discarded_energy]
            ranks.append(effective_rank(whole.singular_values))
        report = replace(report, discarded_energy=max(discarded), effective_rank=float(np.mean(ranks)))
        return Adapter(factors, assembled(dense).dense), report

    def state(self) -> dict[str, Array]:
        """The momentum in float64 beside the state of the rule inside."""
        return self.rule.state() | {_OWN + name: tensor.copy() for name, tensor in self._momentum.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Puts both back."""
        self._momentum = {name.removeprefix(_OWN): tensor.copy() for name, tensor in state.items() if name.startswith(_OWN)}
        self.rule.restore({name: tensor for name, tensor in state.items() if not name.startswith(_OWN)})

    def _again(self, module: str) -> list[tuple[float, Factors]]:
        if f"A|{module}" not in self._momentum:
            return []
        return [(self.beta, Factors(self._momentum[f"A|{module}"], self._momentum[f"B|{module}"]))]

    def _moved(self, before: Mapping[str, Array], merged: Mapping[str, Array]) -> dict[str, Array]:
        """Tensors of one shape with the momentum added, which moves on."""
        found = dict(merged)
        for name, tensor in merged.items():
            if name in before:
                change = tensor - before[name]
                last = self._momentum.get(name, np.zeros_like(change))
                momentum = np.where(changed_rows(change), self.beta * last + change, last)
                self._momentum[name] = momentum
                found[name] = before[name] + np.where(changed_rows(change), momentum, 0.0)
        return found
