"""What a server remembers of its answers so that a user can say what was wrong with them, and how it takes that.

Nothing is remembered unless the server was started so and the request says so (``"store": true``). Answers wait in memory,
few and not for long; what is said of them goes into the sealed store (``edge.runtime.adapting.feedback``), nothing into a log.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from pydantic import StringConstraints

from edge.runtime.adapting.feedback import Entry, Message, Store
from edge.runtime.adapting.screening import LONGEST, Screen
from edge.runtime.listening import RefusedError
from edge.runtime.openai_format import asked
from protocol.errors import ConfigurationError, DataError, VaultError
from protocol.strict import Strict

_log = logging.getLogger(__name__)


class FeedbackAsked(Strict):
    """``POST /v1/feedback``."""

    id: Annotated[str, StringConstraints(pattern=r"^chatcmpl-[0-9a-f]{24}\z")]
    rating: Literal["up", "down"] | None = None
    correction: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST)] | None = None


@dataclass(frozen=True)
class Window:
    """How many answers wait for a word on them.

    Attributes:
        answers: At most; the oldest goes.
        characters: At most, of their conversations together.
        seconds: Longest wait.
        words_a_minute: Requests of feedback, from all clients together.
    """

    answers: int = 256
    characters: int = 2**21
    seconds: float = 3600.0
    words_a_minute: int = 60


_WINDOW: Final = Window()


class Collector:
    """Collects feedback for one server; may be used by several threads at once.

    Args:
        store: Where it goes.
        screen: What looks at it.
        window: What waits in memory.
        clock: Seconds.

    Raises:
        VaultError: What the store holds does not open with its key.
    """

    def __init__(
        self, store: Store, screen: Screen, window: Window = _WINDOW, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._screen, self._window, self._clock = store, screen, window, clock
        self._waiting: OrderedDict[str, tuple[float, Entry]] = OrderedDict()
        self._characters = 0
        self._heard: deque[float] = deque()
        self._lock = threading.Lock()
        store.entries()  # a wrong key is told now, not to the first who says something

    def hold(self, number: str, messages: Sequence[Mapping[str, str]], answer: str, client: str) -> None:
        """Remembers an answer whose user has agreed to it; one that is longer than what is learnt from is not held."""
        said = tuple(Message.model_validate(message) for message in messages)
        entry = Entry(id=number, client=client, messages=said, answer=answer)
        if _characters(entry) > LONGEST:
            return
        with self._lock:
            self._waiting[number] = self._clock(), entry
            self._characters += _characters(entry)
        self.let_go()

    def take(self, body: bytes) -> dict[str, Any]:
        """Keeps what a user says of an answer.

        Raises:
            RefusedError: There are too many, or no such answer waits, or the store is damaged or has no room.
            ConfigurationError: The body is no feedback.
            DataError: It is not to be learnt from, or there is no more room.
        """
        self._count()
        told = asked(FeedbackAsked, body)
        if told.rating is None and told.correction is None:
            raise DataError("feedback: says nothing; expected a rating, a correction or both")
        if told.rating == "up" and told.correction is not None:
            raise DataError("feedback: a correction of an answer that is good; expected one of the two")
        self.let_go()
        with self._lock:
            found = self._waiting.get(told.id)
        if found is None:
            raise RefusedError(
                HTTPStatus.NOT_FOUND,
                f'no such answer is held: it was asked without "store": true, or more than {self._window.seconds:.0f} seconds '
                f"or {self._window.answers} answers ago, or it is longer than {LONGEST} characters",
            )
        entry = found[1].model_copy(update={"rating": told.rating, "correction": told.correction})
        with _kept():
            kept = self._store.add(entry, self._screen)
        return {"id": kept.id, "object": "feedback", "kept": kept.kind}

    def wipe(self) -> dict[str, Any]:
        """Forgets all of it, what waits and what is kept."""
        with self._lock:
            self._waiting.clear()
            self._characters = 0
        with _kept():
            self._store.wipe()
        return {"object": "feedback", "deleted": True}

    def let_go(self) -> None:
        """Forgets what has waited too long, or is too much."""
        window, now = self._window, self._clock()
        with self._lock:
            while self._waiting:
                since, entry = next(iter(self._waiting.values()))
                few = len(self._waiting) <= window.answers and self._characters <= window.characters
                if few and now - since <= window.seconds:
                    return
                self._waiting.popitem(last=False)
                self._characters -= _characters(entry)

    def _count(self) -> None:
        with self._lock:
            now = self._clock()
            while self._heard and self._heard[0] <= now - 60:
                self._heard.popleft()
            if len(self._heard) >= self._window.words_a_minute:
                raise RefusedError(
                    HTTPStatus.TOO_MANY_REQUESTS,
                    f"{len(self._heard)} words of feedback in this minute, expected at most {self._window.words_a_minute}",
                    **{"Retry-After": str(max(1, int(self._heard[0] + 60 - now)))},
                )
            self._heard.append(now)


@contextmanager
def _kept() -> Iterator[None]:
    """What is wrong with the store is its owner's business: the log says it, and no client is told of paths."""
    try:
        yield
    except (VaultError, ConfigurationError, OSError) as error:
        _log.warning("feedback is not kept: %s", error)
        raise RefusedError(
            HTTPStatus.INTERNAL_SERVER_ERROR, "feedback cannot be kept here; the server's log says why"
        ) from None


def _characters(entry: Entry) -> int:
    return sum(len(message.content) for message in entry.messages) + len(entry.answer)
