"""Secure rounds among liars: a node's forged answers cost it its place, a coordinator's forged questions get no answer."""

import json
import os

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from summed_nodes import ENROLLED, KEYS, Watched, federation, make_app

from protocol.errors import FederationError
from protocol.records import ARRAYS, CONFIG, METRICS, RANGES, VECTOR, read_asked, read_stage
from protocol.secure_sum.node import ADVERT
from protocol.secure_sum.stages import FIRST, SECOND, Next
from protocol.signature import sign
from server.rounds import run

LIAR, NODES = 2, 9
OTHERS = {f"node-{node}" for node in range(1, NODES + 1) if node != LIAR}


def is_train(message):
    return message.metadata.message_type.startswith(MessageType.TRAIN)


def stage_of(message):
    """What a message asks for: ``(stage, which sum)``."""
    if message.metadata.message_type == MessageType.TRAIN:
        return ("train", FIRST)
    question = read_stage(message.content, Next).question
    return question.stage, getattr(question, "phase", FIRST)


def with_json(message, reply, change):
    """The reply with its text changed."""
    text = reply.content[CONFIG]["json"]
    told = json.loads(text)
    changed = change(told)
    records = RecordDict({**reply.content, CONFIG: ConfigRecord({"json": json.dumps(told if changed is None else changed)})})
    return Message(records, reply_to=message)


def with_vector(message, array, name=VECTOR, **more):
    record = ArrayRecord({name: FlowerArray(array)} | {key: FlowerArray(value) for key, value in more.items()})
    return Message(RecordDict({VECTOR: record}), reply_to=message)


def vector_of(reply):
    return reply.content[VECTOR][VECTOR].numpy()


# A node that lies ---------------------------------------------------------------------------------------------------------

JSON_LIES = {
    "another key": lambda told: told | {"more": 1},
    "nothing": lambda told: {},
    "a list": lambda told: [told],
    "a number": lambda told: 7,
    "nested": lambda told: {"adverts": told},
}


def no_hex(told):
    return {key: [{"sealing": "zz"}] for key in told}


TRAIN_LIES = JSON_LIES | {
    "one sum": lambda told: {"adverts": told["adverts"][:1]},
    "three sums": lambda told: {"adverts": told["adverts"] * 2},
    "sums the other way round": lambda told: {"adverts": told["adverts"][::-1]},
    "no hex": no_hex,
    "a short key": lambda told: told["adverts"][0].update(masking="00" * 31),
    "a key of small order": lambda told: told["adverts"][0].update(masking="00" * 32),
    "a key changed": lambda told: told["adverts"][1].update(masking="11" * 32),
    "no signature": lambda told: told["adverts"][0].update(signature="00" * 96),
}
SHARE_LIES = JSON_LIES | {
    "no hex": no_hex,
    "one sum": lambda told: {"sealed": told["sealed"][:1]},
    "for a stranger": lambda told: told["sealed"][0].update(stranger=next(iter(told["sealed"][0].values()))),
    "for too few": lambda told: told["sealed"][1].popitem() and None,
    "for itself": lambda told: told["sealed"][0].update({f"node-{LIAR}": next(iter(told["sealed"][0].values()))}),
    "too short": lambda told: told["sealed"][0].update({"node-1": "00"}),
}
VECTOR_LIES = {
    "too short": lambda message, reply: with_vector(message, vector_of(reply)[:-1]),
    "too long": lambda message, reply: with_vector(message, np.append(vector_of(reply), np.uint32(1))),
    "much too long": lambda message, reply: with_vector(message, np.zeros(10**6, np.uint32)),
    "signed": lambda message, reply: with_vector(message, vector_of(reply).view(np.int32)),
    "floats": lambda message, reply: with_vector(message, vector_of(reply).astype(np.float32)),
    "a matrix": lambda message, reply: with_vector(message, vector_of(reply)[None]),
    "another name": lambda message, reply: with_vector(message, vector_of(reply), name="other"),
    "two of them": lambda message, reply: with_vector(message, vector_of(reply), other=vector_of(reply)),
    "metrics beside it": lambda message, reply: Message(
        RecordDict({**reply.content, METRICS: MetricRecord({"loss": 1.0})}), reply_to=message
    ),
    "an update in its place": lambda message, reply: Message(
        RecordDict({ARRAYS: ArrayRecord({"A|layers.0.q": FlowerArray(np.ones((2, 16), np.float32))})}), reply_to=message
    ),
    "nothing": lambda message, reply: Message(RecordDict(), reply_to=message),
    "pickle": lambda message, reply: Message(
        RecordDict({VECTOR: ArrayRecord({VECTOR: FlowerArray("uint32", (1,), "numpy.ndarray", b"\x80\x04K\x01.")})}),
        reply_to=message,
    ),
}
SIGNED_LIES = JSON_LIES | {
    "random": lambda told: {"signature": os.urandom(96).hex()},
    "short": lambda told: {"signature": "00"},
}
OPEN_LIES = JSON_LIES | {
    "random seeds": lambda told: told | {"seeds": {name: os.urandom(66).hex() for name in told["seeds"]}},
    "zeros": lambda told: told | {"seeds": dict.fromkeys(told["seeds"], "00" * 66)},
    "ones": lambda told: told | {"seeds": dict.fromkeys(told["seeds"], "ff" * 66)},
    "short": lambda told: told | {"seeds": dict.fromkeys(told["seeds"], "00")},
    "of strangers": lambda told: told | {"seeds": {f"x{name}": share for name, share in told["seeds"].items()}},
    "none": lambda told: {"seeds": {}, "keys": {}},
    "keys for seeds": lambda told: {"seeds": {}, "keys": told["seeds"]},
}


def cases():
    for stage, lies in ((("train", FIRST), TRAIN_LIES), (("share", FIRST), SHARE_LIES)):
        yield from ((stage, name, lie) for name, lie in lies.items())
    for phase in (FIRST, SECOND):
        yield from ((("mask", phase), name, lie) for name, lie in VECTOR_LIES.items())
        yield from ((("confirm", phase), name, lie) for name, lie in SIGNED_LIES.items())
        yield from ((("open", phase), name, lie) for name, lie in OPEN_LIES.items())


CASES = list(cases())
PART = CASES[::6]


def check_a_lie(folder, stage, lie):
    def edit(message, reply):
        if message.metadata.dst_node_id != LIAR or not is_train(message) or stage_of(message) != stage or reply.has_error():
            return reply
        return lie(message, reply) if stage[0] == "mask" else with_json(message, reply, lie)

    outcome = run(Watched(make_app(), NODES, edit=edit), federation(folder, rounds={"count": 1}), enrolled=ENROLLED)
    record = outcome.rounds[0]
    assert record.accepted.keys() >= OTHERS
    # Before its vector is in the sum a liar is left out; after that the sum does without its answer.
    before = stage in (("train", FIRST), ("share", FIRST), ("mask", FIRST))
    assert (f"node-{LIAR}" in record.accepted) == (not before)
    if before:
        assert record.refused.keys() == {f"node-{LIAR}"}
    assert np.isfinite(outcome.adapter.dense["score.weight"]).all()
    assert abs(outcome.adapter.dense["score.weight"]).max() < 2  # heads begin within 1, and move by tenths


@pytest.mark.parametrize(("stage", "name", "lie"), PART, ids=[f"{stage[0]}-{stage[1]}-{name}" for stage, name, _ in PART])
def test_a_forged_answer_costs_a_node_its_place_and_the_round_goes_on(tmp_path, stage, name, lie):
    check_a_lie(tmp_path, stage, lie)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name", "lie"), CASES, ids=[f"{stage[0]}-{stage[1]}-{name}" for stage, name, _ in CASES])
def test_every_forged_answer_costs_a_node_its_place_and_the_round_goes_on(tmp_path, stage, name, lie):
    check_a_lie(tmp_path, stage, lie)


def test_a_node_that_is_not_enrolled_is_not_asked_and_one_under_another_s_name_has_no_signature(tmp_path):
    known = {name: key for name, key in ENROLLED.items() if name != "node-5"}
    outcome = run(Watched(make_app(), 8), federation(tmp_path / "a", rounds={"count": 1}), enrolled=known)
    assert outcome.rounds[0].paused == {"node-5": "its name is not enrolled (trust.enrolled)"}

    def edit(message, reply):
        if message.metadata.dst_node_id != LIAR or stage_of(message) != ("train", FIRST):
            return reply

        def signed_by_another(told):
            for advert in told["adverts"]:
                content = bytes.fromhex(advert["sealing"] + advert["masking"] + advert["commitment"])
                advert["signature"] = sign(KEYS["node-12"], ADVERT, content).hex()

        return with_json(message, reply, signed_by_another)

    grid = Watched(make_app(), NODES, edit=lambda message, reply: edit(message, reply) if is_train(message) else reply)
    outcome = run(grid, federation(tmp_path / "b", rounds={"count": 1}), enrolled=ENROLLED)
    assert "not signed" in outcome.rounds[0].refused[f"node-{LIAR}"]


def test_a_node_that_spoils_an_attempt_is_not_asked_in_the_next_one(tmp_path):
    """Shares that do not give what their node has committed to cannot be told before the end."""

    def edit(message, reply):
        if message.metadata.dst_node_id != LIAR or not is_train(message) or stage_of(message) != ("train", FIRST):
            return reply

        def other_seed(told):
            asked = read_asked(message.content)
            advert = told["adverts"][0]
            advert["commitment"] = "77" * 32
            content = grid.terms(asked) + bytes.fromhex(advert["sealing"] + advert["masking"] + advert["commitment"])
            advert["signature"] = sign(KEYS[f"node-{LIAR}"], ADVERT, content + f"node-{LIAR}".encode()).hex()

        return with_json(message, reply, other_seed)

    class Grid(Watched):
        def terms(self, asked):
            from drawn_nodes import DENSE, MODULES

            from protocol.adapter import Adapter
            from protocol.secure_sum.contribution import Frame

            frame = Frame(asked.secure_sum, MODULES, DENSE, Adapter())
            return frame.terms(asked.federation, asked.round)[FIRST].digest

    grid = Grid(make_app(), NODES, edit=edit)
    outcome = run(grid, federation(tmp_path, rounds={"count": 1, "retries": 1}), enrolled=ENROLLED)
    record = outcome.rounds[0]
    assert "spoiled an attempt" in record.paused[f"node-{LIAR}"]
    assert len(record.accepted) == NODES - 3  # two more are left out: beside the first list, the sum of three is all that shows


@pytest.mark.parametrize("stage", [("mask", FIRST), ("mask", SECOND)])
def test_a_vector_that_no_update_makes_does_not_get_into_the_adapter(tmp_path, stage):
    """A masked vector can hold anything; a sum that is longer than updates within the limit can make it is not merged."""

    def edit(message, reply):
        if message.metadata.dst_node_id != LIAR or not is_train(message) or stage_of(message) != stage:
            return reply
        return with_vector(
            message, vector_of(reply) + np.random.default_rng(0).integers(0, 2**32, vector_of(reply).size, np.uint32)
        )

    settings = federation(tmp_path, rounds={"count": 1})
    with pytest.raises(FederationError, match=r"secure sum: .*(norm|weigh)"):
        run(Watched(make_app(), NODES, edit=edit), settings, enrolled=ENROLLED)


# A coordinator that lies --------------------------------------------------------------------------------------------------


def saying(message, told):
    """The question with another text."""
    records = RecordDict({**message.content, CONFIG: ConfigRecord({"json": json.dumps(told)})})
    other = Message(records, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type)
    other.metadata.__dict__["_message_id"] = message.metadata.message_id
    return other


class Lying(Watched):
    """A coordinator that changes its questions at one stage, to one node or all of them."""

    def __init__(self, stage, lie, nodes=NODES, to=None):
        super().__init__(make_app(), nodes, before=self.lied)
        self.stage, self.lie, self.to, self.lied_to = stage, lie, to, set()

    def lied(self, message):
        if is_train(message) and stage_of(message) == self.stage and self.to in (None, message.metadata.dst_node_id):
            told = json.loads(message.content[CONFIG]["json"])
            changed = self.lie(told["question"])
            told["question"] = told["question"] if changed is None else changed
            self.lied_to.add(message.metadata.message_id)
            return saying(message, told)
        return message


def without(name):
    def lie(question):
        question["survivors"].remove(name)

    return lie


@pytest.mark.parametrize(
    ("stage", "lie"),
    [
        (("confirm", SECOND), without("node-3")),  # the difference to the first sum were node-3's own update
        (("confirm", SECOND), lambda question: question.update(survivors=question["survivors"][2:])),
        (("confirm", FIRST), lambda question: question.update(survivors=question["survivors"][:2])),
        (("confirm", FIRST), lambda question: question.update(survivors=[])),
        (("confirm", FIRST), lambda question: question["survivors"].append("node-11")),
        (("confirm", FIRST), lambda question: question.update(phase=SECOND)),
        (("open", FIRST), lambda question: question.update(confirmations={})),
        (("open", FIRST), lambda question: question.update(phase=SECOND)),
        (("open", SECOND), lambda question: question.update(phase=FIRST)),  # a second time
        (("open", FIRST), lambda question: question["confirmations"].update({"node-1": "00" * 96})),
        (("mask", FIRST), lambda question: question.update(shares={})),
        (("mask", FIRST), lambda question: question["shares"].update({"node-11": "00" * 160})),
        (("mask", FIRST), lambda question: question.update(phase=SECOND)),  # with no basis
        (("mask", FIRST), lambda question: question.update(run="00" * 16)),
        (("mask", FIRST), lambda question: question.update(federation="another")),
        (("share", FIRST), lambda question: question.update(adverts=question["adverts"][:1])),
        (("share", FIRST), lambda question: question.update(adverts=question["adverts"][::-1])),
        (
            ("share", FIRST),
            lambda question: question.update(adverts=[dict(list(each.items())[:3]) for each in question["adverts"]]),
        ),
        (("share", FIRST), lambda question: question["adverts"][0].update({"node-1": question["adverts"][0]["node-3"]})),
        (("share", FIRST), lambda question: question["adverts"][0].update({"node-11": question["adverts"][0]["node-3"]})),
        (("share", FIRST), lambda question: {"stage": "share"}),
        (("share", FIRST), lambda question: question | {"stage": "train"}),
        (("share", FIRST), lambda question: [question]),
    ],
)
def test_a_coordinator_s_forged_question_is_answered_with_a_code_and_the_sum_is_given_up(tmp_path, stage, lie):
    grid = Lying(stage, lie)
    with pytest.raises(FederationError, match="secure sum"):
        run(grid, federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)
    changed = [reply for message, reply in grid.seen if is_train(message) and message.metadata.message_id in grid.lied_to]
    assert len(changed) >= 6
    assert {reply.error.reason for reply in changed if reply.has_error()} <= {"secure-sum", "message"}
    assert all(reply.has_error() for reply in changed)


def test_a_node_that_is_asked_for_something_else_than_the_others_does_not_train(tmp_path):
    """With a rate of nothing, or rows that weigh nothing, for all but one, the sum would be that one's update."""

    def lied(message):
        if not is_train(message) or message.metadata.dst_node_id == 4:
            return message
        told = json.loads(message.content[CONFIG]["json"])
        told["plan"]["training"]["learning_rate"] = 1e-30
        return saying(message, told)

    grid = Watched(make_app(), NODES, before=lied)
    with pytest.raises(FederationError, match="secure sum"):
        run(grid, federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)
    replies = [reply for message, reply in grid.seen if is_train(message)]
    assert {reply.error.reason for reply in replies if reply.has_error()} == {"secure-sum"}
    assert sum(reply.has_error() for reply in replies) == NODES - 1


def test_a_coordinator_that_gives_all_but_one_another_basis_does_not_find_that_one_s_update(tmp_path):
    """Across what the first sum has shown it would leave node 4's update alone in the second: its masks do not come off."""

    class Grid(Watched):
        def answer(self, message):
            if is_train(message) and stage_of(message) == ("mask", SECOND) and message.metadata.dst_node_id != 4:
                arrays = {name: FlowerArray(-array.numpy()) for name, array in message.content[RANGES].items()}
                message.content[RANGES] = ArrayRecord(arrays)
            return super().answer(message)

    with pytest.raises(FederationError, match=r"secure sum: .*(norm|weigh)"):
        run(Grid(make_app(), NODES), federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)


def test_swapped_adverts_told_to_one_node_alone_cost_that_node(tmp_path):
    """To node 4 the coordinator says that node 1 has node 3's keys."""

    def lie(question):
        for adverts in question["adverts"]:
            adverts["node-1"] = adverts["node-3"]

    outcome = run(Lying(("share", FIRST), lie, to=4), federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)
    assert outcome.rounds[0].silent == {"node-4": "the node answered with an error: secure-sum"}
    assert len(outcome.rounds[0].accepted) == NODES - 1


@pytest.mark.parametrize("scale", [1.001, 0.0, float("nan"), 1e30])
def test_a_basis_that_would_magnify_updates_gets_no_answer(tmp_path, scale):
    class Grid(Watched):
        def answer(self, message):
            if is_train(message) and stage_of(message) == ("mask", SECOND):
                arrays = {
                    name: FlowerArray(array.numpy() * np.float32(scale)) for name, array in message.content[RANGES].items()
                }
                message.content[RANGES] = ArrayRecord(arrays)
            return super().answer(message)

    with pytest.raises(FederationError, match="secure sum"):
        run(Grid(make_app(), NODES), federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)


def test_replays_of_every_message_of_an_earlier_round_get_no_answer(tmp_path):
    """200 and more: each message that nodes got in two rounds comes again, at once and after the round."""
    grid = Watched(make_app(), NODES)
    run(grid, federation(tmp_path, rounds={"count": 2}), enrolled=ENROLLED)
    messages = [message for message, _ in grid.seen if is_train(message)]
    assert len(messages) * 2 >= 200
    for message in messages + messages[::-1]:
        reply = Watched.answer(grid, message)
        assert reply.has_error(), stage_of(message)
        assert reply.error.reason == "secure-sum"


def test_a_round_that_is_asked_for_again_is_summed_only_over_the_same_nodes(tmp_path):
    """A coordinator that begins anew could learn node 3's update from two sums, with it and without it."""
    grid = Watched(make_app(), NODES)
    first = run(grid, federation(tmp_path / "first", rounds={"count": 1}), enrolled=ENROLLED)
    again = run(grid, federation(tmp_path / "again", rounds={"count": 1}), enrolled=ENROLLED)
    assert again.rounds[0].accepted.keys() == first.rounds[0].accepted.keys()
    grid.before = lambda message: None if message.metadata.dst_node_id == 3 and is_train(message) else message
    with pytest.raises(FederationError, match="secure sum"):
        run(grid, federation(tmp_path / "without", rounds={"count": 1}), enrolled=ENROLLED)


def test_a_node_that_wants_to_be_hidden_among_more_does_not_take_part_in_smaller_sums(tmp_path):
    grid = Watched(make_app(fewest=NODES + 1), NODES)
    with pytest.raises(FederationError, match="secure sum"):
        run(grid, federation(tmp_path, rounds={"count": 1}), enrolled=ENROLLED)
    assert all(reply.has_error() for message, reply in grid.seen if is_train(message))
