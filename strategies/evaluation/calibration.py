"""Whether a classifier is as sure as it is right: calibration error, Brier score, and the bins of a reliability diagram.

A row's confidence is the greatest of its probabilities. Over ``B`` bins of equal width in (0, 1], the expected calibration
error is the mean distance of confidence and accuracy, weighted by rows (Guo et al. 2017, arXiv:1706.04599, eq. 3).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from strategies.evaluation.figures import Array, Figure, mean

BINS = 15  # as in the paper


@dataclass(frozen=True)
class Bin:
    """Rows of like confidence: how many, their mean confidence, and the share of them that is right."""

    above: float
    up_to: float
    rows: int
    confidence: float
    accuracy: float


def figures(probabilities: Array, wanted: Array) -> Mapping[str, Figure]:
    """``ece`` and ``brier``: ``sum_k (p_k - [k is the label])^2``, mean over rows, from 0 to 2 (Brier 1950).

    Args:
        probabilities: ``(n, labels)``; each row sums to 1.
        wanted: ``(n,)`` whole numbers.
    """
    truth = np.eye(probabilities.shape[1])[wanted]
    return {
        "ece": Figure(_in_bins(probabilities, wanted).reshape(len(wanted), -1), _error, "lower"),
        "brier": mean(((probabilities - truth) ** 2).sum(1), "lower"),
    }


def reliability(probabilities: Array, wanted: Array) -> list[Bin]:
    """The bins that hold rows, by growing confidence; arguments as for ``figures``."""
    sums = _in_bins(probabilities, wanted).sum(0)
    return [
        Bin(at / BINS, (at + 1) / BINS, int(rows), float(confidence / rows), float(right / rows))
        for at, (rows, confidence, right) in enumerate(sums.T)
        if rows
    ]


def softmax(logits: Array) -> Array:
    """Probabilities along the last axis."""
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def _in_bins(probabilities: Array, wanted: Array) -> Array:
    """``(n, 3, BINS)``: each row's 1, its confidence and whether it is right, in its bin."""
    confidence = probabilities.max(1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    told = np.stack([np.ones_like(confidence), confidence, probabilities.argmax(1) == wanted], 1)
    return np.asarray(told[:, :, None] * np.eye(BINS)[bins][:, None, :])


def _error(sums: Array) -> Array:
    rows, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, BINS), -2, 0)
    return np.asarray(np.abs(confidence - right).sum(-1) / rows.sum(-1))
