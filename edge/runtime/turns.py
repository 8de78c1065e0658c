"""Answers take turns: so many are written at once, so many wait, and whoever waits too long or goes away is let go."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

from edge.runtime.answering import Row, write
from edge.runtime.decoding import Reader
from edge.runtime.listening import GoneError, RefusedError
from edge.runtime.model import Model, Prompt

_LOOK_SECONDS = 0.25  # between two looks whether who waits is still there


class Turn:
    """What one answer at a time is written with; the next one goes on from what it has read."""

    def __init__(self) -> None:
        self._adapter: str | None = None
        self._reader: Reader | None = None

    def begin(
        self, model: Model, prompt: Prompt, adapter: str | None, settings: Mapping[str, Any]
    ) -> tuple[Row, Iterator[None]]:
        """An answer and the steps that write it."""
        row = model.row(prompt, **settings)
        if self._reader is None or self._adapter != adapter:
            self._reader, self._adapter = None, adapter  # two caches at once would be one too many
            self._reader = model.reader(adapter)
        return row, write(self._reader, [row])

    def forget(self) -> None:
        """After an error nothing is known of what was read."""
        self._reader = None


class Turns:
    """The turns of a server.

    Args:
        parallel: Answers that are written at once; each holds a cache of its own.
        waiting: Requests that may wait for their turn.
        seconds: Longest wait.
    """

    def __init__(self, parallel: int, waiting: int, seconds: float) -> None:
        self._seconds = seconds
        self._room = threading.BoundedSemaphore(parallel + waiting)
        self._turns: queue.LifoQueue[Turn] = queue.LifoQueue()
        for _ in range(parallel):
            self._turns.put(Turn())

    @contextmanager
    def take(self, is_gone: Callable[[], bool] = lambda: False) -> Iterator[Turn]:
        """Waits for a turn, if there is room to wait, and as long as who asked does."""
        if not self._room.acquire(blocking=False):
            raise RefusedError(HTTPStatus.TOO_MANY_REQUESTS, "too many requests wait; come again", **{"Retry-After": "1"})
        try:
            turn = self._next(is_gone)
            try:
                yield turn
            except BaseException:
                turn.forget()
                raise
            finally:
                self._turns.put(turn)
        finally:
            self._room.release()

    def _next(self, is_gone: Callable[[], bool]) -> Turn:
        until = time.monotonic() + self._seconds
        while time.monotonic() < until:
            with suppress(queue.Empty):
                return self._turns.get(timeout=_LOOK_SECONDS)
            if is_gone():
                raise GoneError
        raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "no turn came in time", **{"Retry-After": "5"})
