"""Messages out, replies in, until there are enough or the time is over: late, repeated and unasked replies are dropped.

Flower's ``send_and_receive`` waits for the last node or the timeout and hands over all replies at once. Here each reply is
read as it comes, the wait ends with the first ``enough`` that can be used, and a node may be asked once more.

Replies are pulled one question at a time. The SuperLink forgets what was pulled, so a reply that cannot even be inflated would
take all others of the same pull with it; and what a reply says of itself, whom it is from and what it answers, is its node's
own word, but under whose question it lay is not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from protocol.errors import MessageError, shown
from protocol.policy_rules import refused
from server.inflation import bounded

T = TypeVar("T")
_POLL_SECONDS = 0.5
# What a grid raises on a reply that is none. A SuperLink that cannot be reached raises others, and ends the run.
_NO_MESSAGE = (AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@dataclass
class Collected(Generic[T]):
    """Everyone who was asked is in exactly one of the four.

    Attributes:
        results: What each node said, by node id.
        refused: Why what it said cannot be used.
        silent: Why nothing came: an error at the node, or no reply in time.
        dropped: Who was not waited for: enough others were faster.
    """

    results: dict[int, T] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    silent: dict[int, str] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Question:
    node: int
    seconds: float
    deadline: float


class Exchange(Generic[T]):
    """Questions to nodes, and their replies as they come in.

    Args:
        grid: Reaches the nodes.
        read: Makes a result of a reply, or raises a MessageError: the reason for which it is refused.
        array_bytes: How many bytes of arrays a node's reply may hold.
        again: A second message for a node that answered with an error of this reason, or None. Each node gets but one.
    """

    def __init__(
        self,
        grid: Grid,
        read: Callable[[int, Message], T],
        *,
        array_bytes: Callable[[int], int] = lambda node: 0,
        again: Callable[[int, str], Message | None] = lambda node, reason: None,
    ) -> None:
        self._grid = grid
        self._read = read
        self._array_bytes = array_bytes
        self._again = again
        self._asked: dict[str, _Question] = {}
        self._retried: set[int] = set()

    def ask(self, messages: Mapping[int, Message], seconds: float) -> None:
        """Sends messages, one per node id, in this order; each is waited for so long at most."""
        self._push(messages, seconds, time.monotonic() + seconds)

    def waiting(self) -> list[int]:
        """Ids of the nodes whose reply has not come."""
        return [question.node for question in self._asked.values()]

    def hear(self, *, wait: bool = True, enough: Callable[[Mapping[int, T]], bool] = lambda results: False) -> Collected[T]:
        """What has come in since the last time, and who has let the time pass.

        Args:
            wait: Until there is ``enough``, or no reply is to come any more. Otherwise every question is looked at once.
            enough: Whether the results so far suffice; nobody else is waited for then.
        """
        found: Collected[T] = Collected()
        while self._asked and not enough(found.results):
            before = list(self._asked)
            for message_id in before:
                self._look(message_id, found)
                if enough(found.results):
                    return found
            if not wait:
                break
            if list(self._asked) == before:
                time.sleep(_POLL_SECONDS)
        return found

    def _look(self, message_id: str, found: Collected[T]) -> None:
        question = self._asked[message_id]
        if time.monotonic() > question.deadline:
            del self._asked[message_id]
            found.silent[question.node] = f"no reply within {question.seconds:g} s"
            return
        try:
            with bounded(self._array_bytes(question.node)):
                replies = list(self._grid.pull_messages([message_id]))
        except MessageError as error:
            del self._asked[message_id]
            found.refused[question.node] = str(error)
            return
        except _NO_MESSAGE as error:
            del self._asked[message_id]
            found.refused[question.node] = f"the reply: found what is no message ({type(error).__name__})"
            return
        for reply in replies:
            # A second answer to one question, an answer to another, or one by somebody who was not asked. Errors may be the
            # SuperLink's own: that the node has gone.
            at_home = reply.has_error() or reply.metadata.src_node_id == question.node
            if message_id in self._asked and at_home and reply.metadata.reply_to_message_id == message_id:
                del self._asked[message_id]
                self._take(question, reply, found)

    def _take(self, question: _Question, reply: Message, found: Collected[T]) -> None:
        node = question.node
        if reply.has_error():
            reason = reply.error.reason or str(reply.error.code)
            once_more = None if node in self._retried else self._again(node, reason)
            if once_more is None:
                found.silent[node] = refused(reason) or shown(f"the node answered with an error: {reason}", 200)
            else:
                self._retried.add(node)
                self._push({node: once_more}, question.seconds, question.deadline)
        elif not reply.has_content():
            found.refused[node] = "the reply holds neither content nor an error"
        else:
            try:
                found.results[node] = self._read(node, reply)
            except MessageError as error:
                found.refused[node] = str(error)

    def _push(self, messages: Mapping[int, Message], seconds: float, deadline: float) -> None:
        ids = list(self._grid.push_messages(list(messages.values()))) or [""] * len(messages)
        # A message that the SuperLink refuses gets no id; its node counts as one that never replied.
        for node, message_id in zip(messages, ids, strict=True):
            self._asked[message_id or f"unsent-{node}"] = _Question(node, seconds, deadline)


def collect(
    grid: Grid,
    messages: Mapping[int, Message],
    read: Callable[[int, Message], T],
    *,
    seconds: float,
    enough: Callable[[Mapping[int, T]], bool] = lambda results: False,
    array_bytes: Callable[[int], int] = lambda node: 0,
    again: Callable[[int, str], Message | None] = lambda node, reason: None,
) -> Collected[T]:
    """Asks nodes and reads their replies.

    Args:
        grid: Reaches the nodes.
        messages: One per node id, in the order in which they go out.
        read: As for ``Exchange``.
        seconds: Longest wait for all of them.
        enough: Whether the results so far suffice; nobody else is waited for then.
        array_bytes: As for ``Exchange``.
        again: As for ``Exchange``.
    """
    exchange = Exchange(grid, read, array_bytes=array_bytes, again=again)
    exchange.ask(messages, seconds)
    found = exchange.hear(enough=enough)
    found.dropped = exchange.waiting()
    return found
