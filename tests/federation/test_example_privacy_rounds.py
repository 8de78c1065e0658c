"""Each row's own privacy over rounds: the budget is spent, written before an update leaves, kept over restarts, and ends."""

import json

import numpy as np
import pytest
from flwr.app import RecordDict

from client import round as node_round
from client.example_ledger import FILE, ExampleLedger
from client.example_ledger import spent as spent_at
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.errors import ConfigurationError, FederationError, PrivacyError
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.records import Call, Received
from simulations.federation import federate
from strategies.example_budget import Sampled

STEPS, BATCH, ROWS = 3, 8, 40
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


# With it three steps cost 3.02, six 3.79 and nine 4.39 (Sampled.epsilon, which has tests of its own).
NOISE = 1.05


def content(epsilon=4.0, **privacy):
    training = {"learning_rate": 1e-2, "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    training["example_privacy"] = {"epsilon": epsilon, "noise_multiplier": NOISE} | privacy
    return {"base_model": "tiny", "lora": LORA, "data": {"max_length": 48}, "training": training}


def node_in(folder, name="bank", **own):
    folder.mkdir(exist_ok=True, parents=True)
    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"{n % 7}."} for n in range(ROWS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    return Node(name=name, train=folder / "train.jsonl", evaluate=folder / "held.jsonl", **{"state": folder / "state"} | own)


def federation(folder, plan, rounds=2):
    return Federation.model_validate(
        {
            "plan": plan,
            "rounds": {"count": rounds, "evaluate_every": 0, "retries": 0},
            "aggregation": {"rank_cap": 8},
            "output": folder,
        }
    )


def asked(plan, number, rounds):
    call = Call(federation="f", round=number, rounds=rounds, plan=Plan.model_validate(plan), r=2)
    return Received(call, Adapter(), Adapter())


def lines(node):
    path = node.state / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def flat(adapter):
    return np.concatenate([part.ravel() for pair in adapter.factors.values() for part in (pair.A, pair.B)])


def test_every_round_of_every_node_is_counted_and_all_of_them_stay_within_the_promise(tmp_path):
    """What two rounds cost together is what one training of as many steps does."""
    nodes = [node_in(tmp_path / name, name, trial=name == "bank") for name in ("bank", "clinic")]
    outcome = federate(federation(tmp_path / "runs", content()), nodes)
    assert [len(record.accepted) for record in outcome.rounds] == [2, 2]
    for record in outcome.rounds:
        for metrics in record.accepted.values():
            assert "train-loss" not in metrics
            assert not [name for name in metrics if "epsilon" in name]
    for node in nodes:
        told = lines(node)
        assert [(line["round"], line["times"]) for line in told] == [(1, STEPS), (2, STEPS)]  # the trial step is none
        assert (node.state / FILE).stat().st_mode & 0o777 == 0o600
        mechanism = told[0]["mechanism"]
        assert (mechanism["nodes"], mechanism["cohort"], mechanism["sampling"]) == (ROWS, BATCH, "poisson")
        assert spent_at(node.state, Plan.model_validate(content())) == Sampled(ROWS, BATCH, NOISE, 2 * STEPS).epsilon(1e-5)
    with pytest.raises(FederationError, match="privacy"):  # the same rows have nothing left for another
        federate(federation(tmp_path / "another", content()), nodes)
    assert [len(lines(node)) for node in nodes] == [2, 2]


def test_a_round_asked_for_again_is_drawn_anew_counts_again_and_ends_at_the_budget_after_restarts_too(tmp_path):
    """Noise for two rounds: two askings of round 1 spend them, each by a node that has just started."""
    node, plan = node_in(tmp_path), content()
    found = []
    for number in (1, 1):
        work = node_round.train(asked(plan, number, 2), node, Memory(RecordDict(), "f", node.state))
        found.append(work)
    assert [line["round"] for line in lines(node)] == [1, 1]
    assert not np.allclose(flat(found[0].update.adapter), flat(found[1].update.adapter))
    spent = [work.own_metrics["example-epsilon"] for work in found]
    assert spent == [Sampled(ROWS, BATCH, NOISE, steps).epsilon(1e-5) for steps in (STEPS, 2 * STEPS)]
    for work in found:  # neither how many rows there are, nor what they cost
        assert work.update.manifest.num_examples == STEPS * BATCH
        assert set(work.metrics) == {"train-steps"}
    before = (node.state / FILE).read_bytes()
    with pytest.raises(PrivacyError, match=r"3 steps on 40 rows would bring epsilon from .* and 4 is promised .* nothing is"):
        node_round.train(asked(plan, 2, 2), node, Memory(RecordDict(), "f", node.state))
    assert (node.state / FILE).read_bytes() == before


def test_a_ledger_that_a_crash_cut_off_anywhere_counts_every_step_that_was_released(tmp_path):
    """After each byte of the second line's writing: the first release and, once a byte is there, the second whole. Steps draw
    all of eight rows, whose price is soon told.
    """
    plan = Plan.model_validate(content(epsilon=1000.0, noise_multiplier=1.0))
    node = node_in(tmp_path)
    ledger, sampled = ExampleLedger(plan, node, BATCH, 9), Sampled(BATCH, BATCH, 1.0, STEPS)
    ledger.spend(sampled, 1)
    first = (node.state / FILE).read_bytes()
    whole = ledger.spend(sampled, 2)
    second = (node.state / FILE).read_bytes()
    for size in range(len(first) + 1, len(second), 9):
        (node.state / FILE).write_bytes(second[:size])
        ExampleLedger(plan, node, BATCH, 9).check()
        assert sum(line["times"] for line in lines(node)) == 2 * STEPS
    (node.state / FILE).write_bytes(first)
    assert ExampleLedger(plan, node, BATCH, 9).spend(sampled, 2) == whole
    (node.state / FILE).write_bytes(second.replace(b'"times": 3', b'"times": 1'))
    with pytest.raises(PrivacyError, match="is not what was written"):
        ExampleLedger(plan, node, BATCH, 9).check()


def test_a_training_that_died_has_released_nothing_and_costs_nothing(tmp_path, monkeypatch):
    node = node_in(tmp_path)

    def died(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(node_round, "fit", died)
    with pytest.raises(KeyboardInterrupt):
        node_round.train(asked(content(), 1, 2), node, Memory(RecordDict(), "f", node.state))
    assert lines(node) == []


def test_nodes_that_cannot_keep_the_promise_are_refused_before_anything_is_loaded(tmp_path):
    plan = Plan.model_validate(content())
    bare = node_in(tmp_path, state=None, replay=tmp_path / "train.jsonl", data_policy=tmp_path / "policy.yaml")
    (tmp_path / "policy.yaml").write_text("augmentation: {synonyms: words.txt}")
    with pytest.raises(ConfigurationError) as refused:
        ExampleLedger(plan, bare, ROWS, 1)
    told = str(refused.value)
    assert "state: missing" in told
    assert "replay: would show one row several times" in told
    assert "data_policy: augmentation would show one row several times" in told


def test_which_labels_a_node_has_is_not_told(tmp_path):
    """Without privacy a node of one label trains that label's row alone, and says so."""
    node = node_in(tmp_path)
    node.train.write_text("".join(json.dumps({"text": f"room {n}", "label": "a"}) + "\n" for n in range(ROWS)))
    node.evaluate.write_text('{"text": "room", "label": "a"}\n')
    plan = content() | {"objective": "classification", "data": {"max_length": 48, "labels": ["a", "b", "c"]}}
    work = node_round.train(asked(plan, 1, 1), node, Memory(RecordDict(), "f", node.state))
    assert not work.update.rows
