"""Who is who in rounds: whatever was sent before, elsewhere, to another, for something else, or changed, is not accepted.

The 200 messages of the issue are 120 that reach real nodes (``client.app``) and 80 that reach the real round loop.
"""

import itertools
import json

import pytest
from drawn_nodes import federation as drawn_federation
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from signed_nodes import COORDINATOR, FORMER, STRANGER, Tampering, config, enrol, honest, key, line

from client.app import app
from protocol.errors import ConfigurationError, FederationError
from protocol.federation import Federation
from protocol.records import CONFIG, SIGNATURE, digest_of, take_signature, with_signature
from protocol.release import check_release
from protocol.signed_messages import Issue, sign_answer, sign_call
from server import trust as trust_module
from server.ledger import export
from server.rounds import run
from server.trust import Trust

ROUNDS = {"rounds": {"count": 2, "minimum_nodes": 3, "evaluate_every": 1, "retries": 0, "failures_allowed": 1000}}


def federation(output, **changes):
    return drawn_federation(output, 3, **(ROUNDS | changes))


# To the nodes -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Two runs of one federation over the same three real nodes: an open one, and one whose updates are only added up."""
    folder = tmp_path_factory.mktemp("story")
    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"{n % 5}."} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    configs, trust = honest(folder, 3, trial=False)
    grid = Tampering([each | {"train": str(folder / "rows.jsonl")} for each in configs], app=app)
    plan = {"base_model": "tiny", "lora": {"r": 2, "target_modules": ["q_proj"]}, "data": {"max_length": 32}}
    content = {
        "name": "signed",
        "plan": plan | {"training": {"batch_size": 2, "max_steps": 1}},
        "rounds": {"count": 1, "minimum_nodes": 3, "retries": 0},
    }
    seen = []
    for name, more in {"open": {}, "summed": {"secure_sum": {"enabled": True}}}.items():
        run(grid, Federation.model_validate(content | more | {"output": folder / name}), trust=trust)
        seen.append(grid.seen)
        assert all(answer is not None for _, answer in grid.seen)
        grid.seen = []
    return grid, *seen


def again(message, records, kind=None, to=None):
    """A message with other content, as it would come by the same way."""
    metadata = message.metadata
    made = Message(records, dst_node_id=to or metadata.dst_node_id, message_type=kind or metadata.message_type)
    made.metadata.__dict__["_message_id"] = "forged"
    return made


def issue_of(message):
    return Issue.model_validate_json(take_signature(message.content)[2])


_later = itertools.count(2**62)  # newer than whatever a clock says


def resigned(message, private=COORDINATOR, **changes):
    """What a coordinator could have sent now, but for what is changed."""
    records, _, _ = take_signature(message.content)
    issue = issue_of(message).model_copy(update={"issued": next(_later)} | changes)
    text, signature = sign_call(private, issue, digest_of(records))
    return with_signature(records, signature, text)


def flipped(records):
    """One bit of the longest array, or of the JSON where there is none, is another."""
    found = dict(records)
    arrays = [(name, record) for name, record in records.items() if isinstance(record, ArrayRecord) and len(record)]
    if arrays:
        name, record = arrays[0]
        longest = max(record, key=lambda each: len(record[each].data))
        array, data = record[longest], bytearray(record[longest].data)
        data[-1] ^= 1
        changed = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(data))
        found[name] = ArrayRecord({**record, longest: changed})
    else:
        found[CONFIG] = ConfigRecord({"json": records[CONFIG]["json"].replace("1", "2", 1)})
    return RecordDict(found)


def with_issue(records, **changes):
    """The header says something else than what was signed."""
    rest, signature, text = take_signature(records)
    return with_signature(rest, signature, Issue.model_validate_json(text).model_copy(update=changes).model_dump_json())


def with_flipped_signature(records):
    rest, signature, text = take_signature(records)
    return with_signature(rest, signature[:-1] + bytes([signature[-1] ^ 1]), text)


KINDS = {"query": "train", "train": "evaluate", "evaluate": "train", "train.secure_sum": "evaluate"}

# By what was done to a message: what arrives, made of it, of the same for another node, and of another for this one.
TO_NODES = {
    "replayed": lambda message, other, next_one: again(message, message.content),
    "stale": lambda message, other, next_one: again(message, resigned(message, issued=issue_of(message).issued - 1)),
    "of another run": lambda message, other, next_one: again(message, resigned(message, run="0" * 32, issued=1)),
    "for another node": lambda message, other, next_one: again(message, resigned(other)),
    "of another kind": lambda message, other, next_one: again(message, resigned(message), KINDS[message.metadata.message_type]),
    "of another federation": lambda message, other, next_one: again(message, resigned(message, federation="another")),
    "under another's signature": lambda message, other, next_one: again(
        message, RecordDict({**take_signature(message.content)[0], SIGNATURE: resigned(next_one)[SIGNATURE]})
    ),
    "changed": lambda message, other, next_one: again(message, flipped(resigned(message))),
    "renumbered": lambda message, other, next_one: again(message, with_issue(message.content, issued=next(_later))),
    "with another signature": lambda message, other, next_one: again(message, with_flipped_signature(resigned(message))),
    "unsigned": lambda message, other, next_one: again(message, take_signature(message.content)[0]),
    "of no coordinator": lambda message, other, next_one: again(message, resigned(message, next(_others))),
}
_others = itertools.cycle([FORMER, key(1), STRANGER])
# What the node answers; nothing else of it is known to whoever sent it.
CODES = {"replayed": "stale", "stale": "stale", "of another run": "stale"}
CODES |= dict.fromkeys(("for another node", "of another kind", "of another federation", "unsigned"), "message")


def chosen(story):
    """Ten messages: to join, to train, to measure, and every stage of a secure sum; with the two that forgeries are made of."""
    _, opened, summed = story
    one, other = ([m for m, _ in opened + summed if m.metadata.dst_node_id == node] for node in (1, 2))
    assert {m.metadata.message_type for m in one} == set(KINDS)
    found = list(zip(one, other, one[1:] + one[:1], strict=True))
    return found[:3] + found[-7:]


def test_120_messages_that_no_coordinator_sent_to_this_node_now_for_this_are_not_accepted_by_a_node(story):
    grid = story[0]
    refused = 0
    for what, forge in TO_NODES.items():
        for messages in chosen(story):
            forged = forge(*messages)
            before = {name: dict(record) for name, record in grid._contexts[1].state.items()}
            reply = app(forged, grid._contexts[1])
            assert reply.has_error(), what
            assert reply.error.reason == CODES.get(what, "signature"), what
            assert {name: dict(record) for name, record in grid._contexts[1].state.items()} == before, what
            refused += 1
    assert refused == 120


def test_the_next_message_of_the_coordinator_is_accepted_all_the_same(story):
    """Control of the test above: what it forges from is taken when nothing is forged."""
    grid, opened, _ = story
    message = next(m for m, _ in opened if m.metadata.message_type == MessageType.EVALUATE and m.metadata.dst_node_id == 2)
    fresh = again(message, resigned(message, issued=issue_of(message).issued + 10**15))
    assert app(fresh, grid._contexts[2]).has_content()
    assert app(fresh, grid._contexts[2]).error.reason == "stale"


# To the coordinator -----------------------------------------------------------------------------------------------------------

NINE = {"rounds": ROUNDS["rounds"] | {"count": 9, "cohort": None}}


def content_of(seen, number, node, kind):
    """What a node answered in a round."""
    return next(
        answer
        for message, answer in seen
        if (message.metadata.dst_node_id, message.metadata.message_type, issue_of(message).round) == (node, kind, number)
    )


def with_metric(records):
    """One row more than the node has said."""
    metrics = records["metrics"]
    return RecordDict({**records, "metrics": MetricRecord({**metrics, "num-examples": metrics["num-examples"] + 1})})


def signed_by(private, message, records):
    rest, _, _ = take_signature(records)
    return with_signature(rest, sign_answer(private, issue_of(message), "node-5", digest_of(rest)))


# By what somebody on the way answers in place of the fifth node, in rounds 2 to 9: from the message, the true answer, what was
# seen in this run and in one before.
TO_COORDINATOR = {
    "of the round before": lambda message, own, seen, past: content_of(seen, issue_of(message).round - 1, 5, "train"),
    "of another node": lambda message, own, seen, past: content_of(seen, issue_of(message).round, 1, "train"),
    "of another kind": lambda message, own, seen, past: content_of(seen, issue_of(message).round - 1, 5, "evaluate"),
    "of another run": lambda message, own, seen, past: content_of(past, issue_of(message).round, 5, "train"),
    "changed": lambda message, own, seen, past: flipped(own),
    "counted otherwise": lambda message, own, seen, past: with_metric(own),
    "with another signature": lambda message, own, seen, past: with_flipped_signature(own),
    "unsigned": lambda message, own, seen, past: take_signature(own)[0],
    "of a stranger": lambda message, own, seen, past: signed_by(STRANGER, message, own),
    "of another key of the list": lambda message, own, seen, past: signed_by(key(2), message, own),
}


class OnTheWay(Tampering):
    """Answers in place of the fifth node, from round 2 on."""

    def __init__(self, configs, forge, past):
        super().__init__(configs, self.forged)
        self.forge, self.past = forge, past

    def forged(self, message, reply):
        asked = message.metadata
        if asked.dst_node_id == 5 and asked.message_type == MessageType.TRAIN and issue_of(message).round > 1:
            reply.content = self.forge(message, reply.content, self.seen, self.past)
        return reply


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    """An honest run of the same federation, in which all was recorded."""
    folder = tmp_path_factory.mktemp("past")
    configs, trust = honest(folder)
    grid = Tampering(configs)
    outcome = run(grid, federation(folder / "runs", **NINE), trust=trust)
    assert all(len(record.accepted) == 5 for record in outcome.rounds)
    return grid.seen


def test_80_answers_that_a_node_has_not_given_to_this_question_are_not_accepted_by_the_coordinator(tmp_path, past):
    """Whoever is attacked is without its update in that round; the others' rounds go on."""
    refused = 0
    for what, forge in TO_COORDINATOR.items():
        configs, trust = honest(tmp_path / what)
        outcome = run(OnTheWay(configs, forge, past), federation(tmp_path / what / "runs", **NINE), trust=trust)
        assert "node-5" in outcome.rounds[0].accepted
        for record in outcome.rounds[1:]:
            assert sorted(record.accepted) == ["node-1", "node-2", "node-3", "node-4"], what
            assert record.refused["node-5"].startswith("signature: "), what
            refused += 1
    assert refused == 80


# Who may join -----------------------------------------------------------------------------------------------------------------


def intruders(folder):
    """50 nodes, each with a list of its own in which it is enrolled, so that it answers: by what is wrong with them."""
    found = {}
    for number in range(50):
        kind = ("unregistered", "under another's name", "with another's key", "a copy", "revoked")[number % 5]
        place = folder / f"intruder-{number}"
        name, private = f"intruder-{number}", key(100 + number)
        if kind == "under another's name":
            name = f"node-{number % 3 + 1}"
        elif kind == "with another's key":
            private = key(number % 3 + 1)
        elif kind == "a copy":
            name, private = f"node-{number % 3 + 1}", key(number % 3 + 1)
        found[f"{number} {kind}"] = config(place, name, private, enrol(place / "enrolled.yaml", {name: private}))
    return found


def test_50_unregistered_duplicate_and_revoked_keys_are_not_accepted(tmp_path):
    keys = {f"node-{number}": key(number) for number in (1, 2, 3)}
    gone = {f"intruder-{n}": {"key": line(key(100 + n)), "revoked": "2026-01-31"} for n in range(4, 50, 5)}
    listed = enrol(tmp_path / "enrolled.yaml", keys, **gone)
    honest_ones = [config(tmp_path, name, private, listed) for name, private in keys.items()]
    strange = intruders(tmp_path)
    grid = Tampering([*honest_ones, *strange.values()])
    settings = federation(tmp_path / "runs", rounds=ROUNDS["rounds"] | {"cohort": None})
    outcome = run(grid, settings, trust=Trust(COORDINATOR, listed))
    assert outcome.offers.keys() == {"node-1", "node-2", "node-3"}
    assert [sorted(record.accepted) for record in outcome.rounds] == [["node-1", "node-2", "node-3"]] * 2
    assert len(outcome.left_out) == len(strange) == 50
    said = list(outcome.left_out.values())
    assert sum("not enrolled as a node" in reason for reason in said) == 20  # unregistered, and with another's key
    assert sum("not made by the key that is enrolled" in reason for reason in said) == 10
    assert sum("another node with the key of node-" in reason for reason in said) == 10
    assert sum("revoked on 2026-01-31" in reason for reason in said) == 10
    trained = {m.metadata.dst_node_id for m, _ in grid.seen if m.metadata.message_type != MessageType.QUERY}
    assert trained == {1, 2, 3}  # nobody else is sent an adapter


def test_a_node_without_keys_is_not_heard_and_one_with_keys_hears_no_coordinator_without(tmp_path):
    configs, trust = honest(tmp_path, 4)
    unset = {key: value for key, value in configs[3].items() if key not in ("identity", "enrolled")}
    outcome = run(Tampering([*configs[:3], unset]), federation(tmp_path / "runs"), trust=trust)
    assert outcome.left_out.keys() == {"node-4"}
    assert outcome.left_out["node-4"].startswith("signature: found none")
    with pytest.raises(FederationError, match="the node answered with an error: message"):
        run(Tampering(configs), federation(tmp_path / "unsigned"))


def test_who_comes_back_takes_its_place_once_it_has_gone_and_a_copy_beside_it_does_not(tmp_path):
    """Flower knows a restarted node by another id: 4 and 5 are copies of 1, which goes after round 1, and one of them is in."""
    configs, trust = honest(tmp_path, 3)

    class Going(Tampering):
        def get_node_ids(self):
            late = any(issue_of(message).round > 0 for message, _ in self.seen)
            return [node for node in super().get_node_ids() if node != 1 or not late]

    grid = Going([*configs, configs[0], configs[0]])
    outcome = run(grid, federation(tmp_path / "runs", rounds=ROUNDS["rounds"] | {"cohort": None, "count": 3}), trust=trust)
    assert [sorted(record.accepted) for record in outcome.rounds] == [["node-1", "node-2", "node-3"]] * 3
    asked = [[m.metadata.dst_node_id for m, _ in grid.seen if trains(m, number)] for number in (1, 2, 3)]
    assert [sorted(nodes) for nodes in asked] == [[1, 2, 3], [2, 3, 4], [2, 3, 4]]


def trains(message, number):
    return message.metadata.message_type == MessageType.TRAIN and issue_of(message).round == number


def test_a_key_that_is_revoked_while_a_run_goes_on_is_asked_no_more_and_a_broken_list_changes_nothing(tmp_path):
    configs, trust = honest(tmp_path, 4)
    keys = {f"node-{number}": key(number) for number in (1, 2, 3)}

    def edited(record):
        if record.round == 1:
            enrol(tmp_path / "enrolled.yaml", keys, **{"node-4": {"key": line(key(4)), "revoked": "2026-11-22"}})
        elif record.round == 2:
            (tmp_path / "enrolled.yaml").write_text("node-1: [")

    # Nodes keep the list that they have: theirs is another file.
    own = enrol(tmp_path / "theirs.yaml", keys | {"node-4": key(4)})
    grid = Tampering([each | {"enrolled": str(own)} for each in configs])
    settings = federation(tmp_path / "runs", rounds=ROUNDS["rounds"] | {"cohort": None, "count": 3})
    outcome = run(grid, settings, edited, trust=trust)
    assert [max(record.accepted) for record in outcome.rounds] == ["node-4", "node-3", "node-3"]
    assert {issue_of(m).round for m, _ in grid.seen if m.metadata.dst_node_id == 4} == {0, 1}


def test_a_coordinator_whose_key_is_not_enrolled_as_one_does_not_begin(tmp_path):
    _, trust = honest(tmp_path)
    for private in (STRANGER, FORMER, key(1)):
        with pytest.raises(ConfigurationError, match="not enrolled with role coordinator"):
            Trust(private, tmp_path / "enrolled.yaml")
    assert trust.nodes.keys() == {f"node-{number}" for number in range(1, 6)}
    with pytest.raises(ConfigurationError, match="made in simulations alone"):
        run(Tampering([]), federation(tmp_path / "runs", trust={"signed": True}))


# Going on ---------------------------------------------------------------------------------------------------------------------


def test_signatures_change_nothing_that_is_computed(tmp_path):
    configs, trust = honest(tmp_path)
    signed = run(Tampering(configs), federation(tmp_path / "signed"), trust=trust)
    unset = [{"name": each["name"], "train": "rows.jsonl"} for each in configs]
    plain = run(Tampering(unset), federation(tmp_path / "plain"))
    assert signed.adapter.digest() == plain.adapter.digest()
    assert signed.rounds[-1].evaluation == plain.rounds[-1].evaluation
    assert (signed.rounds[-1].bytes_sent, signed.rounds[-1].bytes_received) == (
        plain.rounds[-1].bytes_sent,
        plain.rounds[-1].bytes_received,
    )


def test_a_coordinator_that_died_goes_on_to_the_same_bit_though_its_clock_went_back_and_old_messages_stay_old(
    tmp_path, monkeypatch
):
    """The clock says a year less after the restart; nodes keep what they accepted in their state folders."""
    configs, trust = honest(tmp_path)
    states = [each | {"state": str(tmp_path / "state" / each["name"])} for each in configs]
    wanted = run(Tampering(configs), federation(tmp_path / "whole"), trust=trust)

    def die(record):
        raise KeyboardInterrupt

    first = Tampering(states)
    with pytest.raises(KeyboardInterrupt):
        run(first, federation(tmp_path / "died"), die, trust=trust)
    clock = trust_module.time.time_ns
    monkeypatch.setattr(trust_module.time, "time_ns", lambda: clock() - 365 * 24 * 3600 * 10**9)
    second = Tampering(states)  # nodes whose Flower state is lost, too
    found = run(second, federation(tmp_path / "died"), trust=trust)
    assert found.adapter.digest() == wanted.adapter.digest()
    assert {issue_of(m).run for m, _ in first.seen} == {issue_of(m).run for m, _ in second.seen}
    numbers = [issue_of(m).issued for m, _ in first.seen + second.seen]
    assert numbers == sorted(set(numbers))
    third = Tampering(states)
    for message, _ in first.seen + second.seen:
        assert app(again(message, message.content), third._contexts[message.metadata.dst_node_id]).error.reason == "stale"


def test_a_number_file_that_holds_none_is_told_and_numbers_grow_over_restarts(tmp_path, monkeypatch):
    monkeypatch.setattr(trust_module.time, "time_ns", lambda: 5)  # a clock that stands still
    found = []
    for _ in range(3):
        numbers = trust_module.Numbers(tmp_path / "issued")
        found += [numbers.next() for _ in range(4)]
    assert found == sorted(set(found))
    for odd in ("words", "-1", str(2**63)):
        (tmp_path / "issued").write_text(odd)
        with pytest.raises(FederationError, match="expected a number"):
            trust_module.Numbers(tmp_path / "issued")


# Released adapters ------------------------------------------------------------------------------------------------------------


def test_every_adapter_that_is_kept_is_signed_and_exports_carry_that(tmp_path):
    configs, trust = honest(tmp_path)
    outcome = run(Tampering(configs), federation(tmp_path / "runs"), trust=trust)
    export(tmp_path / "runs", tmp_path / "first", number=1)
    export(tmp_path / "runs", tmp_path / "last")
    for place, number in (("first", 1), ("last", 2), ("runs/adapter", 2), ("runs/rounds/0001", 1)):
        found = check_release(tmp_path / place, trust.enrolment.coordinators.values())
        assert (found.release.federation, found.release.round) == ("drawn", number)
    assert found.release.digest == outcome.kept[""].manifest.parent
    assert check_release(tmp_path / "last", [COORDINATOR.public_key()]).release.digest == outcome.adapter.digest()
