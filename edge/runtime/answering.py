"""Writes answers: prompts of token ids in, token by token, text out as soon as it is certain."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from edge.runtime.decoding import Reader, check_ids
from edge.runtime.sampling import Draw, Writing
from edge.runtime.spelling import Spelling, StopTexts
from edge.runtime.tokens import Tokeniser
from protocol.errors import DataError


@dataclass(frozen=True)
class Answer:
    """What a decoder wrote.

    Attributes:
        text: Without control tokens, up to the first stop text.
        ids: Every token that was written, with the one that ended it.
        prompt_tokens: Tokens that it answers.
        reason: ``end``: the model ended it; ``stop``: a stop text came; ``length``: as long as it may be.
    """

    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    reason: Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Terms:
    """What ends an answer of this model.

    Attributes:
        ends: Token ids.
        context_tokens: Most tokens of prompt and answer.
        vocabulary: Number of tokens.
    """

    ends: frozenset[int]
    context_tokens: int
    vocabulary: int


class Row:
    """One answer while it is written.

    Args:
        prompt: Token ids.
        settings: How it is written.
        tokens: For its text.
        terms: The model's.
        goes_on: Whether the text goes on from the prompt's, as a story does, or begins anew, as an answer does.

    Raises:
        DataError: The prompt leaves no room for an answer, or holds ids that are no tokens of the model.
    """

    def __init__(self, prompt: Sequence[int], settings: Writing, tokens: Tokeniser, terms: Terms, *, goes_on: bool) -> None:
        if len(prompt) >= terms.context_tokens:
            raise DataError(
                f"the prompt has {len(prompt)} tokens, and the context of {terms.context_tokens} holds prompt and answer; "
                "shorten the prompt"
            )
        check_ids(prompt, terms.vocabulary)
        self.prompt = list(prompt)
        self.ids: list[int] = []
        self.new = ""
        self.reason: Literal["end", "stop", "length"] | None = None
        self._room = min(settings.max_new_tokens, terms.context_tokens - len(prompt))
        self._ends = terms.ends
        self._draw = Draw(settings, prompt, terms.vocabulary)
        self._spelling = Spelling(tokens.text, self.prompt if goes_on else ())
        self._stop = StopTexts(settings.stop)
        self._text: list[str] = []

    def take(self, logits: NDArray[Any]) -> None:
        """Adds a token; ``new`` is then the text that has become certain, ``reason`` why it was the last one."""
        token = self._draw(logits)
        self.ids.append(token)
        if token in self._ends:
            self.reason, told = "end", ""
        else:
            told = self._stop.add(self._spelling.add(token))
        if self.reason is None and len(self.ids) == self._room:
            self.reason = "length"
        if self.reason is not None and not self._stop.found:
            told += self._stop.add(self._spelling.rest())
        if self._stop.found:
            self.reason = "stop"
        elif self.reason is not None:
            told += self._stop.rest()
        self.new = told
        self._text.append(told)

    def answer(self) -> Answer:
        """What was written; for after its last token."""
        return Answer("".join(self._text), tuple(self.ids), len(self.prompt), self.reason or "length")


def write(reader: Reader, rows: Sequence[Row]) -> Iterator[None]:
    """Writes all rows to their ends; stops after each token of theirs.

    Args:
        reader: For as many rows.
        rows: Fresh ones.
    """
    logits = reader.read([row.prompt for row in rows])
    while True:
        for row, scores in zip(rows, logits, strict=True):
            if row.reason is None:
                row.take(scores)
        yield
        writing = [row.reason is None for row in rows]
        if not any(writing):
            return
        logits = reader.step([row.ids[-1] for row in rows], writing)
