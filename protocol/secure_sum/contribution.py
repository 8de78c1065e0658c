"""From an update to what a node puts into a round's sums, and from the sums to what an aggregation rule adds.

Two kinds of rule need only a sum. ``products``: innovations ``s_k B_k A_k - start_k`` of any ranks, through a sketch
(``protocol.secure_sum.sketch``). ``tensors``: the changes of A, of B (scaling inside, a row for each direction) and of dense
tensors, which all hold in one shape and which ride along whole.

Every row of a tensor carries the weight of those who trained it, and of tensors without rows the whole does. A dense tensor
that the coordinator has never seen (a head before the first merge) is counted from zero, and its start, where nobody trained a
row, is the mean of what all hold: ``W|NAME`` beside ``D|NAME``.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import PrivacyError, SecureSumError
from protocol.privacy.promise import Promise
from protocol.product_space import compress, inner, split, stack
from protocol.secure_sum.fixed_point import FixedPoint
from protocol.secure_sum.sketch import Innovation, Sketch, Total
from protocol.secure_sum.sketch import Terms as SumTerms
from protocol.secure_sum.stages import Asked, Summing
from protocol.secure_sum.terms import Terms

_MARGIN = 1.5  # over the largest singular value that is expected of rounding alone
_ROUNDING = 1e-9  # so that what was shortened to the limit is not beyond it by float64's rounding


@dataclass(frozen=True)
class Layout:
    """What everybody whose updates are added up knows, and where it lies in vectors.

    Args:
        asked: By the coordinator.
        modules: ``(d_out, d_in)`` by name.
        dense: Shape by name.
        arrived: The adapter that was sent, as it arrived.
        trains: Which factor.
        promise: Of differential privacy: then rows and nodes count alike (``protocol.privacy.private_sum``).
    """

    asked: Summing
    modules: Mapping[str, tuple[int, int]]
    dense: Mapping[str, tuple[int, ...]]
    arrived: Adapter
    trains: Literal["both", "A", "B"] = "both"
    promise: Promise | None = None

    def sketch(self) -> Sketch:
        """Where everything lies in both vectors."""
        dense: dict[str, tuple[int, ...]] = {}
        for name, shape in self.dense.items():
            dense[f"D|{name}"] = shape
            if name in self.arrived.dense:
                continue
            if self.promise:
                raise PrivacyError(
                    "privacy: a tensor that the coordinator has never seen has no start from which a change could be clipped; "
                    "start from an adapter that holds it (start), or train factors alone"
                )
            dense[f"W|{name}"] = shape
        if self.asked.kind == "tensors":
            for module, (d_out, d_in) in self.modules.items():
                r = self.arrived.factors[module].r
                dense |= {f"{kind}|{module}": (r, d_in if kind == "A" else d_out) for kind in self._factors()}
        by_row = frozenset(name for name, shape in dense.items() if shape and not name.startswith("W|") and not self.promise)
        products = self.asked.kind == "products"
        return Sketch(
            modules=dict(self.modules) if products else {},
            dense=dense,
            by_row=by_row,
            width=self.asked.width,
            seed=bytes.fromhex(self.asked.run),
            leading={module: pair.A for module, pair in self.arrived.factors.items()} if products else {},
        )

    def change(self, trained: Adapter, start: Adapter, rows: Mapping[str, Array]) -> Innovation:
        """What a node has changed, whole.

        Args:
            trained: Absolute tensors.
            start: What the node trained from.
            rows: By dense tensor, the rows that it trained; of others all.
        """
        dense = {f"D|{name}": _change(tensor, start.dense.get(name)) for name, tensor in trained.dense.items()}
        kept = {f"D|{name}": mask.astype(bool) for name, mask in rows.items()}
        modules: dict[str, list[tuple[float, Factors]]] = {}
        if self.asked.kind == "products":
            for module, pair in trained.factors.items():
                began = start.factors.get(module)
                modules[module] = [(1.0, pair), *([] if began is None else [(-1.0, began)])]
        else:
            for kind in self._factors():
                for module, pair in trained.factors.items():
                    r = self.arrived.factors[module].r
                    change = _rows(pair, kind) - _rows(start.factors[module], kind)
                    dense[f"{kind}|{module}"] = np.pad(change, ((0, r - pair.r), (0, 0)))
                    kept[f"{kind}|{module}"] = np.arange(r) < pair.r
        whole = {f"W|{name}": trained.dense[name].astype(np.float64) for name in trained.dense.keys() - self.arrived.dense}
        return Innovation(modules, dense | whole, kept)

    def arrays(self, total: Total, updates: int, examples: int) -> dict[str, Array]:
        """The sums as a rule's ``merge_partial`` takes them."""
        arrays = {"weight": np.array(total.weight), "examples": np.array(examples), "updates": np.array(updates)}
        for module, mean in total.modules.items():
            arrays |= {f"A|{module}": total.weight * mean.A, f"B|{module}": mean.B, f"distance|{module}": np.zeros(())}
        known = self._known()
        for name, change in total.dense.items():
            if name.startswith("W|"):
                continue
            weights = np.maximum(np.resize(total.row_weights[name], change.shape[:1]), 0.0)
            base = known.get(name)
            if base is None:
                base = total.dense[f"W|{name[2:]}"] / total.weight
                change = change - weights.reshape(weights.shape + (1,) * (change.ndim - weights.ndim)) * base
            key = name if self.asked.kind == "tensors" else name[2:]
            arrays |= {f"base|{key}": base, f"change|{key}": change, f"weight|{key}": weights}
        return arrays

    def _has_start(self, name: str) -> bool:
        return name[0] in "AB" or (name.startswith("D|") and name[2:] in self.arrived.dense)

    def _factors(self) -> str:
        return "AB" if self.trains == "both" else self.trains

    def _known(self) -> dict[str, Array]:
        found = {f"D|{name}": tensor.astype(np.float64) for name, tensor in self.arrived.dense.items()}
        if self.asked.kind == "tensors":
            for kind in self._factors():
                found |= {f"{kind}|{module}": _rows(pair, kind) for module, pair in self.arrived.factors.items()}
        return found


@dataclass(frozen=True)
class Frame(Layout):
    """What everybody in a secure sum knows: the same at the coordinator and at every node, or their keys do not agree."""

    asked: Asked

    def terms(self, federation: str, number: int) -> tuple[Terms, ...]:
        """Of each sum; where no module goes through the sketch there is but one."""
        sketch = self.sketch()
        lengths = [sketch.first_length(), *([sketch.second_length()] if sketch.modules else [])]
        found = (
            Terms(
                federation=federation,
                run=self.asked.run,
                round=number,
                phase=phase,
                length=length + (self.promise.votes(phase) if self.promise else 0),
                limit=max(self.asked.limit, 1.0),  # of the weights, too
                nodes=self.asked.nodes,
                neighbours=self.asked.neighbours,
                share=self.asked.share,
                promise=self.promise.model_dump_json() if self.promise else "",
                asked=hashlib.sha256(f"{self.trains}{self.asked.model_dump_json()}".encode()).hexdigest(),
            )
            for phase, length in enumerate(lengths)
        )
        return tuple(map(self._with_noise, found))

    def innovation(self, trained: Adapter, start: Adapter, rows: Mapping[str, Array]) -> Innovation:
        """``change``, no longer than the limit."""
        whole = self.change(trained, start, rows)
        # What has no start yet is no change, and has no length that could be shortened.
        unseen = {name for name in whole.dense if name.startswith("W|") or not self._has_start(name)}
        size = _norm(whole.modules, whole.dense, whole.rows, unseen)
        share = min(1.0, self.asked.limit * (1 - _ROUNDING) / max(size, 1e-300))
        return Innovation(
            {module: _shortened(terms, share) for module, terms in whole.modules.items()},
            {name: change if name in unseen else share * change for name, change in whole.dense.items()},
            whole.rows,
        )

    def weight(self, num_examples: int) -> float:
        """A node's, from 0 to 1."""
        return min(1.0, num_examples / self.asked.examples)

    def partial(self, total: Total, updates: int) -> dict[str, Array]:
        """The sums as a rule's ``merge_partial`` takes them.

        Raises:
            SecureSumError: No updates within the limit have such a sum: somebody's was none. Whose, a sum does not tell.
        """
        if not total.weight <= updates * (1 + 1e-6):
            raise SecureSumError(f"secure sum: {updates} updates weigh {total.weight:.3g}, expected at most 1 each")
        self._check_length(total)
        modules = {module: self._above_rounding(mean, total.weight) for module, mean in total.modules.items()}
        return self.arrays(replace(total, modules=modules), updates, round(total.weight * self.asked.examples))

    def _above_rounding(self, mean: Factors, weight: float) -> Factors:
        """The directions that are more than fixed point's rounding.

        What is left in the others is noise: nodes would train on from it, where they begin anew when there is no direction. An
        entry of ``Z`` has a standard deviation of half a step for each node at most, and the largest singular value of such a
        matrix is about the sum of its sides' roots times that (Vershynin 2010, arXiv:1011.3027, theorem 5.32).
        """
        found = compress([(1.0, mean)], mean.shape, mean.r)
        deviation = 0.5 * self._step() * len(self.asked.nodes) ** 0.5 / weight
        bound = _MARGIN * deviation * (mean.r**0.5 + mean.shape[1] ** 0.5)
        return split(found.factors, int(np.count_nonzero(found.singular_values > bound)))[0]

    def _with_noise(self, terms: Terms) -> Terms:
        """With room for the noise that nodes add."""
        return replace(terms, limit=max(self.promise.limit(terms), 1.0)) if self.promise else terms

    def _step(self) -> float:
        return 1 / FixedPoint(max(self.asked.limit, 1.0), len(self.asked.nodes)).scale

    def _check_length(self, total: Total) -> None:
        """A weighted mean is no longer than the longest of what it is of, but for the rounding of every entry."""
        parts = [pair.A for pair in total.modules.values()]
        parts += [change / total.weight for name, change in total.dense.items() if self._has_start(name)]
        found = sum(float(np.sum(part**2)) for part in parts) ** 0.5
        rounding = len(self.asked.nodes) * self._step() * sum(part.size for part in parts) ** 0.5 / total.weight
        if not found <= self.asked.limit + rounding:
            raise SecureSumError(
                f"secure sum: the mean of updates of norm {self.asked.limit:g} at most has the norm {found:.3g}; somebody's "
                "was none of these, and whose, a sum does not tell"
            )


def words(terms: Terms, vector: NDArray[np.float64]) -> NDArray[np.uint32]:
    """A vector in the sum's fixed point.

    Raises:
        SecureSumError: A value is beyond the limit: a tensor that has no start yet is larger than any change may be.
    """
    point: FixedPoint = terms.fixed_point
    encoded, beyond = point.encode(vector)
    if beyond:
        raise SecureSumError(
            f"secure sum: {beyond} values beyond {point.limit:g}, of a tensor that the coordinator has not seen yet; "
            "nothing is sent; raise secure_sum.limit"
        )
    return encoded


def _change(tensor: Array, start: Array | None) -> Array:
    change: Array = tensor.astype(np.float64)
    return change if start is None else change - start.astype(np.float64)


def _rows(pair: Factors, kind: str) -> Array:
    """A, or B with the scaling inside; a row for each direction."""
    return pair.A.astype(np.float64) if kind == "A" else pair.scaling * pair.B.T.astype(np.float64)


def _shortened(terms: SumTerms, share: float) -> list[tuple[float, Factors]]:
    """The sum as one pair, in float64."""
    left, right = stack(terms)
    if not left.size:
        d_out, d_in = terms[0][1].shape
        left, right = np.zeros((d_out, 0)), np.zeros((0, d_in))
    return [(1.0, Factors(right, share * left))]


def _norm(
    modules: Mapping[str, SumTerms],
    dense: Mapping[str, Array],
    kept: Mapping[str, NDArray[np.bool_]],
    unseen: set[str],
) -> float:
    total = sum(max(inner(terms, terms), 0.0) for terms in modules.values())
    for name, change in dense.items():
        if name not in unseen:
            total += float(np.sum((change[kept[name]] if name in kept else change) ** 2))
    return float(total**0.5)
