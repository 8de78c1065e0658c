"""Innovations of any ranks as vectors of one length, whose sum gives the sum of the innovations: two masked sums a round.

Let ``D = sum_k w_k D_k`` be a module's weighted sum of innovations, ``(d_out, d_in)``. The coordinator publishes a basis
``O`` of ``width`` orthonormal columns; nodes send ``w_k D_k O`` and the first sum is ``Y = D O``. It publishes ``Q``, an
orthonormal basis of ``Y``; nodes send ``w_k Q^T D_k``, and the second sum ``Z`` gives ``D ~ Q Z``: the randomised range
finder of Halko, Martinsson and Tropp 2011 (arXiv:0909.4061, algorithm 4.1 and equation 5.1), exact where D has no more than
``width`` directions and otherwise with an expected error of ``sqrt(1 + r / (width - r - 1))`` times the best of rank ``r``
(theorem 10.5). ``O`` begins with the leading directions of the adapter that was sent (a warm start) and goes on with drawn
ones.

One sum with both sides of a sketch (Tropp et al. 2017, arXiv:1609.00048) needs half the messages; at equal or twice the bytes
it was 1.02 to 24 times as far from the truth (benchmarks/LOG.md).

No node's factors are sent, and no entry is larger than its innovation: ``|(D O)_ij| <= |D|_F`` for unit columns. The whole
vector of one phase has the norm of the whole update at most, ``|D O|_F <= |D|_F`` and ``|Q^T D|_F <= |D|_F``, for orthonormal
columns do not lengthen. Clipping the update to a norm clips the vector: its sensitivity is that norm, ``sqrt(2)`` of it over
both phases.

Dense tensors and the rows that were trained ride along in the first vector. Each vector begins with the node's weight, for the
two sums may be over different nodes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from protocol.adapter import Array, Factors
from protocol.errors import SecureSumError
from protocol.product_space import stack

Vector = NDArray[np.float64]
Terms = Sequence[tuple[float, Factors]]


@dataclass(frozen=True)
class Innovation:
    """What a node has changed.

    Attributes:
        modules: By name, weighted factors whose sum is the module's change: ``[(1.0, trained), (-1.0, start)]``.
        dense: Changes by tensor.
        rows: Of tensors of which the node trained some rows only: which, boolean.
    """

    modules: Mapping[str, Terms]
    dense: Mapping[str, Array] = field(default_factory=dict)
    rows: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(frozen=True)
class Total:
    """What a round's two sums say.

    Attributes:
        modules: ``Q`` and ``Z`` over the weight of the second sum: each module's weighted mean innovation.
        dense: Sums of weighted changes.
        row_weights: By tensor, the weight behind each row, of one number where all of its rows count alike.
        weight: Of the first sum.
    """

    modules: Mapping[str, Factors]
    dense: Mapping[str, Vector]
    row_weights: Mapping[str, Vector]
    weight: float


@dataclass(frozen=True)
class Sketch:
    """The layout of both vectors; the same for everybody.

    Args:
        modules: ``(d_out, d_in)`` by name.
        dense: Shape by name.
        by_row: Names of the dense tensors whose rows are weighed one by one.
        width: Columns of a basis; fewer where a module has fewer.
        seed: Whatever the basis is drawn from.
        leading: By module, the directions to begin with, ``(r, d_in)``: ``A`` of the adapter that was sent.
        kept: Bases that were made, where many vectors are made with them.
    """

    modules: Mapping[str, tuple[int, int]]
    dense: Mapping[str, tuple[int, ...]]
    by_row: frozenset[str]
    width: int
    seed: bytes
    leading: Mapping[str, Array] = field(default_factory=dict)
    kept: dict[str, Array] | None = None

    def first_length(self) -> int:
        """Values in the first vector."""
        return 1 + sum(size for *_, size in self._first_parts())

    def second_length(self) -> int:
        """Values in the second vector."""
        return 1 + sum(self.columns(module) * d_in for module, (_, d_in) in sorted(self.modules.items()))

    def columns(self, module: str) -> int:
        """Of a module's basis."""
        return min(self.width, *self.modules[module])

    def basis(self, module: str) -> Array:
        """``O``, ``(d_in, columns)``, float64; equal to rounding at everybody."""
        if self.kept is not None and module in self.kept:
            return self.kept[module]
        d_in, columns = self.modules[module][1], self.columns(module)
        seed = hashlib.sha256(self.seed + module.encode()).digest()
        drawn = np.random.Generator(np.random.Philox(int.from_bytes(seed[:16]))).standard_normal((d_in, columns))
        known = self.leading.get(module, np.zeros((0, d_in)))[:columns]
        norms = np.linalg.norm(known.astype(np.float64), axis=1)
        known = known[norms > 0].astype(np.float64) / norms[norms > 0, None]
        drawn[:, : len(known)] = known.T
        basis = np.linalg.qr(drawn)[0]
        if self.kept is not None:
            self.kept[module] = basis
        return basis

    def first(self, own: Innovation, weight: float) -> Vector:
        """A node's first vector, float64.

        Raises:
            SecureSumError: The innovation has other modules, tensors or shapes than the layout.
        """
        self._check(own)
        vector = np.zeros(self.first_length())
        vector[0] = weight
        for kind, name, at, size in self._places():
            part = vector[at : at + size]
            if kind == "module":
                left, right = stack(own.modules.get(name, ()))
                if left.size:
                    part[:] = weight * (left @ (right @ self.basis(name))).reshape(-1)
            elif kind == "dense" and name in own.dense:
                part[:] = weight * (_kept(own, name) * own.dense[name]).reshape(-1)
            elif kind == "rows" and name in own.dense:
                part[:] = weight * own.rows.get(name, np.ones(size, bool))
        return vector

    def ranges(self, total: Vector) -> dict[str, Array]:
        """``Q`` by module, ``(d_out, columns)``, float32 (as it travels), from the first sum."""
        return {
            name: np.linalg.qr(total[at : at + size].reshape(self.modules[name][0], -1))[0].astype(np.float32)
            for kind, name, at, size in self._places()
            if kind == "module"
        }

    @staticmethod
    def digest(ranges: Mapping[str, Array]) -> bytes:
        """SHA-256 over a basis: nodes that were told others' is another would not add up to a sum.

        A coordinator that gave all but one a basis across what the first sum has shown would find that one's update alone in
        the second.
        """
        found = hashlib.sha256()
        for name, basis in sorted(ranges.items()):
            found.update(json.dumps([name, basis.shape, str(basis.dtype)]).encode() + basis.tobytes())
        return found.digest()

    def second(self, own: Innovation, ranges: Mapping[str, Array], weight: float) -> Vector:
        """A node's second vector, float64.

        Raises:
            SecureSumError: A basis is missing, has another shape or lengthens what it is multiplied with.
        """
        self._check(own)
        parts = [np.array([weight])]
        for module, (d_out, d_in) in sorted(self.modules.items()):
            found = ranges.get(module)
            if found is None or found.shape != (d_out, self.columns(module)):
                raise SecureSumError(
                    f"secure sum: no basis of shape ({d_out}, {self.columns(module)}) for a module; nothing is sent"
                )
            basis = found.astype(np.float64)
            if not np.linalg.norm(basis.T @ basis - np.eye(basis.shape[1])) < 1e-4:  # so that NaN is refused too
                raise SecureSumError("secure sum: a basis whose columns are not orthonormal; nothing is sent")
            left, right = stack(own.modules.get(module, ()))
            parts.append(weight * ((basis.T @ left) @ right).reshape(-1) if left.size else np.zeros(basis.shape[1] * d_in))
        return np.concatenate(parts)

    def totalled(self, first: Vector, ranges: Mapping[str, Array], second: Vector) -> Total:
        """What both sums say.

        Raises:
            SecureSumError: Nobody's weight is in one of them.
        """
        if not (first[0] > 0 and second[0] > 0):
            raise SecureSumError("secure sum: the weights sum to nothing; no node has trained on any row")
        modules, at = {}, 1
        for module, (_, d_in) in sorted(self.modules.items()):
            columns = self.columns(module)
            back = second[at : at + columns * d_in].reshape(columns, d_in) / second[0]
            modules[module] = Factors(A=back, B=ranges[module].astype(np.float64))
            at += columns * d_in
        dense: dict[str, Vector] = {}
        weights: dict[str, Vector] = {}
        for kind, name, place, size in self._places():
            if kind == "dense":
                dense[name] = first[place : place + size].reshape(self.dense[name])
                weights.setdefault(name, first[:1])
            elif kind == "rows":
                weights[name] = first[place : place + size]
        return Total(modules, dense, weights, float(first[0]))

    def _first_parts(self) -> Iterator[tuple[str, str, int]]:
        for module, (d_out, _) in sorted(self.modules.items()):
            yield "module", module, d_out * self.columns(module)
        for name, shape in sorted(self.dense.items()):
            yield "dense", name, prod(shape)
            if name in self.by_row:
                yield "rows", name, shape[0]

    def _places(self) -> Iterator[tuple[str, str, int, int]]:
        at = 1
        for kind, name, size in self._first_parts():
            yield kind, name, at, size
            at += size

    def _check(self, own: Innovation) -> None:
        for module, terms in own.modules.items():
            if any(pair.shape != self.modules.get(module) for _, pair in terms):
                raise SecureSumError("secure sum: a module that the round does not know, or of another shape; nothing is sent")
        for name, change in own.dense.items():
            if change.shape != self.dense.get(name):
                raise SecureSumError("secure sum: a tensor that the round does not know, or of another shape; nothing is sent")
        if own.rows.keys() - self.by_row:
            raise SecureSumError("secure sum: rows of a tensor whose rows are not weighed one by one; nothing is sent")


def _kept(own: Innovation, name: str) -> Array:
    rows = own.rows.get(name)
    return np.ones(1) if rows is None else rows.reshape(rows.shape + (1,) * (own.dense[name].ndim - 1))
