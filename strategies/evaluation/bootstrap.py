"""How far a figure, or the difference of two on the same rows, could lie from what other rows like these would give.

Rows are drawn with replacement and every figure is taken again; the interval is the bias-corrected and accelerated one (Efron
and Tibshirani 1993, An Introduction to the Bootstrap, eq. 14.9 to 14.15), which unlike plain percentiles follows figures whose
draws lean to one side: perplexity, calibration error. A difference is drawn on the same rows for both models (paired), since
what makes a row hard makes it hard for both.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from strategies.evaluation.figures import Array, Figure

_NORMAL = NormalDist()
# Fewer groups have so few different draws that an interval would be a guess.
FEWEST = 5


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; ``low == high == value`` where no draw differs from it, both NaN of fewer than 5 groups."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Draws:
    """Weightings of the rows, the same for every figure and model.

    Attributes:
        weights: ``(m, n)``: how often each draw holds each row.
        groups: ``(n,)``: rows of one group are drawn together (answers of one conversation are not independent).
        level: Share of all intervals that should hold the truth.
    """

    weights: Array
    groups: Array
    level: float = 0.95

    def estimate(self, figure: Figure, against: Figure | None = None) -> Estimate:
        """A figure, or by how much it exceeds another on the same rows, with its interval."""
        value, drawn, left_out = figure.value, figure.weighted(self.weights), figure.without(self.groups)
        if against is not None:
            value -= against.value
            drawn = drawn - against.weighted(self.weights)
            left_out = left_out - against.without(self.groups)
        if len(left_out) < FEWEST:
            return Estimate(value, math.nan, math.nan)
        drawn = drawn[np.isfinite(drawn)]
        if not len(drawn) or np.ptp(drawn) == 0:
            return Estimate(value, value, value)
        low, high = np.quantile(drawn, _ends(value, drawn, left_out[np.isfinite(left_out)], self.level))
        return Estimate(value, float(low), float(high))


def draws(groups: Array, count: int = 1000, seed: int = 0, level: float = 0.95) -> Draws:
    """Draws as many groups as there are, with replacement, ``count`` times.

    Args:
        groups: ``(n,)`` whole numbers from 0 without gaps: the group of each row.
        count: Draws.
        seed: The same gives the same.
        level: Share of all intervals that should hold the truth.
    """
    total = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    weights = np.empty((count, len(groups)), np.uint16)
    for row in weights:
        row[:] = np.bincount(rng.integers(total, size=total), minlength=total)[groups]
    return Draws(weights, groups, level)


def _ends(value: float, drawn: Array, left_out: Array, level: float) -> tuple[float, float]:
    """Which quantiles of the draws are the interval's ends."""
    # Draws of a share tie with it: half of those count as below.
    below = float(np.mean(drawn < value) + np.mean(drawn == value) / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / len(drawn)), 1 - 0.5 / len(drawn)))
    apart = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    cubes, squares = float((apart**3).sum()), float((apart**2).sum())
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0

    def shifted(share: float) -> float:
        z = bias + _NORMAL.inv_cdf(share)
        return _NORMAL.cdf(bias + z / max(1 - acceleration * z, 1e-9))

    return shifted((1 - level) / 2), shifted((1 + level) / 2)
