"""Nodes that lie, through whole federations: each reply of the table is quarantined for the right reason and harms nobody.

The nodes are the adversary's place and need no model; messages, codec, admission, standing, rule and ledger are the real ones.
The first part is about what a reply holds, which is admission's to catch; the second about replies that should not have come
at all, which is the round loop's (``server.exchange``).
"""

import json

import pytest
from drawn_nodes import Scripted, make_app
from drawn_nodes import federation as drawn_federation
from flwr.app import Error, Message, MessageType

from benchmarks.admission import EXAMPLES, HOSTILE, NODES, HostileGrid, app, federation, play
from benchmarks.hostile import CONFIG, MODULES, Case, cases
from protocol.federation import Federation
from server.rounds import run
from simulations.grid import InProcessGrid

GOOD = {f"node-{node}" for node in range(1, NODES + 1) if node not in HOSTILE}
EVERYONE = {f"node-{node}" for node in range(1, NODES + 1)}
LIAR = HOSTILE[1]
# A round is over when all but one have answered, so that nothing waits for the reply that does not come.
ALL_BUT_ONE = {"cohort": NODES - 1, "over_selection": 1.0}


# What a reply holds ---------------------------------------------------------------------------------------------------


def test_the_table_is_as_long_as_was_promised_and_no_case_is_there_twice():
    for wire in ("fp32", "fp16", "int8", "nf4", "int4", "top-k"):
        names = [case.name for case in cases(wire)]
        assert len(set(names)) == len(names)
    assert len(cases("fp32")) >= 300


def _slow(wire):
    return pytest.param(wire, marks=pytest.mark.slow)


@pytest.mark.parametrize("wire", ["fp32", "int8", "top-k", _slow("fp16"), _slow("nf4"), _slow("int4")])
def test_every_hostile_reply_is_quarantined_with_its_reason_and_the_round_is_as_without_it(wire, tmp_path):
    """Oracle: the same federation with the hostile nodes silent, digest against digest after every round."""
    verdicts = play(wire, tmp_path)
    assert len(verdicts) == len(cases(wire))
    assert {verdict.case.name: verdict.problem for verdict in verdicts if verdict.problem} == {}


def one_case(forge, reason=""):
    return [Case("", "", reason, forge)] * (len(HOSTILE) * 40)


def test_a_reason_names_the_tensor_what_was_found_and_what_was_expected(tmp_path):
    def grown(reply):
        text = json.loads(reply.records[CONFIG]["json"]) | {"num_examples": 2**32}
        reply.records[CONFIG]["json"] = json.dumps(text)
        reply.records["metrics"]["num-examples"] = 2**32

    outcome = run(HostileGrid(one_case(grown)), federation("fp32", 2, tmp_path))
    reason = f"num-examples: found {2**32}, expected 1 to {EXAMPLES}"
    assert dict(outcome.rounds[1].refused) == {f"node-{node}": reason for node in HOSTILE}


def test_a_node_that_fails_again_and_again_is_not_asked_for_a_while(tmp_path):
    """By hand: round 1 silent, quarantined in 2 and 3, left out of 4 and 5, quarantined in 6, left out of 7 and 8."""
    settings = federation("fp32", 8, tmp_path)
    rounds = settings.rounds.model_copy(update={"failures_allowed": 2, "pause_rounds": 2})
    grid = HostileGrid(one_case(lambda reply: reply.records["adapter"].clear()))
    outcome = run(grid, settings.model_copy(update={"rounds": rounds}))
    told = [name for record in outcome.rounds for name, kind in _kinds(record, f"node-{LIAR}").items() if kind]
    assert told == ["silent", "refused", "refused", "paused", "paused", "refused", "paused", "paused"]
    assert "left out until round 5" in outcome.rounds[3].paused[f"node-{LIAR}"]
    assert all(record.accepted.keys() == GOOD for record in outcome.rounds)


def _kinds(record, name):
    return {kind: name in getattr(record, kind) for kind in ("accepted", "refused", "silent", "paused")}


def test_under_a_plan_that_counts_epochs_a_lie_about_examples_weighs_no_more_than_all_others_together(tmp_path):
    """Nobody can know the number. Oracle: the round as if the liar had said what the docstring of ``weights`` gives it."""

    def saying(count):
        def lie(reply):
            text = json.loads(reply.records[CONFIG]["json"]) | {"num_examples": count}
            reply.records[CONFIG]["json"] = json.dumps(text)
            reply.records["metrics"]["num-examples"] = count

        return lie

    def after(count, folder):
        content = federation("fp32", 2, folder).model_dump()
        content["plan"]["training"]["max_steps"] = None
        grid = HostileGrid([Case("", "", "", saying(count))])  # the first hostile node alone; the others stay silent
        outcome = run(grid, Federation.model_validate(content))
        assert outcome.rounds[1].accepted.keys() == {*GOOD, f"node-{HOSTILE[0]}"}
        return outcome.adapter.digest()

    assert after(10**6, tmp_path / "lie") == after(EXAMPLES * len(GOOD), tmp_path / "capped")


# Replies that should not have come ------------------------------------------------------------------------------------


class Strange(InProcessGrid):
    """What the liar replies in training, always first, is what ``strange`` makes of the question and its honest reply."""

    def __init__(self, strange):
        super().__init__(app, [{} for _ in range(NODES)])
        self.strange = strange

    def pull_messages(self, message_ids):
        asked = [message_id for message_id, message in self._waiting.items() if self.is_lie(message)]
        for message_id in message_ids:
            if message_id in self._waiting and (not asked or message_id in asked):
                message = self._waiting.pop(message_id)
                reply = self.answer(message)
                return self.strange(message, reply) if self.is_lie(message) else [reply]
        return []

    @staticmethod
    def is_lie(message):
        return message.metadata.message_type == MessageType.TRAIN and message.metadata.dst_node_id == LIAR


def with_metadata(reply, **changes):
    reply.metadata.__dict__.update({f"_{name}": value for name, value in changes.items()})
    return reply


def spoilt(message, reply):
    """The reply with a tensor too few, as an answer to the same question."""
    records = reply.content.copy()
    records["adapter"] = records["adapter"].copy()
    del records["adapter"]["D|score.bias"]
    return Message(records, reply_to=message)


def after_two_rounds(strange, folder, **rounds):
    settings = federation("fp32", 2, folder)
    settings = settings.model_copy(update={"rounds": settings.rounds.model_copy(update=rounds)})
    return run(Strange(strange), settings)


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The adapter when everyone is honest."""
    return after_two_rounds(lambda message, reply: [reply], tmp_path_factory.mktemp("honest")).adapter.digest()


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The adapter when the liar is silent."""

    def silent(message, reply):
        return [Message(Error(1, "silent"), reply_to=message)]

    return after_two_rounds(silent, tmp_path_factory.mktemp("silent")).adapter.digest()


@pytest.mark.parametrize("second", [lambda message, reply: reply, spoilt], ids=["the same", "another"])
def test_a_second_reply_counts_for_nothing(second, honest, tmp_path):
    outcome = after_two_rounds(lambda message, reply: [reply, second(message, reply)], tmp_path)
    assert all(record.accepted.keys() == EVERYONE for record in outcome.rounds)
    assert outcome.adapter.digest() == honest


def test_a_good_reply_after_a_bad_one_comes_too_late(without, tmp_path):
    outcome = after_two_rounds(lambda message, reply: [spoilt(message, reply), reply], tmp_path)
    assert all(list(record.refused) == [f"node-{LIAR}"] for record in outcome.rounds)
    assert outcome.adapter.digest() == without


def forged_answer(**metadata):
    def strange(message, reply):
        return [with_metadata(Message(reply.content, reply_to=message), **metadata), reply]

    return strange


@pytest.mark.parametrize(
    "metadata",
    [
        {"src_node_id": 99, "reply_to_message_id": "nothing that was asked"},
        {"reply_to_message_id": "nothing that was asked"},
        {"reply_to_message_id": ""},
        {"reply_to_message_id": "in-process-1"},
    ],
    ids=["a node that is not there", "a question that nobody asked", "no question", "an old question"],
)
def test_an_answer_to_nothing_that_was_asked_in_this_run_counts_for_nothing(metadata, honest, tmp_path):
    """Message ids are the SuperLink's, and of one run: a reply of another run names none of this one's questions."""
    outcome = after_two_rounds(forged_answer(**metadata), tmp_path)
    assert all(record.accepted.keys() == EVERYONE for record in outcome.rounds)
    assert outcome.adapter.digest() == honest


@pytest.mark.parametrize("change", [{"src_node_id": 99}, {"src_node_id": min(set(range(1, NODES + 1)) - set(HOSTILE))}])
def test_a_node_cannot_answer_in_the_place_of_another(change, without, tmp_path):
    """Here the reply to the liar's question comes from a node that was not asked it; its own does not come."""
    sent = []

    def strange(message, reply):
        sent.append(message)
        return [with_metadata(Message(reply.content, reply_to=message), **change)]

    outcome = after_two_rounds(strange, tmp_path, **ALL_BUT_ONE)
    assert len(sent) == 2
    assert all(record.accepted.keys() == EVERYONE - {f"node-{LIAR}"} for record in outcome.rounds)
    assert outcome.adapter.digest() == without


@pytest.mark.parametrize("reason", ["x" * 1_000_000, "\x1b[2Jall is well", "a\nround 2: all is well", "\u202e"])
def test_an_error_reply_is_told_briefly_and_steers_no_terminal(reason, without, tmp_path):
    outcome = after_two_rounds(lambda message, reply: [Message(Error(1, reason), reply_to=message)], tmp_path)
    for record in outcome.rounds:
        told = record.silent[f"node-{LIAR}"]
        assert told.startswith("the node answered with an error")
        assert len(told) <= 300
        assert told.isprintable()
    assert outcome.adapter.digest() == without


def test_a_reply_that_is_neither_content_nor_error_is_refused(without, tmp_path):
    def empty(message, reply):
        hollow = Message(reply.content, reply_to=message)
        hollow.__dict__["_content"] = None
        return [hollow]

    outcome = after_two_rounds(empty, tmp_path)
    assert all(f"node-{LIAR}" in {**record.refused, **record.silent} for record in outcome.rounds)
    assert outcome.adapter.digest() == without


def test_a_message_that_is_late_for_its_round_is_not_taken_for_the_next(without, tmp_path):
    kept = []

    def late(message, reply):
        kept.append(reply)
        return kept[:-1]

    outcome = after_two_rounds(late, tmp_path, **ALL_BUT_ONE)
    assert len(kept) == 2
    assert all(record.dropped == [f"node-{LIAR}"] for record in outcome.rounds)
    assert outcome.adapter.digest() == without


# Offers ---------------------------------------------------------------------------------------------------------------


class Joining(InProcessGrid):
    """One node's offer is edited, and what else it does is honest."""

    def __init__(self, node, changes):
        super().__init__(app, [{} for _ in range(NODES)])
        self.node, self.changes = node, changes

    def answer(self, message):
        reply = super().answer(message)
        if message.metadata.message_type == MessageType.QUERY and message.metadata.dst_node_id == self.node:
            text = json.loads(reply.content[CONFIG]["json"]) | self.changes
            reply.content[CONFIG]["json"] = json.dumps(text)
        return reply


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "\x1b[2J"},
        {"name": "x" * 1_000_000},
        {"name": None},
        {"adapter": "legal"},
        {"base_digest": "ef" * 32},
        {"base_digest": "x"},
        {"r": 0},
        {"r": 2**40},
        {"r": "3"},
        {"r": True},
        {"method": "full"},
        {"precision": "fp7"},
        {"modules": {}},
        {"modules": MODULES | {"layers.9.q": (6, 5)}},
        {"modules": {"layers.0.q": (2**40, 2**40), "layers.1.v": (4, 5)}},
        {"modules": {"layers.0.q": (6, -5), "layers.1.v": (4, 5)}},
        {"modules": {"\x1b[2J" * 1000: (6, 5)}},
        {"dense": {}},
        {"dense": {"score.weight": (3, 4), "score.bias": (2**40,)}},
        {"dense": {"score.weight": (3, 4), "score.bias": (3,) * 10_000}},
        {"dense": {"score.weight": (3, 4), "score.bias": (3,) * 9}},
        {"dense": {str(at): (1,) for at in range(100_000)}},
        {"dense": {"score.weight": (3, 4), "x" * 1000: (3,)}},
        {"embeddings": ["layers.0.q"]},
        {"embeddings": ["x"] * 100_000},
        {"more": 1},
    ],
    ids=lambda changes: str(changes)[:40].encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("node", [1, NODES], ids=["the first", "the last"])
def test_an_offer_that_does_not_fit_leaves_out_its_own_node_and_no_other(node, changes, tmp_path):
    outcome = run(Joining(node, changes), federation("fp32", 1, tmp_path))
    assert len(outcome.left_out) == 1
    assert all(name.isprintable() and reason.isprintable() and len(reason) <= 500 for name, reason in outcome.left_out.items())
    assert outcome.rounds[0].accepted.keys() == EVERYONE - {f"node-{node}"}


# Offers for an adapter of its own, which nobody else's are held against --------------------------------------------------


def adapters(rule, folder):
    """The honest nodes 2 to 5 train one adapter; node 1 could train another alone."""
    plan = {"training": {"batch_size": 10, "num_train_epochs": 1}}
    return drawn_federation(
        folder,
        0,
        adapters={"legal": plan, "medical": plan},
        rounds={"count": 2, "cohort": None, "over_selection": 0.0, "minimum_nodes": 1, "wire_down": "fp32"},
        aggregation={"rule": rule, "server_momentum": 0},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"modules": {"q": (2**24, 2**24)}, "r": 1024},
        {"modules": {f"layers.{at}": (2**23, 2**23) for at in range(1000)}, "r": 1},
        {"dense": {"score.weight": (2**24, 2**24)}},
        {"dense": {"head": (3,)}},
        {"dense": {"layers.0.q.lora_A.weight": (3,)}},
        {"dense": {"x.lora_embedding_B": (3,)}},
        {"modules": {"(": (6, 5)}},
        {"modules": {"a\0b": (6, 5)}},
        {"embeddings": ("score",)},
    ],
    ids=lambda changes: str(changes)[:40].encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("rule", ["product-delta", "fedavg"])
def test_a_node_that_offers_what_cannot_be_carried_out_or_kept_ends_no_other_adapter(rule, changes, tmp_path):
    """Rules like fedavg draw a start of what is offered, and every round keeps all adapters together."""
    app = make_app(
        adapter_of=lambda node: "legal" if node == 1 else "medical", offered=lambda node: changes if node == 1 else {}
    )
    outcome = run(Scripted(app, 5), adapters(rule, tmp_path))
    assert list(outcome.left_out) == ["node-1"]
    assert outcome.kept.keys() == {"medical"}
    assert [sorted(record.accepted) for record in outcome.rounds if record.adapter == "medical"] == [
        [f"node-{node}" for node in range(2, 6)]
    ] * 2


# Who comes first, and who never answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [{"modules": {"layers.0.q": (24, 17)}}, {"base_digest": "ef" * 32}, {"dense": {}}],
    ids=["modules", "base", "dense"],
)
def test_a_node_that_comes_first_sets_nothing_while_nothing_is_merged(other, tmp_path):
    """Five come after the first attempt at a round, in which the one that was there alone did not answer."""
    rounds = {"count": 2, "cohort": None, "over_selection": 0.0, "minimum_nodes": 1, "retries": 1}

    def silent(message, reply):
        first = message.metadata.dst_node_id == 1 and message.metadata.message_type == MessageType.TRAIN
        return Message(Error(1, "silent"), reply_to=message) if first else reply

    app = make_app(offered=lambda node: other if node == 1 else {})
    grid = Scripted(app, 6, connected=lambda node, last: node == 1 or last > 0, edit=silent)
    outcome = run(grid, drawn_federation(tmp_path, 0, rounds=rounds))
    assert [sorted(record.accepted) for record in outcome.rounds] == [[f"node-{node}" for node in range(2, 7)]] * 2
    assert list(outcome.left_out) == ["node-1"]


def test_newcomers_that_do_not_answer_keep_no_round_waiting_and_join_when_they_do(tmp_path):
    """Node 4 comes after the first round and answers after the third. The deadline is the time that a test may take."""

    class Slow(Scripted):
        def pull_messages(self, message_ids):
            held = [at for at in message_ids if at in self._waiting and self._waiting[at].metadata.dst_node_id == 4]
            return super().pull_messages([] if held and self.last < 3 else message_ids)

    rounds = {"count": 5, "cohort": None, "over_selection": 0.0, "minimum_nodes": 1, "timeout_seconds": 600.0}
    grid = Slow(make_app(), 4, connected=lambda node, last: node < 4 or last > 0)
    outcome = run(grid, drawn_federation(tmp_path, 0, rounds=rounds))
    assert ["node-4" in record.accepted for record in outcome.rounds] == [False, False, False, True, True]
    assert outcome.left_out == {}
