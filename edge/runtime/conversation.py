"""A conversation whose earlier turns are not read again: keys and values of what was said stay."""

from collections.abc import Callable, Iterator
from typing import Any

from edge.runtime.answering import Answer, Row, write
from edge.runtime.decoding import Reader

# ``Model.row``.
Start = Callable[..., Row]


class Conversation:
    """Turns of a user and a model; for one thread.

    Attributes:
        messages: What was said; a turn that was not taken to its end was not said.
    """

    def __init__(self, start: Start, reader: Reader, system: str | None = None) -> None:
        self._start, self._reader = start, reader
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, content: str, **settings: Any) -> Answer:
        """Answers the user; settings and errors as of ``Model.generate``."""
        row, steps = self._turn(content, settings)
        for _ in steps:
            pass
        return row.answer()

    def stream(self, content: str, **settings: Any) -> Iterator[str]:
        """Answers the user piece by piece; settings and errors as of ``Model.generate``, before the first piece."""
        row, steps = self._turn(content, settings)
        return (row.new for _ in steps if row.new)

    def _turn(self, content: str, settings: dict[str, Any]) -> tuple[Row, Iterator[None]]:
        messages = [*self.messages, {"role": "user", "content": content}]
        row = self._start(messages, **settings)
        return row, self._taken(messages, row)

    def _taken(self, messages: list[dict[str, str]], row: Row) -> Iterator[None]:
        yield from write(self._reader, [row])
        self.messages = [*messages, {"role": "assistant", "content": row.answer().text}]
