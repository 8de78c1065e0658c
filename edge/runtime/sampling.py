"""The next token: how a decoder's logits become one, and what may be asked of an answer."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, StringConstraints, ValidationError

from protocol.errors import ConfigurationError, ModelError, shown
from protocol.strict import Strict

Array = NDArray[Any]


class Writing(Strict):
    """How an answer is written.

    Attributes:
        max_new_tokens: Longest answer; the context may end it sooner.
        temperature: 0 takes the likeliest token.
        top_k: Draws among the k likeliest tokens; 0 among all.
        top_p: Draws among the fewest likeliest tokens that together have this probability (Holtzman et al. 2020,
            arXiv:1904.09751, section 3.1).
        repetition_penalty: Divides the logits of tokens that stand in prompt or answer if positive, multiplies them if not
            (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 leaves them.
        stop: The answer ends before the first of these texts.
        seed: Of the draw: the same gives the same answer, in whatever batch.
    """

    max_new_tokens: int = Field(256, ge=1, le=2**31 - 1)
    temperature: float = Field(0.0, ge=0, le=100)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    stop: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=1000)], ...], Field(max_length=64)] = ()
    seed: int = Field(0, ge=0, le=2**63 - 1)


def writing(**settings: Any) -> Writing:
    """Settings by keyword.

    Raises:
        ConfigurationError: One is unknown or out of its bounds; carries all problems.
    """
    try:
        return Writing(**settings)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}"
            for one in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise ConfigurationError("settings of an answer", [shown(problem) for problem in problems]) from None


class Draw:
    """Takes the tokens of one answer, one after another.

    Args:
        settings: How.
        prompt: Token ids before the answer, for the repetition penalty.
        vocabulary: Number of tokens.
    """

    def __init__(self, settings: Writing, prompt: Sequence[int], vocabulary: int) -> None:
        self._settings = settings
        self._random = np.random.default_rng(settings.seed)
        self._seen = np.zeros(vocabulary, bool) if settings.repetition_penalty != 1 else None
        if self._seen is not None:
            self._seen[list(prompt)] = True

    def __call__(self, logits: Array) -> int:
        """The next token's id.

        Args:
            logits: ``(vocabulary,)``, float; left as they are.

        Raises:
            ModelError: They are not numbers.
        """
        if self._seen is not None:
            logits = penalised(logits, np.flatnonzero(self._seen), self._settings.repetition_penalty)
        token = int(logits.argmax())  # of a NaN, if there is one
        if not np.isfinite(logits[token]):
            raise ModelError("the model's logits are not finite; use another adapter, or make the bundle anew")
        if self._settings.temperature:
            ids, probabilities = candidates(logits, self._settings)
            heap = probabilities.cumsum()
            at = int(heap.searchsorted(self._random.random() * heap[-1], side="right"))
            token = int(ids[min(at, len(ids) - 1)])
        if self._seen is not None:
            self._seen[token] = True
        return token


def penalised(logits: Array, ids: Array, penalty: float) -> Array:
    """A copy of the logits ``(vocabulary,)`` in which those of ``ids`` are less likely (``Writing.repetition_penalty``)."""
    changed = logits.copy()
    seen = changed[ids]
    changed[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    return changed


def candidates(logits: Array, settings: Writing) -> tuple[Array, Array]:
    """The tokens that may be drawn, and their probabilities in float64, which sum to 1.

    Args:
        logits: ``(vocabulary,)``, float.
        settings: Temperature above 0, then top-k, then top-p, each of what the one before left.
    """
    scores = logits.astype(np.float64)
    # From the likeliest on, so that a temperature near 0 leaves that one alone: its score is 0 at any temperature.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / settings.temperature
    ids = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        ids = np.flatnonzero(scores >= np.partition(scores, -settings.top_k)[-settings.top_k])
    probabilities = _softmax(scores[ids])
    if settings.top_p < 1:
        kept = _nucleus(probabilities, settings.top_p)
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    return ids, probabilities


def _nucleus(probabilities: Array, mass: float) -> Array:
    """Indices of the fewest likeliest that have at least this mass together."""
    spare = 1 - mass
    # All that have no more than this have no more than ``spare`` together: sorting them could not bring any back.
    likely = np.flatnonzero(probabilities > spare / len(probabilities))
    if not len(likely):  # all alike, and rounding
        likely = np.arange(len(probabilities))
    order = likely[probabilities[likely].argsort(kind="stable")]
    below = probabilities[order].cumsum() + (1 - probabilities[likely].sum())
    return np.asarray(order[min(int((below <= spare).sum()), len(order) - 1) :])


def _softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())
