"""Private rounds through a node's own ClientApp: a real model learns, and nothing is said beside."""

import json

import pytest

from client.app import app
from client.node import Node
from protocol.errors import FederationError
from protocol.federation import Federation
from protocol.records import METRICS, call_records, read_call, read_metrics
from server.rounds import run
from simulations.grid import InProcessGrid

PLAN = {
    "base_model": "tiny",
    "lora": {"r": 2, "target_modules": ["q_proj"]},
    "data": {"max_length": 16},
    "training": {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 2},
}


def configs_of(folder):
    """Three nodes with other counts of rows."""
    configs = []
    for at, count in enumerate((4, 9, 16)):
        path = folder / f"{at}.jsonl"
        path.write_text(
            "".join(json.dumps({"input_text": f"room {n}", "target_text": f"{n % 3}"}) + "\n" for n in range(count))
        )
        configs.append(
            {
                key.replace("_", "-"): value
                for key, value in Node(name=f"n{at}", train=path, trial=False)
                .model_dump(mode="json", exclude_none=True, exclude_defaults=True)
                .items()
            }
        )
    return configs


def federation(folder):
    return Federation.model_validate(
        {
            "plan": PLAN,
            "rounds": {"count": 2, "minimum_nodes": 3, "evaluate_every": 1, "retries": 0},
            "privacy": {"enabled": True, "epsilon": 100.0, "clipping_norm": 0.1},
            "aggregation": {"rank_cap": 4},
            "output": str(folder),
        }
    )


class Seen(InProcessGrid):
    def __init__(self, configs, before=lambda message: message):
        super().__init__(app, configs)
        self.replies, self.before = [], before

    def answer(self, message):
        reply = super().answer(self.before(message))
        self.replies.append((message.metadata.message_type, reply))
        return reply


def test_real_nodes_say_neither_counts_nor_metrics_and_are_not_asked_to_measure(tmp_path):
    grid = Seen(configs_of(tmp_path))
    outcome = run(grid, federation(tmp_path / "run"))
    assert len(outcome.rounds) == 2
    assert 99 < outcome.rounds[-1].privacy["epsilon"] <= 100
    assert "evaluate" not in {kind for kind, _ in grid.replies}
    updates = [reply for kind, reply in grid.replies if kind == "train"]
    assert len(updates) == 6
    for reply in updates:
        assert read_metrics(reply.content) == ({}, 1)
        assert set(reply.content[METRICS]) == {"num-examples"}


def test_a_node_that_is_promised_nodes_noise_sends_no_update_of_its_own(tmp_path):
    """The coordinator says that nodes add noise and asks for the update outside a secure sum, where none would."""

    def lied(message):
        if message.metadata.message_type == "train":
            received = read_call(message.content)
            promise = received.call.privacy.model_copy(update={"noise": "nodes"})
            records = call_records(received.call.model_copy(update={"privacy": promise}))
            for key in message.content.keys() - records.keys():
                records[key] = message.content[key]
            message.content = records
        return message

    with pytest.raises(FederationError, match="secure-sum"):
        run(Seen(configs_of(tmp_path), lied), federation(tmp_path / "run"))
