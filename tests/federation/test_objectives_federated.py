"""Preferences, feedback, scores and numbers in a federation, and that a later stage stays near what the stage before made."""

import json
import math

import pytest

from client.app import app
from client.node import Node
from client.round import choose, join
from protocol.errors import ConfigurationError
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.records import REFERENCE, Call, payload_bytes
from server.rounds import run
from simulations.federation import federate
from simulations.grid import InProcessGrid

LOG_2 = pytest.approx(math.log(2), abs=1e-5)


def preference(n):
    return {"prompt": f"Which room has number {n}?", "chosen": f"Room {n}.", "rejected": "Ask the porter."}


def feedback(n):
    row = preference(n)
    return {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}


def number(n):
    return {"text": "red " * (n % 5) + "blue " * (4 - n % 5), "label": n % 5 / 2}


MADE = {"dpo": preference, "reward": preference, "kto": feedback, "regression": number}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def nodes_of(tmp_path):
    def nodes(make, count=2, **settings):
        return [
            Node(
                name=f"node-{at}",
                train=write(tmp_path / f"train-{at}.jsonl", [make(n) for n in range(at, 40, count)]),
                evaluate=write(tmp_path / f"test-{at}.jsonl", [make(n) for n in range(40 + at, 48, count)]),
                **settings,
            )
            for at in range(count)
        ]

    return nodes


def plan_of(objective, **training):
    settings = {"learning_rate": 4e-3, "batch_size": 4, "max_steps": 5, "lr_scheduler_type": "constant_with_warmup"}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {"objective": objective, "lora": lora, "data": {"max_length": 64}, "training": {**settings, **training}}


def means(outcome, metric):
    """By round, over nodes."""
    return [
        sum(told[metric] for told in record.evaluation.values()) / len(record.evaluation)
        for record in outcome.rounds
        if record.evaluation
    ]


@pytest.mark.parametrize(
    ("objective", "metric", "base", "wanted"),
    [
        ("dpo", "loss", math.log(2), 0.3),
        pytest.param("kto", "loss", 0.5, 0.4, marks=pytest.mark.slow),
        pytest.param("reward", "loss", math.log(2), 0.4, marks=pytest.mark.slow),
        pytest.param("regression", "mse", 1.5, 0.6, marks=pytest.mark.slow),
    ],
)
def test_three_rounds_of_two_nodes_improve(tmp_path, nodes_of, objective, metric, base, wanted):
    """The base: nothing is told apart; numbers 0, 0.5 … 2 have the mean square 1.5, which a head near zero leaves."""
    federation = Federation.model_validate(
        {"plan": plan_of(objective), "rounds": {"count": 3, "minimum_nodes": 2}, "output": tmp_path / "run"}
    )
    outcome = federate(federation, nodes_of(MADE[objective]))
    losses = means(outcome, metric)
    assert losses[-1] < wanted < base
    assert losses[-1] < losses[0]
    if objective in ("dpo", "reward"):
        assert means(outcome, "reward-accuracy" if objective == "dpo" else "accuracy")[-1] > 0.9


@pytest.mark.parametrize(
    ("objective", "head"), [("reward", {"score.weight"}), ("regression", {"score.weight"}), ("dpo", set())]
)
def test_an_offer_holds_the_head_where_there_is_one(nodes_of, objective, head):
    federation = Federation.model_validate({"plan": plan_of(objective)})
    offer = join(Call(federation="f", round=0, rounds=1, plan=federation.plan), nodes_of(MADE[objective], 1)[0])
    assert set(offer.dense) == head


@pytest.mark.slow
def test_a_round_of_pretraining_reads_as_many_texts_as_fill_its_steps(tmp_path, nodes_of, monkeypatch):
    """Oracle: blocks of 64 tokens are counted as they reach the trainer; texts of any length fill them."""
    import strategies.training

    seen = []
    encode = strategies.training.encode

    def counting(*args):
        seen.append(encode(*args))
        return seen[-1]

    monkeypatch.setattr(strategies.training, "encode", counting)
    plan = plan_of("pretraining", max_steps=2, batch_size=2)
    federation = Federation.model_validate({"plan": plan, "rounds": {"count": 2}, "output": tmp_path / "run"})
    short = [{"text": "A room."} for _ in range(300)]
    long = [{"text": f"Room {n} is on the left. " * 200} for n in range(20)]
    for name, rows in (("short", short), ("long", long)):
        node = Node(name=name, train=write(tmp_path / f"{name}.jsonl", rows), evaluate=write(tmp_path / "e.jsonl", long[:1]))
        seen.clear()
        federate(federation.model_copy(update={"output": tmp_path / name}), [node])
        assert all(len(made.rows) >= 4 for made in seen)
        if name == "short":
            assert all(len(made.rows) <= 5 for made in seen)


# Stages -----------------------------------------------------------------------------------------------------------------


def staged(output, rounds=None, aggregation=None, after="dpo"):
    """Fine-tuning that moves the model far, then a stage that moves it nowhere: its rate is next to nothing."""
    first = plan_of("sft", learning_rate=1e-2, max_steps=4)
    second = plan_of(after, learning_rate=1e-12, max_steps=1)
    stages = [{"name": "answers", "rounds": 1, "plan": first}, {"name": "taste", "rounds": 3, "plan": second}]
    content = {"stages": stages, "rounds": {"minimum_nodes": 1, **(rounds or {})}, "aggregation": aggregation or {}}
    return Federation.model_validate({**content, "output": output})


def both(n):
    """A row that is of use to either stage."""
    row = preference(n)
    return {**row, "input_text": row["prompt"], "target_text": row["chosen"]}


def losses_of_the_second_stage(outcome):
    return [told["loss"] for record in outcome.rounds if record.round > 1 for told in record.evaluation.values()]


@pytest.mark.parametrize(
    ("rounds", "count", "tolerance"),
    [
        ({}, 2, 1e-5),
        pytest.param({"cohort": 1}, 3, 1e-5, marks=pytest.mark.slow),
        pytest.param({"wire_down": "fp16"}, 2, 1e-3, marks=pytest.mark.slow),
        pytest.param({"wire_down": "int8", "wire": "int8"}, 2, 0.02, marks=pytest.mark.slow),
    ],
)
def test_a_stage_stays_near_the_model_that_it_found(tmp_path, nodes_of, rounds, count, tolerance):
    """Nothing moved since, so the policy is its reference and the loss is log 2, at every node and in every round.

    Near the base it would not be: the first stage taught one answer of each pair. Wires of few bits round what was merged.
    """
    outcome = run(InProcessGrid(app, configs(nodes_of(both, count))), staged(tmp_path / "run", rounds))
    near = pytest.approx(math.log(2), abs=tolerance)
    assert losses_of_the_second_stage(outcome) == [near] * 3 * count
    trained = [told["train-loss"] for record in outcome.rounds if record.round > 1 for told in record.accepted.values()]
    assert trained == [near] * len(trained)


def configs(nodes):
    return [
        {key.replace("_", "-"): str(value) for key, value in node.model_dump(exclude_none=True, exclude_defaults=True).items()}
        for node in nodes
    ]


@pytest.mark.slow
def test_the_first_stage_moved_the_model_away_from_the_base(tmp_path, nodes_of):
    """What makes the test above one: the same two adapters, held against the base."""
    from strategies.base_model import find
    from strategies.data.formats import load
    from strategies.evaluation.measure import measure

    nodes = nodes_of(both)
    federation = staged(tmp_path / "run")
    run(InProcessGrid(app, configs(nodes)), federation)
    plan = federation.stages[1].plan
    adapter, _ = read_adapter(tmp_path / "run" / "adapter")
    assert measure(plan, find("tiny"), load(nodes[0].evaluate, plan), adapter)["loss"] < 0.5


class _Recording(InProcessGrid):
    """Keeps what was sent: round, whether the reference's arrays travelled, bytes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sent = []

    def answer(self, message):
        call = json.loads(message.content["fedge"]["json"])
        self.sent.append(
            (call["round"], message.metadata.dst_node_id, REFERENCE in message.content, payload_bytes(message.content))
        )
        return super().answer(message)


def test_the_reference_travels_once_to_a_node_that_was_not_there_at_the_beginning(tmp_path, nodes_of):
    grid = _Recording(app, configs(nodes_of(both, 3)))
    run(grid, staged(tmp_path / "run", {"cohort": 1}))
    # Every node measures after round 1, before the stage, and after round 2: two of three have not trained in it.
    brought = [node for number, node, whole, _ in grid.sent if whole]
    assert sorted(brought) == sorted(set(brought))
    assert not any(whole for number, _, whole, _ in grid.sent if number <= 1)


@pytest.mark.slow
def test_a_node_that_lost_its_memory_is_sent_the_reference_again(tmp_path, nodes_of):
    class Forgetful(_Recording):
        def answer(self, message):
            if json.loads(message.content["fedge"]["json"])["round"] == 3 and self.sent[-1][0] == 2:
                for context in self._contexts.values():
                    context.state.clear()
            return super().answer(message)

    grid = Forgetful(app, configs(nodes_of(both)))
    outcome = run(grid, staged(tmp_path / "run"))
    assert losses_of_the_second_stage(outcome) == [LOG_2] * 6
    assert {number for number, _, whole, _ in grid.sent if whole} == {3}


@pytest.mark.slow
def test_a_coordinator_that_died_in_a_stage_still_knows_what_it_stays_near(tmp_path, nodes_of):
    nodes = configs(nodes_of(both))

    def die(record):
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(InProcessGrid(app, nodes), staged(tmp_path / "run"), die)
    outcome = run(InProcessGrid(app, nodes), staged(tmp_path / "run"))
    assert [record.round for record in outcome.rounds] == [4]
    assert losses_of_the_second_stage(outcome) == [LOG_2] * 2
    whole = run(InProcessGrid(app, nodes), staged(tmp_path / "whole"))
    assert outcome.adapter.digest() == whole.adapter.digest()


def test_a_federation_that_begins_with_preferences_sends_no_reference(tmp_path, nodes_of):
    grid = _Recording(app, configs(nodes_of(preference)))
    federation = Federation.model_validate(
        {"plan": plan_of("dpo", max_steps=1), "rounds": {"count": 2}, "output": tmp_path / "run"}
    )
    run(grid, federation)
    assert not any(whole for _, _, whole, _ in grid.sent)


# What a node lets a plan call -------------------------------------------------------------------------------------------


def test_a_node_calls_no_function_that_it_does_not_list(tmp_path):
    plan = Federation.model_validate(
        {"plan": {**plan_of("rl"), "rl": {"reward_functions": ["os:listdir", "my_rules:polite"]}}}
    ).plan
    node = Node(name="n", train=write(tmp_path / "rows.jsonl", [{"prompt": "Where?"}] * 4))
    with pytest.raises(ConfigurationError, match=r"reward_functions.*os:listdir, my_rules:polite"):
        choose(plan, node)
    listed = node.model_copy(update={"reward_functions": "my_rules:polite, my_rules:short"})
    with pytest.raises(ConfigurationError, match=r"names os:listdir,"):
        choose(plan, listed)
    assert choose(plan, listed.model_copy(update={"reward_functions": "os:listdir,my_rules:polite"})).chosen.rl == plan.rl
