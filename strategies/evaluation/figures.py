"""A figure of some rows as a function of sums over them, so that it can be had again for any choice or weighting of the rows.

Accuracy is right answers over answers, perplexity ``exp`` of nats over tokens, macro-F1 a function of counts by label, BLEU one
of matches by length. Each row brings its ``k`` summands once; a bootstrap of a thousand draws is then one product of matrices.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_AT_ONCE = 100
_LARGEST = 700.0  # exp of more is no float64


@dataclass(frozen=True)
class Figure:
    """One figure of n rows.

    Attributes:
        rows: ``(n, k)`` float64: what each row adds to the sums.
        of: From sums ``(..., k)`` to figures ``(...)``; NaN where there is nothing to divide by.
        better: Whether more or less of it is better.
        unit: Of the figure; empty for shares and other pure numbers.
    """

    rows: Array
    of: Callable[[Array], Array]
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""

    @property
    def value(self) -> float:
        """The figure of all rows."""
        return float(self.of(self.rows.sum(0)))

    def weighted(self, weights: Array) -> Array:
        """The figure for each of ``(m, n)`` weightings of the rows, ``(m,)``."""
        # A thousand weightings of many rows are held as small whole numbers: only some of them at a time as float64.
        parts = np.array_split(weights, -(-len(weights) // _AT_ONCE))
        return np.concatenate([self.of(part.astype(np.float64) @ self.rows) for part in parts])

    def without(self, groups: Array) -> Array:
        """The figure with one group of rows left out, for each group.

        Args:
            groups: ``(n,)`` whole numbers from 0: the group of each row.
        """
        summed = np.zeros((int(groups.max()) + 1, self.rows.shape[1]))
        np.add.at(summed, groups, self.rows)
        return self.of(self.rows.sum(0) - summed)

    def part(self, chosen: Sequence[int]) -> "Figure":
        """The same of some of the rows."""
        return replace(self, rows=self.rows[np.asarray(chosen, dtype=int)])


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """The value of each."""
    return {name: figure.value for name, figure in figures.items()}


def mean(numbers: Iterable[float], better: Literal["higher", "lower"] = "higher", unit: str = "") -> Figure:
    """The mean of a number per row."""
    summands = np.asarray(list(numbers), dtype=np.float64)
    return ratio(summands, np.ones_like(summands), better, unit)


def ratio(above: Any, below: Any, better: Literal["higher", "lower"] = "higher", unit: str = "") -> Figure:
    """A sum over the rows over another, such as nats over tokens."""
    return Figure(np.stack([np.asarray(above, np.float64), np.asarray(below, np.float64)], 1), _divided, better, unit)


def perplexity(nats: Any, tokens: Any) -> Figure:
    """``exp`` of nats per token; 1.0e304 stands for anything larger."""
    return replace(ratio(nats, tokens, "lower"), of=lambda sums: np.exp(np.minimum(_divided(sums), _LARGEST)))


def macro_f1(found: Any, wanted: Any) -> Figure:
    """F1 of each label that the rows bear, ``2 tp / (found + wanted)``, and the mean of them.

    Args:
        found: ``(n,)`` whole numbers: what was guessed.
        wanted: ``(n,)`` whole numbers: the labels.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    labels = np.unique(wanted)
    guessed, borne = (each[:, None] == labels for each in (found, wanted))

    def of(sums: Array) -> Array:
        right, taken, there = np.split(sums, 3, axis=-1)
        with np.errstate(invalid="ignore"):
            each = 2 * right / (taken + there)
            return np.asarray(np.where(there > 0, each, 0).sum(-1) / (there > 0).sum(-1))

    return Figure(np.concatenate([guessed & borne, guessed, borne], axis=1).astype(np.float64), of)


def pearson(found: Any, wanted: Any) -> Figure:
    """Pearson's correlation of two numbers per row; 0 where one of them is the same in all rows."""
    # The mean is taken off first: sums of squares of numbers far from 0 would leave no digits for their differences.
    x, y = (np.asarray(each, np.float64) - np.mean(each) for each in (found, wanted))

    def of(sums: Array) -> Array:
        n, sum_x, sum_y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = np.sqrt(np.maximum(xx - sum_x**2 / n, 0) * np.maximum(yy - sum_y**2 / n, 0))
            return np.asarray(np.clip(np.nan_to_num((xy - sum_x * sum_y / n) / spread, nan=0.0, posinf=0.0, neginf=0.0), -1, 1))

    return Figure(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], 1), of)


def _divided(sums: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])
