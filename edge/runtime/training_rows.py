"""Rows that are learnt from, and what a forward pass says of them."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.adapter import Adapter
from protocol.errors import DataError

Array = NDArray[Any]
NOT_LEARNT: Final = -100  # a label that no token has, as Hugging Face's


class Row(NamedTuple):
    """One text.

    Attributes:
        ids: Token ids, without padding.
        labels: Of a decoder, for each token its id, or ``NOT_LEARNT``; nothing is said of the first token. Of a classifier, the
            number of the class.
    """

    ids: Sequence[int]
    labels: Sequence[int] | int


class Scored(NamedTuple):
    """A forward pass, row by row.

    Attributes:
        log_probabilities: float64, sums over what is learnt of a row.
        tokens: int64, how many that are: tokens, or 1 for a class.
        hits: int64, how many of them were the likeliest.
    """

    log_probabilities: Array
    tokens: Array
    hits: Array


class Gradient(NamedTuple):
    """A forward and a backward pass.

    Attributes:
        loss: What was minimised.
        gradients: d loss / d parameter, float32, with the names, the shapes and the scalings of the adapter that was given.
        scored: The forward pass.
    """

    loss: float
    gradients: Adapter
    scored: Scored


# Log-probabilities of the rows to the loss and its derivative by each of them.
Objective = Callable[[Array], tuple[float, Array]]


class Padded(NamedTuple):
    """Rows of a batch as rectangles ``(rows, longest)`` int64.

    Attributes:
        ids: Shorter rows are filled with the padding's id.
        mask: 1 where there is a token.
    """

    ids: Array
    mask: Array


def padded(rows: Sequence[Row], pad: int) -> Padded:
    """Fills rows up to the longest of them."""
    ids = np.full((len(rows), max(len(row.ids) for row in rows)), pad, np.int64)
    mask = np.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = row.ids
        mask[at, : len(row.ids)] = 1
    return Padded(ids, mask)


class Learnt(NamedTuple):
    """The places of a batch at which something is learnt, in order.

    Attributes:
        row: Number of the row.
        position: Whose states the target is read off.
        target: Token id.
    """

    row: Array
    position: Array
    target: Array


def learnt(rows: Sequence[Row]) -> Learnt:
    """Of a decoder: a token is read off the one before it."""
    found = [
        (number, at - 1, label)
        for number, row in enumerate(rows)
        for at, label in enumerate(row.labels if isinstance(row.labels, Sequence) else ())
        if at and label != NOT_LEARNT
    ]
    return Learnt(*np.array(found, np.int64).reshape(-1, 3).T)


def check_rows(rows: Sequence[Row], most_tokens: int, vocabulary: int | None, labels: int | None) -> None:
    """Refuses rows that cannot be learnt from; what they say is in no message.

    Args:
        rows: Of a batch.
        most_tokens: Of a row.
        vocabulary: Tokens that the model knows.
        labels: Classes of a classifier; None for a decoder.

    Raises:
        DataError: With the row's number in the batch and the figures.
    """
    if not rows:
        raise DataError("found no row; expected at least one")
    for number, row in enumerate(rows, 1):
        problem = _problem(row, most_tokens, vocabulary, labels)
        if problem:
            raise DataError(f"row {number}: {problem}")
    if labels is None and not len(learnt(rows).target):
        raise DataError("no token of these rows is to be learnt; expected at least one label behind the first token")


def _problem(row: Row, most_tokens: int, vocabulary: int | None, labels: int | None) -> str:
    if not 1 <= len(row.ids) <= most_tokens:
        return f"has {len(row.ids)} tokens; expected 1 to {most_tokens}"
    if min(row.ids) < 0 or (vocabulary is not None and max(row.ids) >= vocabulary):
        return f"has token ids from {min(row.ids)} to {max(row.ids)}; expected 0 to {(vocabulary or 0) - 1}"
    if labels is not None:
        if not isinstance(row.labels, int | np.integer) or not 0 <= row.labels < labels:
            return f"its label is none of the {labels} classes"
        return ""
    if not isinstance(row.labels, Sequence | np.ndarray) or len(row.labels) != len(row.ids):
        return "has not as many labels as tokens"
    told = [label for label in row.labels if label != NOT_LEARNT]
    if told and (min(told) < 0 or (vocabulary is not None and max(told) >= vocabulary)):
        return f"has labels from {min(told)} to {max(told)}; expected {NOT_LEARNT}, or 0 to {(vocabulary or 0) - 1}"
    return ""


def by_row(values: Array, row: Array, count: int) -> Array:
    """Sums of float64 values by the row that each belongs to."""
    return np.bincount(row, weights=values, minlength=count).astype(np.float64)


def likelihood(count: float) -> Objective:
    """Mean negative log-likelihood over ``count`` tokens."""
    return lambda told: (-float(told.sum()) / count, np.full(len(told), -1.0 / count))
