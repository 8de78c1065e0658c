"""Messages out, replies in: each node counts once, nobody is waited for without need or end."""

import time

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, RecordDict

from protocol.errors import MessageError
from server.exchange import Exchange, collect
from simulations.grid import InProcessGrid


def content(text="x"):
    return RecordDict({"said": ConfigRecord({"text": text})})


def node_app(message, context):
    return Message(content(f"node {context.node_id}"), reply_to=message)


class Network(InProcessGrid):
    """Nodes that may be slow (never answer), answer twice, or answer questions that nobody asked."""

    def __init__(self, count, app=node_app, silent=(), twice=()):
        super().__init__(app, [{}] * count)
        self.silent, self.twice, self.asked = set(silent), set(twice), []

    def pull_messages(self, message_ids):
        found = []
        for message_id in message_ids:
            message = self._waiting.get(message_id)
            if message is None or message.metadata.dst_node_id in self.silent:
                continue
            del self._waiting[message_id]
            self.asked.append(message.metadata.dst_node_id)
            found += [self.answer(message)] * (2 if message.metadata.dst_node_id in self.twice else 1)
            break
        return found


def messages(count):
    return {node: Message(content(), dst_node_id=node, message_type=MessageType.TRAIN) for node in range(1, count + 1)}


def text(node, reply):
    return str(reply.content["said"]["text"])


def test_everyone_who_answers_is_read_once():
    grid = Network(3, twice=[2])
    heard = collect(grid, messages(3), text, seconds=5)
    assert heard.results == {1: "node 1", 2: "node 2", 3: "node 3"}
    assert (heard.refused, heard.silent) == ({}, {})


def test_the_deadline_holds_and_the_silent_are_named():
    begun = time.monotonic()
    heard = collect(Network(3, silent=[2]), messages(3), text, seconds=0.3)
    assert time.monotonic() - begun < 3
    assert sorted(heard.results) == [1, 3]
    assert heard.silent == {2: "no reply within 0.3 s"}


def test_nobody_is_waited_for_when_enough_have_answered():
    grid = Network(5, silent=[4, 5])
    heard = collect(grid, messages(5), text, seconds=600, enough=lambda results: len(results) >= 2)
    assert sorted(heard.results) == [1, 2]
    assert grid.asked == [1, 2], "a node that is not needed is not even run in process"
    assert (heard.silent, heard.dropped) == ({}, [3, 4, 5]), "who was not waited for was not silent"


def test_a_reply_that_cannot_be_read_is_refused_and_the_others_are_read():
    def read(node, reply):
        if node == 2:
            raise MessageError("num-examples: found -1")
        return text(node, reply)

    heard = collect(Network(3), messages(3), read, seconds=5)
    assert sorted(heard.results) == [1, 3]
    assert heard.refused == {2: "num-examples: found -1"}


def test_a_node_that_answers_with_an_error_may_be_asked_once_more():
    tries = []

    def app(message, context):
        tries.append(context.node_id)
        if tries.count(context.node_id) < (2 if context.node_id == 1 else 9):
            return Message(Error(code=1, reason="start-missing"), reply_to=message)
        return node_app(message, context)

    again = []

    def once_more(node, reason):
        again.append((node, reason))
        return Message(content("whole"), dst_node_id=node, message_type=MessageType.TRAIN)

    heard = collect(Network(2, app), messages(2), text, seconds=5, again=once_more)
    assert heard.results == {1: "node 1"}
    assert again == [(1, "start-missing"), (2, "start-missing")]
    assert heard.silent == {2: "the node answered with an error: start-missing"}


def test_a_message_that_cannot_be_sent_is_a_silent_node():
    class Full(Network):
        def push_messages(self, messages):
            list(messages)
            return []

    heard = collect(Full(2), messages(2), text, seconds=0.2)
    assert heard.results == {}
    assert sorted(heard.silent) == [1, 2]


@pytest.mark.parametrize("count", [0, 1])
def test_with_nobody_to_ask_nothing_is_waited_for(count):
    assert len(collect(Network(1), dict(list(messages(1).items())[:count]), text, seconds=600).results) == count


def test_a_reply_that_its_grid_cannot_read_is_refused_and_the_others_are_read():
    """Flower makes objects of what a node wrote; whatever that raises, the SuperLink has forgotten the reply by then."""

    class Broken(Network):
        def pull_messages(self, message_ids):
            if any(self._waiting[at].metadata.dst_node_id == 2 for at in message_ids if at in self._waiting):
                raise KeyError("CustomDataClass")
            return super().pull_messages(message_ids)

    heard = collect(Broken(3), messages(3), text, seconds=5)
    assert heard.results == {1: "node 1", 3: "node 3"}
    assert heard.refused == {2: "the reply: found what is no message (KeyError)"}


def test_a_superlink_that_cannot_be_reached_is_no_fault_of_a_nodes():
    class Gone(Network):
        def pull_messages(self, message_ids):
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        collect(Gone(2), messages(2), text, seconds=5)


def test_an_error_of_the_superlinks_own_ends_the_wait_for_its_node():
    class Left(Network):
        def answer(self, message):
            error = Message(Error(code=1, reason="node unavailable"), reply_to=message)
            error.metadata.__dict__["_src_node_id"] = 0
            return error

    begun = time.monotonic()
    heard = collect(Left(2), messages(2), text, seconds=600)
    assert heard.silent == dict.fromkeys((1, 2), "the node answered with an error: node unavailable")
    assert time.monotonic() - begun < 60


def test_replies_may_be_looked_for_without_a_wait_and_those_that_come_later_are_read_later():
    grid = Network(3, silent=[2, 3])
    exchange = Exchange(grid, text)
    exchange.ask({node: message for node, message in messages(3).items() if node < 3}, seconds=600)
    assert exchange.hear(wait=False).results == {1: "node 1"}
    exchange.ask({3: messages(3)[3]}, seconds=0.0)
    grid.silent.clear()
    heard = exchange.hear()
    assert heard.results == {2: "node 2"}
    assert heard.silent == {3: "no reply within 0 s"}
    assert exchange.waiting() == []
