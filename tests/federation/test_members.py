"""Who belongs to a federation, and stays: nobody takes a member's place, and after a restart everyone is who they were."""

import numpy as np
import pytest
from drawn_nodes import DENSE, MODULES, RANKS, Scripted, drawn, federation, make_app, rank_of
from flwr.app import Error, Message, MessageType

from protocol.adapter import Adapter, Factors
from protocol.manifest import Manifest
from protocol.records import read_asked
from protocol.update import Update
from server.rounds import run

ALL = {"cohort": None, "over_selection": 0.0, "minimum_nodes": 1}
STRANGER = "cd" * 32


def settings(folder, seed=0, **changes):
    rounds = ALL | changes.pop("rounds", {})
    return federation(folder, seed, rounds=rounds, **changes)


def accepted(outcome):
    return {record.round: sorted(record.accepted) for record in outcome.rounds}


def interrupted(grid, described, after):
    """A run whose coordinator dies after some rounds."""

    def die(record):
        if record.round == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(grid, described, die)


# Names ----------------------------------------------------------------------------------------------------------------


def away_in_round_two(node, last):
    """Node 2 is away in round 2; node 5 comes then."""
    return last != 1 if node == 2 else node != 5 or last >= 1


@pytest.mark.parametrize("other", [{"base_digest": STRANGER}, {"modules": {"layers.0.q": (24, 16)}}, {"adapter": "legal"}])
def test_a_newcomer_that_is_refused_does_not_put_out_the_member_whose_name_it_uses(tmp_path, other):
    app = make_app(offered=lambda node: {"name": "node-2", **other} if node == 5 else {})
    outcome = run(Scripted(app, 5, connected=away_in_round_two), settings(tmp_path, rounds={"count": 4}))
    assert accepted(outcome)[2] == ["node-1", "node-3", "node-4"]
    assert accepted(outcome)[3] == accepted(outcome)[4] == ["node-1", "node-2", "node-3", "node-4"]
    assert list(outcome.left_out) == ["node-2-5"]


def test_a_member_whose_name_was_taken_while_it_was_away_is_asked_again_when_it_is_back(tmp_path):
    app = make_app(offered=lambda node: {"name": "node-2"} if node == 5 else {})
    outcome = run(Scripted(app, 5, connected=away_in_round_two), settings(tmp_path, rounds={"count": 4}))
    assert accepted(outcome)[2] == ["node-1", "node-2", "node-3", "node-4"]
    assert accepted(outcome)[3] == accepted(outcome)[4] == ["node-1", "node-2", "node-2-2", "node-3", "node-4"]
    assert outcome.offers["node-2-2"].r == rank_of(2)


def test_a_name_that_was_refused_is_free_for_the_node_that_it_belongs_to(tmp_path):
    app = make_app(offered=lambda node: {4: {"name": "bank", "base_digest": STRANGER}, 5: {"name": "bank"}}.get(node, {}))
    grid = Scripted(app, 5, connected=lambda node, last: node != 5 or last >= 1)
    outcome = run(grid, settings(tmp_path, rounds={"count": 2}))
    assert outcome.offers["bank"].r == rank_of(5)
    assert list(outcome.left_out) == ["bank-4"]


def test_nodes_of_one_name_keep_theirs_after_a_restart_whoever_is_asked_first(tmp_path):
    """Oracle: the run that was not interrupted. Cohorts are drawn by name, so that other names would train other nodes."""
    app = make_app(offered=lambda node: {"name": "bank"})

    def grid():
        return Scripted(app, 5, connected=lambda node, last: node != 1 or last >= 1 or again)

    changes = {"rounds": {"count": 5, "cohort": 2, "minimum_nodes": 2}}
    again = False
    wanted = run(grid(), settings(tmp_path / "whole", **changes))
    interrupted(grid(), settings(tmp_path / "run", **changes), 3)
    again = True
    outcome = run(grid(), settings(tmp_path / "run", **changes))
    assert outcome.adapter.digest() == wanted.adapter.digest()
    assert {name: offer.r for name, offer in outcome.offers.items()} == {n: o.r for n, o in wanted.offers.items()}


# What offers are held against after a restart ---------------------------------------------------------------------------

OTHERS = [
    {"modules": {"layers.0.q": (25, 16), "layers.1.q": (16, 24)}},
    {"dense": {"score.weight": (7, 16)}},
    {"base_digest": STRANGER},
]


@pytest.mark.parametrize("rule", ["product-delta", "fedavg", "flora"])
@pytest.mark.parametrize("other", OTHERS, ids=["modules", "dense", "base"])
def test_nodes_that_answer_first_after_a_restart_do_not_set_what_others_are_held_against(tmp_path, rule, other):
    """Oracle: the run in which these nodes fall silent instead. They are two of three, and the first that is asked is one."""

    def gone(message, reply):
        call = read_asked(message.content)
        late = message.metadata.message_type == MessageType.TRAIN and call.round > 2
        return Message(Error(1, "gone"), reply_to=message) if late and message.metadata.dst_node_id < 3 else reply

    changes = {
        "rounds": {"count": 4, "evaluate_every": 0, "wire_down": "fp32"},
        "aggregation": {"rule": rule, "server_momentum": 0},
    }
    wanted = run(Scripted(make_app(), 3, edit=gone), settings(tmp_path / "whole", **changes))
    interrupted(Scripted(make_app(), 3), settings(tmp_path / "run", **changes), 2)
    lying = make_app(offered=lambda node: other if node < 3 else {})
    outcome = run(Scripted(lying, 3), settings(tmp_path / "run", **changes))
    assert accepted(outcome) == {3: ["node-3"], 4: ["node-3"]}
    assert sorted(outcome.left_out) == ["node-1", "node-2"]
    assert outcome.adapter.digest() == wanted.adapter.digest()


# Splits -----------------------------------------------------------------------------------------------------------------


def pulling(call, node, arrived):
    """Even nodes pull the dense tensor one way and odd ones the other; modules stay as they are."""
    rng = np.random.default_rng([node, call.round])
    dense = {
        name: arrived.dense.get(name, np.zeros(shape)) + (0.1 if node % 2 else -0.1) + 1e-3 * rng.normal(size=shape)
        for name, shape in DENSE.items()
    }
    factors = {
        module: Factors(np.zeros((1, d_in), np.float32), np.zeros((d_out, 1), np.float32))
        for module, (d_out, d_in) in MODULES.items()
    }
    manifest = drawn(call, node, arrived).manifest.model_dump() | {"num_examples": 10, "r": 1}
    return Update(Adapter(factors, {name: tensor.astype(np.float32) for name, tensor in dense.items()}), Manifest(**manifest))


def unheard(message, reply):
    """Nodes 1, 2 and 3 are silent in the first round, in which the others split."""
    is_first = message.metadata.message_type == MessageType.TRAIN and read_asked(message.content).round == 1
    return Message(Error(1, "busy"), reply_to=message) if is_first and message.metadata.dst_node_id <= len(RANKS) else reply


@pytest.mark.parametrize("rounds", [{"evaluate_every": 0}, {"cohort": 4}], ids=["silent", "not drawn"])
def test_every_member_belongs_to_a_part_of_a_split_whether_it_was_heard_or_not(tmp_path, rounds):
    """Nine nodes, of which not all are heard in the round of the split."""
    changes = {"rounds": {"count": 6, "cluster": True, "wire_down": "fp32", **rounds}, "aggregation": {"server_momentum": 0}}

    def grid():
        return Scripted(make_app(answer=pulling), 9, edit=(lambda m, r: r) if "cohort" in rounds else unheard)

    wanted = run(grid(), settings(tmp_path / "whole", **changes))
    assert len({record.adapter for record in wanted.rounds}) > 1
    assert sorted(wanted.offers) == sorted(f"node-{at}" for at in range(1, 10))
    if "cohort" not in rounds:  # where all are asked
        for last in (2, 6):
            heard = [name for record in wanted.rounds if record.round == last for name in record.accepted]
            assert sorted(heard) == sorted(wanted.offers)
    interrupted(grid(), settings(tmp_path / "run", **changes), 3)
    outcome = run(grid(), settings(tmp_path / "run", **changes))
    assert {name: kept.adapter.digest() for name, kept in outcome.kept.items()} == {
        name: kept.adapter.digest() for name, kept in wanted.kept.items()
    }
