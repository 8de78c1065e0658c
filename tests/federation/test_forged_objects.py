"""Replies whose objects a node wrote itself, inflated by Flower's ``HttpGrid``: they cost that node its place, and no other.

The SuperLink is stood in for: it hands out what nodes pushed, once, and answers that it knows nothing of it after that. What is
forged passes the check that a SuperLink makes (``validate_object_content``), so a modified SuperNode can send it.
"""

import json
from types import SimpleNamespace

import pytest
from drawn_nodes import federation, make_app
from flwr.app import Error, Message, MessageType
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.utils import create_message_error_unavailable_ins_message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.superlink.grid.http_grid import HttpGrid

from server.rounds import run
from simulations.grid import InProcessGrid

NODES, LIAR, VICTIM = 4, 1, 3
OTHERS = {f"node-{node}" for node in range(1, NODES + 1) if node != LIAR}


class Forging(HttpGrid):
    """What node 1 pushes in place of its update is what ``forge`` makes of it."""

    def __init__(self, forge):
        super().__init__(token="x", insecure=True)  # noqa: S106 - no SuperLink asks for it
        self.nodes = InProcessGrid(make_app(), [{}] * NODES)
        self.forge, self.waiting, self.contents = forge, {}, {}
        self._client, self._run = self, SimpleNamespace(run_id=1)

    def push_messages(self, messages):
        ids = self.nodes.push_messages(messages)
        self.waiting |= dict(zip(ids, messages, strict=True))
        return ids

    def GetNodes(self, request):  # noqa: N802 - Flower's names
        return SimpleNamespace(nodes=[SimpleNamespace(node_id=node) for node in range(1, NODES + 1)])

    def PullMessages(self, request):  # noqa: N802
        found = [self.pushed(message_id) for message_id in request.message_ids]
        about = [SimpleNamespace(metadata=SimpleNamespace(message_id=head)) for head, _ in found]
        return SimpleNamespace(messages_list=about, message_object_trees=[tree for _, tree in found])

    def PullObject(self, request):  # noqa: N802
        return SimpleNamespace(object_found=True, object_available=True, object_content=self.contents[request.object_id])

    def ConfirmMessageReceived(self, request):  # noqa: N802
        pass

    def pushed(self, message_id):
        message = self.waiting.pop(message_id, None)
        if message is None:
            objects = Objects(create_message_error_unavailable_ins_message(message_id, 1))
        else:
            objects = Objects(self.nodes.answer(message))
            if message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == LIAR:
                self.forge(objects, message, self)
        for content in objects.contents.values():
            validate_object_content(content)
        self.contents |= objects.contents
        return objects.head, objects.tree(objects.head)


class Objects:
    """The objects of one message, by id."""

    def __init__(self, message):
        self.contents = {at: one.deflate() for at, one in get_all_nested_objects(message).items()}
        self.head = message.object_id

    def replace(self, kind, body):
        """Another body for the first object of a kind; ids above it follow."""
        old = self.first(kind)
        self.put(old, content(kind, self.children(old), body(split(self.contents[old])[1])))

    def put(self, old, new):
        at = get_object_id(new)
        del self.contents[old]
        self.contents[at] = new
        self.head = at if old == self.head else self.head
        for parent in [key for key, one in self.contents.items() if old.encode() in one]:
            self.put(parent, self.contents[parent].replace(old.encode(), at.encode()))

    def first(self, kind):
        return next(at for at, one in self.contents.items() if one.startswith(kind.encode() + b" "))

    def children(self, at):
        return [child for child in split(self.contents[at])[0].split(" ")[1].split(",") if child]

    def tree(self, at):
        return ObjectTree(object_id=at, children=[self.tree(child) for child in self.children(at)])


def split(one):
    head, _, body = one.partition(b"\0")
    return head.decode(), body


def content(kind, children, body):
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


def body_of(kind, body):
    return lambda objects, message, grid: objects.replace(kind, body if callable(body) else lambda old: body)


def edited(**changes):
    return lambda old: json.dumps(json.loads(old) | changes).encode()


def one_array_under_many_names(old):
    named = json.loads(old)
    return json.dumps(named | dict.fromkeys(map(str, range(50_000)), next(iter(named.values())))).encode()


def no_message(objects, message, grid):
    objects.head = objects.first("RecordDict")


FORGED = {
    "an Array that is no JSON": (body_of("Array", b"{"), "its Array cannot be read"),
    "an Array of a shape of letters": (body_of("Array", edited(shape="x")), "its Array cannot be read"),
    "an Array of chunks that are not there": (
        body_of("Array", edited(arraychunk_ids=[7])),
        "its Array cannot be read",
    ),
    "an ArrayRecord that is a list": (body_of("ArrayRecord", b"[]"), "its ArrayRecord cannot be read"),
    "a ConfigRecord of bytes": (body_of("ConfigRecord", b"\xff\xff"), "its ConfigRecord cannot be read"),
    "a MetricRecord of bytes": (body_of("MetricRecord", b"\xff\xff"), "its MetricRecord cannot be read"),
    "a RecordDict that is a list": (body_of("RecordDict", b"[]"), "its RecordDict cannot be read"),
    "a Message of bytes": (body_of("Message", b"\xff\xff"), "its Message cannot be read"),
    "a RecordDict in the place of the Message": (no_message, "found what is no message"),
    # 60 MB and 20 MB of some hundred bytes that were sent; an update of these nodes has 2 KB.
    "one chunk many times": (body_of("Array", edited(arraychunk_ids=[0] * 200_000)), "bytes of arrays, expected at most"),
    "one array many times": (body_of("ArrayRecord", one_array_under_many_names), "bytes of arrays, expected at most"),
    "ten megabytes of text": (body_of("ConfigRecord", b"x" * 10_000_000), "bytes beside its arrays, expected no more"),
}


def after_a_round(forge, folder):
    settings = {"rounds": {"count": 1, "cohort": None, "over_selection": 0.0, "wire_down": "fp32", "timeout_seconds": 20}}
    return run(Forging(forge), federation(folder, 0, **settings))


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The adapter when the liar is silent."""

    def error(objects, message, grid):
        objects.__init__(Message(Error(1, "silent"), reply_to=message))

    return after_a_round(error, tmp_path_factory.mktemp("without")).adapter.digest()


@pytest.mark.parametrize("case", FORGED)
def test_a_reply_that_cannot_be_inflated_is_refused_and_the_others_are_merged(case, without, tmp_path):
    """Oracle: the adapter of a round in which that node was silent."""
    forge, reason = FORGED[case]
    outcome = after_a_round(forge, tmp_path)
    assert reason in outcome.rounds[0].refused[f"node-{LIAR}"]
    assert outcome.rounds[0].accepted.keys() == OTHERS
    assert outcome.adapter.digest() == without


def test_a_reply_that_says_it_is_another_nodes_counts_for_nothing(without, tmp_path):
    """Who a reply is from and what it answers stand in its body, which its node wrote; the SuperLink knows better."""

    def stolen(objects, message, grid):
        asked = next(at for at, one in grid.waiting.items() if one.metadata.dst_node_id == VICTIM)

        def body(old):
            proto = message_to_proto(Message(grid.nodes.answer(message).content, reply_to=message))
            proto.metadata.src_node_id, proto.metadata.reply_to_message_id = VICTIM, asked
            proto.ClearField("content")
            return proto.SerializeToString()

        objects.replace("Message", body)

    outcome = after_a_round(stolen, tmp_path)
    assert "error" in outcome.rounds[0].silent[f"node-{LIAR}"]  # the SuperLink has nothing more under its question
    assert outcome.rounds[0].accepted.keys() == OTHERS
    assert outcome.adapter.digest() == without


def test_what_flower_inflates_otherwise_is_as_it_was():
    from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

    from protocol.errors import MessageError
    from server.inflation import bounded

    before = dict(inflatable_class_registry)
    with pytest.raises(MessageError), bounded(0):
        inflatable_class_registry["Array"].inflate(b"nonsense")
    assert inflatable_class_registry == before
