"""Several tasks, replayed rows and a probe at nodes and on one machine: every task is measured, and the guard ends a run."""

import json

import pytest

from client.node import Node, read_nodes
from client.round import training_rows
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.plan import Plan
from simulations.federation import federate
from simulations.single import train_alone
from strategies.base_model import find
from strategies.generation import answer
from strategies.job import Job


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rooms(count):
    return [{"input_text": f"Which room has number {n}?", "target_text": f"Room {n % 7}."} for n in range(count)]


def fees(count):
    return [{"input_text": f"What is the fee of plan {n}?", "target_text": f"{n} crowns"} for n in range(count)]


@pytest.fixture
def files(tmp_path):
    written(tmp_path / "rooms.jsonl", rooms(40))
    written(tmp_path / "fees.jsonl", fees(10))
    written(tmp_path / "fees-held.jsonl", fees(4))
    written(tmp_path / "general.jsonl", [{"text": f"Text {n} of the general kind."} for n in range(30)])
    return tmp_path


PLAN = {
    "lora": {"r": 4, "lora_alpha": 16},
    "data": {"max_length": 64, "temperature": 5.0, "replay_share": 0.25},
    "training": {"learning_rate": 5e-3, "batch_size": 4, "max_steps": 3},
}
TASKS = {"rooms": "rooms.jsonl", "fees": {"train": "fees.jsonl", "evaluate": "fees-held.jsonl"}}


def test_a_job_of_two_tasks_is_trained_and_measured_by_task(files):
    (files / "job.yaml").write_text(
        json.dumps(
            {
                **PLAN,
                "data": {**PLAN["data"], "tasks": TASKS, "replay": "general.jsonl"},
                "forgetting": {"probe": "general.jsonl", "max_rise": 9, "every": 2},
                "output": str(files / "out"),
            }
        )
    )
    from protocol.configuration import load

    record = train_alone(load(files / "job.yaml", Job).beside(files / "job.yaml"))
    (told,) = record.evaluation.values()
    assert {"loss", "rooms/loss", "rooms/accuracy", "fees/loss", "fees/accuracy"} <= told.keys()
    # 4 of 40 rooms and all of 4 held-out fees: the whole is the mean of its parts by rows.
    assert told["num-examples"] == 8
    assert told["accuracy"] == pytest.approx((4 * told["rooms/accuracy"] + 4 * told["fees/accuracy"]) / 8)
    assert min(told["rooms/loss"], told["fees/loss"]) <= told["loss"] <= max(told["rooms/loss"], told["fees/loss"])
    (trained,) = record.accepted.values()
    assert trained["forgetting-stopped"] == 0
    assert trained["forgetting-step"] == 3
    assert trained["forgetting-after"] != trained["forgetting-before"]


def test_a_job_that_forgets_too_much_leaves_the_last_state_within_the_bound(files):
    """A bound that the first look breaks: what is left is what training began with, and it is told.

    The probe is what the base answers by itself, which it can only unlearn.
    """
    asked = [row["input_text"] for row in fees(4)]
    answers = answer(Plan(), find("tiny"), asked, None, 16)
    probe = [{"input_text": q, "target_text": a} for q, a in zip(asked, answers, strict=True)]
    written(files / "probe.jsonl", probe)
    job = Job.model_validate(
        {
            **PLAN,
            "training": {**PLAN["training"], "learning_rate": 5e-2, "max_steps": 6},
            "data": {"max_length": 64, "train": files / "rooms.jsonl"},
            "forgetting": {"probe": files / "probe.jsonl", "max_rise": 1e-6, "every": 3},
            "output": files / "out",
        }
    )
    (told,) = train_alone(job).accepted.values()
    assert told["forgetting-stopped"] == 1
    assert told["forgetting-step"] == 0
    assert told["train-steps"] == 3
    adapter, _ = read_adapter(files / "out" / "adapter")
    assert all(abs(pair.product()).max() == 0 for pair in adapter.factors.values())


def test_nodes_of_a_federation_bring_tasks_replay_and_probe_of_their_own(files):
    """The plan says temperature, share and bound; what a node's tasks are called is in its own figures alone."""
    (files / "nodes.yaml").write_text(
        json.dumps(
            {
                "nodes": [
                    {"name": "bank", "tasks": TASKS, "replay": "general.jsonl", "probe": "general.jsonl"},
                    {"name": "clinic", "train": "rooms.jsonl"},
                ]
            }
        )
    )
    nodes = read_nodes(files / "nodes.yaml")
    assert nodes[0].tasks["fees"].evaluate == files / "fees-held.jsonl"
    federation = Federation.model_validate(
        {"plan": {**PLAN, "forgetting": {"max_rise": 9}}, "rounds": {"count": 2}, "output": files / "out"}
    )
    for record in federate(federation, nodes).rounds:
        assert "fees/loss" in record.evaluation["bank"]
        assert not any("/" in name for name in record.evaluation["clinic"])
        assert record.accepted["bank"]["forgetting-stopped"] == 0
        assert "forgetting-stopped" not in record.accepted["clinic"]


def test_replayed_rows_have_their_share_of_a_nodes_training_rows(files):
    node = Node(name="a", train=files / "rooms.jsonl", evaluate=files / "fees-held.jsonl", replay=files / "general.jsonl")
    rows = training_rows(Plan.model_validate(PLAN), node)
    assert sum("general" in repr(row) for row in rows) == round(40 / 3)
    assert len(rows) == 40 + round(40 / 3)


def test_a_node_config_of_flower_holds_tasks_as_text(files):
    """As --node-config gives it: what a node writes into its flat settings is what it reads."""
    node = Node(name="a", tasks={name: files / name for name in ("x.jsonl", "y.jsonl")})
    flat = node.model_dump(exclude_none=True)
    assert isinstance(flat["tasks"], str)
    assert Node.model_validate(flat) == node
    assert Node.model_validate({"tasks": "{x.jsonl: a.jsonl}"}).tasks["x.jsonl"].train.name == "a.jsonl"


@pytest.mark.parametrize("wrong", [{}, {"train": "a", "tasks": {"x": "b"}}, {"tasks": {"a/b": "c"}}])
def test_a_node_without_rows_or_with_two_kinds_of_them_is_refused(wrong):
    with pytest.raises(ValueError, match=r"train|tasks"):
        Node.model_validate({"name": "a", **wrong})
