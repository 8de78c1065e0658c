"""Behind the last layer: log-probabilities of what is learnt, and the gradient that goes back, within bounds of memory.

A decoder's head sees only positions at which something is learnt, some at a time, and of a large vocabulary some tokens at a
time: log-sum-exp over all of them comes of those of the parts, and the gradient is the sum over the parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edge.runtime.manifest import BundleManifest
from edge.runtime.session import Resources
from edge.runtime.training_graph import WEIGHT, TrainingGraph, Values, opened
from edge.runtime.training_plan import PLAN, TrainingPlan, head_path
from edge.runtime.training_rows import Learnt, Objective, Padded, Row, Scored, by_row, learnt, likelihood
from edge.runtime.weights import Source
from protocol.errors import BundleError

Array = NDArray[Any]
# Of the head's weight in float32, and of the logits of a part: each is held a few times while a gradient is made.
_PART_BYTES: Final = 32 * 2**20
_LOGIT_BYTES: Final = 8 * 2**20
_MOST_POSITIONS: Final = 256


class Learning(NamedTuple):
    """What a head gives back.

    Attributes:
        loss: Of the objective.
        scored: Of the rows.
        dx: d loss / d last states, float32 ``(rows, tokens, hidden)``.
        gradients: By name of the graph's outputs: ``{module}.A|B`` and ``dense.{name}``.
    """

    loss: float
    scored: Scored
    dx: Array
    gradients: Mapping[str, Array]


class DecoderHead:
    """Words, one after the other; for one thread.

    Args:
        folder, manifest, plan, weights, resources: As of ``Gradients``.

    Attributes:
        modules: What takes factors: nothing.
        dense: What is trained whole: nothing.
    """

    def __init__(
        self, folder: Path, manifest: BundleManifest, plan: TrainingPlan, weights: Source, resources: Resources
    ) -> None:
        self.modules: dict[str, tuple[int, int]] = {}
        self.dense: tuple[str, ...] = ()
        self._score, self._whole, self._part = (
            TrainingGraph(opened(folder, manifest, head_path(what), resources)) for what in ("score", "whole", "part")
        )
        self._weights, self._words = weights, plan.words
        tables = [shape for name in plan.words if len(shape := weights.shape(name)) == 2]
        if not tables:
            raise BundleError(
                f"{folder / PLAN}: words: none of {len(plan.words)} has a row for each token; make the bundle anew"
            )
        self._vocabulary, hidden = tables[0]
        parts = -(-self._vocabulary * 4 * hidden // _PART_BYTES)
        self._rows = max(2, -(-self._vocabulary // parts))

    def weights(self) -> Iterator[tuple[str, Sequence[Any]]]:
        """Names and shapes of the parameters that the graph takes."""
        yield from self._whole.weights().items()

    def score(self, x: Array, rows: Sequence[Row], batch: Padded, factors: Values) -> Scored:  # noqa: ARG002 (a classifier's)
        """Of the last states ``(rows, tokens, hidden)``."""
        places = learnt(rows)
        return _scored(places, len(rows), *self._read(x[places.row, places.position], places.target))

    def learn(
        self,
        x: Array,
        rows: Sequence[Row],
        batch: Padded,  # noqa: ARG002 (a classifier's)
        factors: Values,  # noqa: ARG002
        objective: Objective | None,
        count: float | None,
    ) -> Learning:
        """Loss, and its gradient by the last states."""
        places = learnt(rows)
        states = x[places.row, places.position]
        dx = np.zeros_like(x)
        if objective is None and self._rows == self._vocabulary:
            slope = np.full(len(states), -1.0 / (count or len(states)), np.float32)
            lse, picked, top, d_states = self._at_once(states, places.target, slope)
            scored = _scored(places, len(rows), lse, picked, top)
            loss, _ = likelihood(count or len(states))(scored.log_probabilities)
        else:
            lse, picked, top = self._read(states, places.target)
            scored = _scored(places, len(rows), lse, picked, top)
            loss, slopes = (objective or likelihood(count or len(states)))(scored.log_probabilities)
            d_states = self._back(states, places.target, slopes[places.row].astype(np.float32), lse.astype(np.float32))
        dx[places.row, places.position] = d_states
        return Learning(loss, scored, dx, {})

    def _at_once(self, states: Array, targets: Array, slope: Array) -> tuple[Array, Array, Array, Array]:
        held = self._held(0, self._vocabulary)
        names = ("lse", "picked", "top", "dx")
        told: dict[str, list[Array]] = {name: [] for name in names}
        for some in self._positions(len(states)):
            given = {"x": _value(states[None, some]), "targets": _value(targets[some]), "slope": _value(slope[some])}
            given["inside"] = _value(np.ones_like(slope[some]))
            for name, value in self._whole.run(held | given, names).items():
                told[name].append(value.numpy())
        lse, picked, top = (np.concatenate(told[name]).astype(np.float64) for name in names[:3])
        return lse, picked, top, np.concatenate(told["dx"], axis=1)[0]

    def _read(self, states: Array, targets: Array) -> tuple[Array, Array, Array]:
        lse, top = np.full((2, len(states)), -np.inf)
        picked = np.zeros(len(states))
        for first, last in self._parts():
            held, inside, local = self._held(first, last), *_within(targets, first, last)
            for some in self._positions(len(states)):
                given = {"x": _value(states[None, some]), "targets": _value(local[some]), "inside": _value(inside[some])}
                told = self._score.run(held | given, ("lse", "picked", "top"))
                lse[some] = np.logaddexp(lse[some], told["lse"].numpy())
                picked[some] += told["picked"].numpy()
                top[some] = np.maximum(top[some], told["top"].numpy())
        return lse, picked, top

    def _back(self, states: Array, targets: Array, slope: Array, lse: Array) -> Array:
        dx = np.zeros_like(states)
        for first, last in self._parts():
            held, inside, local = self._held(first, last), *_within(targets, first, last)
            for some in self._positions(len(states)):
                given = {"x": _value(states[None, some]), "targets": _value(local[some]), "inside": _value(inside[some])}
                given |= {"slope": _value(slope[some]), "total": _value(lse[some])}
                dx[some] += self._part.run(held | given, ("dx_part",))["dx_part"].numpy()[0]
        return dx

    def _held(self, first: int, last: int) -> dict[str, onnxruntime.OrtValue]:
        """Weights of the head, of some tokens."""
        names = self._whole.weights()
        found = {name: self._weights.read(name, f"head {name}") for name in names if name not in self._words}
        found |= {name: self._weights.part(name, first, last) for name in names if name in self._words}
        return {f"{WEIGHT}{name}": _value(array) for name, array in found.items()}

    def _parts(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self._vocabulary, self._rows):
            yield first, min(first + self._rows, self._vocabulary)

    def _positions(self, count: int) -> Iterator[slice]:
        step = min(_MOST_POSITIONS, max(1, _LOGIT_BYTES // (4 * self._rows)))
        for first in range(0, count, step):
            yield slice(first, first + step)


class ClassifierHead:
    """One class for a row; for one thread.

    Args:
        folder, manifest, plan, weights, resources: As of ``Gradients``.

    Attributes:
        modules: ``(d_in, d_out)`` of what takes factors.
        dense: What is trained whole.
    """

    def __init__(
        self,
        folder: Path,
        manifest: BundleManifest,
        plan: TrainingPlan,  # noqa: ARG002 (a decoder's)
        weights: Source,
        resources: Resources,
    ) -> None:
        self._score, self._backward = (
            TrainingGraph(opened(folder, manifest, head_path(what), resources)) for what in ("score", "backward")
        )
        self._weights = weights
        self.modules = self._score.modules()
        self.dense = tuple(name.removeprefix("dense.") for name in self._score.inputs if name.startswith("dense."))

    def weights(self) -> Iterator[tuple[str, Sequence[Any]]]:
        """Names and shapes of the parameters that the graph takes."""
        yield from self._score.weights().items()

    def score(self, x: Array, rows: Sequence[Row], batch: Padded, factors: Values) -> Scored:
        """Of the last states ``(rows, tokens, hidden)``."""
        return self._scored(self._score.run(self._given(x, batch, factors), ("logits",))["logits"].numpy(), rows)

    def learn(
        self,
        x: Array,
        rows: Sequence[Row],
        batch: Padded,
        factors: Values,
        objective: Objective | None,
        count: float | None,
    ) -> Learning:
        """Loss, and its gradient by the last states, the head and the factors behind the layers."""
        given = self._given(x, batch, factors)
        scored = self._scored(self._score.run(given, ("logits",))["logits"].numpy(), rows)
        loss, slopes = (objective or likelihood(count or len(rows)))(scored.log_probabilities)
        given |= {"targets": _value(np.array([row.labels for row in rows])), "slope": _value(slopes.astype(np.float32))}
        told = {name: value.numpy() for name, value in self._backward.run(given, self._backward.outputs).items()}
        dx = told.pop("dx")
        return Learning(loss, scored, dx, {name.removeprefix("grad."): array for name, array in told.items()})

    def _given(self, x: Array, batch: Padded, factors: Values) -> dict[str, onnxruntime.OrtValue]:
        held = {f"{WEIGHT}{name}": _value(self._weights.read(name, f"head {name}")) for name in dict(self.weights())}
        return held | dict(factors) | {"x": _value(x), "input_ids": _value(batch.ids), "attention_mask": _value(batch.mask)}

    def _scored(self, logits: Array, rows: Sequence[Row]) -> Scored:
        labels = np.array([row.labels for row in rows])
        wide = logits.astype(np.float64)
        shifted = wide - wide.max(1, keepdims=True)
        told = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        at = np.arange(len(rows))
        return Scored(told[at, labels], np.ones(len(rows), np.int64), (logits.argmax(1) == labels).astype(np.int64))


def _scored(places: Learnt, count: int, lse: Array, picked: Array, top: Array) -> Scored:
    sums = by_row(picked - lse, places.row, count)
    tokens, hits = (by_row(each, places.row, count).astype(np.int64) for each in (np.ones(len(lse)), picked >= top))
    return Scored(sums, tokens, hits)


def _within(targets: Array, first: int, last: int) -> tuple[Array, Array]:
    """Which targets are tokens ``[first, last)``, as 0 and 1, and their numbers in it."""
    inside = (targets >= first) & (targets < last)
    return inside.astype(np.float32), np.where(inside, targets - first, 0)


def _value(array: Array) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
