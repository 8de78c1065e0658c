"""Rounds whose updates are only added up: the same adapter as in the open, and nothing of anybody's own on the way."""

import numpy as np
import pytest
from flwr.app import MessageType
from summed_nodes import ENROLLED, HEAD, Watched, changed, federation, make_app

from protocol.adapter import Adapter
from protocol.errors import FederationError
from protocol.plan import Plan
from protocol.records import METRICS, VECTOR, Call, read_stage
from protocol.secure_sum.stages import FIRST, SECOND, Next
from server.rounds import run


def secure(output, grid=None, **settings):
    return run(grid or Watched(make_app()), federation(output, **settings), enrolled=ENROLLED)


def in_the_open(output, **settings):
    return run(Watched(make_app()), federation(output, secure=False, **settings))


def distance(one, other):
    """Largest difference of a module's product or a dense tensor, beside the largest number there."""
    assert one.factors.keys() == other.factors.keys()
    pairs = [(one.factors[module].product(), other.factors[module].product()) for module in one.factors]
    pairs += [(one.dense[name].astype(np.float64), other.dense[name].astype(np.float64)) for name in other.dense]
    return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("product-delta", {}),
        pytest.param("product-delta", {"server_momentum": 0.5}, marks=pytest.mark.slow),
        ("fedavg", {}),
        ("ffa", {}),
        ("rolora", {}),
        ("fedadam", {"server_learning_rate": 0.01}),
        pytest.param("fedyogi", {"server_learning_rate": 0.01}, marks=pytest.mark.slow),
    ],
)
def test_three_secure_rounds_of_mixed_ranks_give_the_adapter_of_three_open_ones(tmp_path, rule, more):
    """The modules have fewer directions than the sketch has columns, so it is exact. What is left is fixed point: of five nodes
    each errs by a step of 2.3e-8 at most, and all weigh about 2.5; entries of B, which are multiplied with A's near 0.3, are
    near 0.02, and there are three rounds. Adam's root magnifies what is small."""
    found = secure(tmp_path / "secure", rule=rule, aggregation=more)
    wanted = in_the_open(tmp_path / "open", rule=rule, aggregation=more)
    assert distance(found.adapter, wanted.adapter) <= (1e-4 if "adam" in rule or "yogi" in rule else 1e-5)
    for secret, known in zip(found.rounds, wanted.rounds, strict=True):
        assert sorted(secret.accepted) == sorted(known.accepted) == sorted(f"node-{node}" for node in range(1, 6))
        assert secret.merge["num_examples"] == known.merge["num_examples"]


def test_directions_that_hold_nothing_but_rounding_are_not_there(tmp_path):
    """Nodes begin a direction anew where there is none, and would not leave one of length 1e-4. Oracle: five nodes of rank 1
    have changed five directions, as in the open."""
    app = make_app(rank=lambda node: 1)
    settings = {"rounds": {"count": 1}, "aggregation": {"rank_cap": 16}}
    found = secure(tmp_path / "secure", Watched(app), **settings)
    wanted = run(Watched(app), federation(tmp_path / "open", secure=False, **settings))
    assert set(found.adapter.ranks().values()) == set(wanted.adapter.ranks().values()) == {5}


def test_a_ring_of_neighbours_gives_the_same_sum(tmp_path):
    outcome = secure(tmp_path / "ring", Watched(make_app(), 12), neighbours=6)
    wanted = run(Watched(make_app(), 12), federation(tmp_path / "open", secure=False))
    assert distance(outcome.adapter, wanted.adapter) <= 1e-5


def test_adapters_of_a_federation_are_summed_apart(tmp_path):
    """Six nodes, three for each adapter. Oracle: each adapter's first round in float64."""
    app = make_app(adapter_of=lambda node: "even" if node % 2 == 0 else "odd", rank=lambda node: 1)
    outcome = secure(tmp_path, Watched(app, 6), rounds={"count": 1}, adapters=("even", "odd"))
    for name, first in (("even", 2), ("odd", 1)):
        products, head = mean_of([f"node-{node}" for node in range(first, 7, 2)], 1)
        adapter = outcome.kept[name].adapter
        for module, product in products.items():
            assert np.abs(adapter.factors[module].product() - product).max() <= 1e-5 * np.abs(product).max()
        assert np.abs(adapter.dense["score.weight"] - head).max() <= 1e-6


def test_a_drawn_cohort_is_summed_and_who_is_late_with_its_keys_is_not_waited_for(tmp_path):
    """Of twelve nodes eight are asked for a cohort of five, and six are needed: two thirds of those who are asked."""
    settings = {"cohort": 5, "over_selection": 0.6, "count": 2}
    outcome = secure(tmp_path, Watched(make_app(), 12), rounds=settings)
    for record in outcome.rounds:
        assert len(record.accepted) == 6
        assert len(record.dropped) == 2
    assert outcome.rounds[0].accepted.keys() != outcome.rounds[1].accepted.keys()


# Nodes that fall silent ---------------------------------------------------------------------------------------------------


def stage_of(message):
    """What a message asks for: ``(stage, which sum)``."""
    if message.metadata.message_type == MessageType.TRAIN:
        return ("train", FIRST)
    question = read_stage(message.content, Next).question
    return question.stage, getattr(question, "phase", FIRST)


STAGES = [("train", FIRST), ("share", FIRST)] + [(stage, sum_) for sum_ in (0, 1) for stage in ("mask", "confirm", "open")]


class Leaving(Watched):
    """Nodes that go before a stage and stay away; notes who was said to be in each sum."""

    def __init__(self, leaving, nodes, **app):
        super().__init__(make_app(**app), nodes, before=self.heard)
        self.leaving, self.sums = leaving, {}

    def heard(self, message):
        if not message.metadata.message_type.startswith(MessageType.TRAIN):
            return message
        stage = stage_of(message)
        if stage[0] == "confirm":
            self.sums[stage[1]] = set(read_stage(message.content, Next).question.survivors)
        away = self.leaving.get(message.metadata.dst_node_id)
        return None if away and STAGES.index(stage) >= STAGES.index(away) else message


def mean_of(names, r):
    """The oracle, dense and in float64: the first round's mean innovation over some nodes and mean head over others."""
    products, weights = {}, []
    for name in names:
        node = int(name.removeprefix("node-"))
        call = Call(federation="summed", round=1, rounds=1, plan=Plan(), r=r)
        update = changed(call, node, Adapter())
        weights.append(update.manifest.num_examples)
        for module, pair in update.adapter.factors.items():
            products[module] = products.get(module, 0) + weights[-1] * pair.product()
        head, rows = update.adapter.dense["score.weight"].astype(np.float64), update.rows["score.weight"][:, None]
        products["head"] = products.get("head", 0) + weights[-1] * rows * head
        products["rows"] = products.get("rows", 0) + weights[-1] * rows
    head = np.where(products["rows"] > 0, products.pop("head") / np.maximum(products["rows"], 1), HEAD)
    del products["rows"]
    return {module: product / sum(weights) for module, product in products.items()}, head


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_that_falls_silent_at_any_stage_is_in_the_sum_or_not_there_at_all(tmp_path, stage):
    """Of nine nodes six must stay. One that has no vector in the second sum takes two others with it, so that the difference of
    both is a sum of three. All directions of all nodes fit into the basis that the first sum gives."""
    grid = Leaving({4: stage}, nodes=9, rank=lambda node: 1)
    outcome = secure(tmp_path, grid, rounds={"count": 1}, aggregation={"rank_cap": 16})
    everyone = {f"node-{node}" for node in range(1, 10)}
    before = everyone - {"node-4"} if STAGES.index(stage) <= STAGES.index(("mask", FIRST)) else everyone
    assert grid.sums[FIRST] == before == set(outcome.rounds[0].accepted)
    between = STAGES.index(("mask", FIRST)) < STAGES.index(stage) <= STAGES.index(("mask", SECOND))
    assert grid.sums[SECOND] == (before - {"node-1", "node-2", "node-4"} if between else before)
    assert outcome.rounds[0].silent.keys() == everyone - before
    products, _ = mean_of(grid.sums[SECOND], 1)
    _, head = mean_of(grid.sums[FIRST], 1)
    for module, product in products.items():
        assert np.abs(outcome.adapter.factors[module].product() - product).max() <= 1e-5 * np.abs(product).max()
    assert np.abs(outcome.adapter.dense["score.weight"] - head).max() <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_where_too_few_stay_the_round_is_given_up_and_nothing_is_merged(tmp_path, stage):
    """Of five nodes four must stay."""
    grid = Leaving({4: stage, 5: stage}, nodes=5)
    with pytest.raises(FederationError, match="secure sum"):
        secure(tmp_path, grid, rounds={"count": 1})
    assert not list(tmp_path.glob("rounds/*"))


def test_a_round_that_was_given_up_is_tried_again(tmp_path):
    """The first time two of five are away before anything was opened; then they are back."""
    grid = Leaving({4: ("mask", FIRST), 5: ("mask", FIRST)}, nodes=5)

    def back(message):
        found = grid.heard(message)
        if len(grid.seen) > 24:
            grid.leaving.clear()
        return found

    grid.before = back
    outcome = secure(tmp_path, grid, rounds={"count": 1, "retries": 2})
    assert len(outcome.rounds[0].accepted) == 5


def test_a_coordinator_that_was_killed_between_rounds_goes_on(tmp_path):
    """Oracle: the same three rounds in one go; rounding is drawn anew, so to its size alone."""
    whole = secure(tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(record):
        if record.round == 2:
            raise KilledError

    grid = Watched(make_app())
    with pytest.raises(KilledError):
        run(grid, federation(tmp_path / "killed"), kill, enrolled=ENROLLED)
    outcome = run(grid, federation(tmp_path / "killed"), enrolled=ENROLLED)
    assert [record.round for record in outcome.rounds] == [3]
    assert distance(outcome.adapter, whole.adapter) <= 1e-5


# What a coordinator sees --------------------------------------------------------------------------------------------------


def floats_of(adapter):
    for pair in adapter.factors.values():
        yield from (pair.A, pair.B)
    yield from adapter.dense.values()


def test_nothing_that_nodes_send_holds_a_number_of_their_updates_and_their_vectors_look_drawn(tmp_path):
    """Every reply of three rounds is searched for every float of every update, in float32 and float64; all bits of the masked
    words are set half of the time, within five standard deviations; no metric and no count is there."""
    made = []

    def answer(call, node, arrived):
        made.append(changed(call, node, arrived))
        return made[-1]

    grid = Watched(make_app(answer))
    secure(tmp_path, grid)
    replies = [reply for message, reply in grid.seen if message.metadata.message_type.startswith(MessageType.TRAIN)]
    assert len(replies) == 3 * 5 * 8
    said = b"".join(everything_in(reply) for reply in replies)
    for update in made:
        for tensor in floats_of(update.adapter):
            for row in tensor[np.any(tensor != 0, axis=1)] if tensor.size else []:
                assert row[:2].tobytes() not in said
                assert row[:2].astype(np.float64).tobytes() not in said
    words = np.concatenate([array.numpy() for reply in replies for array in reply.content.get(VECTOR, {}).values()])
    assert words.dtype == np.uint32
    for bit in range(32):
        assert abs(np.mean(words >> bit & 1) - 0.5) < 5 * 0.5 / words.size**0.5
    assert not any(METRICS in reply.content for reply in replies)


def everything_in(reply):
    assert not reply.has_error()
    said = b""
    for key, record in reply.content.items():
        for name, value in record.items():
            said += f"{key} {name} ".encode() + (value.data if hasattr(value, "data") else repr(value).encode())
    return said


def test_the_same_update_looks_different_in_every_attempt_and_round(tmp_path):
    """Keys and masks are never used twice: no two masked vectors share more words than chance gives."""
    grid = Watched(make_app())
    secure(tmp_path, grid)
    vectors = [
        array.numpy() for _, reply in grid.seen if not reply.has_error() for array in reply.content.get(VECTOR, {}).values()
    ]
    for at, one in enumerate(vectors):
        for other in vectors[:at]:
            if one.shape == other.shape:
                assert np.count_nonzero(one == other) < 3
