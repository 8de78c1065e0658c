"""Two institutions, three rounds: a classifier's rounds improve, and so does a reward that each node's own function gives."""

import json
import sys

from client.node import Node
from protocol.federation import Federation
from simulations.federation import federate
from strategies.base_model import find
from strategies.data.formats import load
from strategies.evaluation.measure import measure

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def nodes_of(tmp_path, rows, **more):
    def written(name, part):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        return path

    return [
        Node(name=name, train=written(name, rows[at:-8:2]), evaluate=written(f"{name}-held", rows[-8:]), **more)
        for at, name in enumerate(("bank", "clinic"))
    ]


def test_three_rounds_of_a_classifier_improve(tmp_path):
    labels = ["fees", "rooms"]
    rows = [
        {"text": f"What is the fee of plan {n}?" if n % 2 else f"Which room has number {n}?", "label": labels[(n + 1) % 2]}
        for n in range(72)
    ]
    rows = [rows[at ^ (at // 2 % 2)] for at in range(len(rows))]  # each node has both labels
    training = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 4}
    content = {
        "objective": "classification",
        "lora": LORA,
        "data": {"labels": labels, "max_length": 32},
        "training": training,
    }
    federation = Federation.model_validate({"plan": content, "rounds": {"count": 3}, "output": tmp_path / "runs"})
    nodes = nodes_of(tmp_path, rows)
    base = measure(federation.plan, find("tiny"), load(nodes[0].evaluate, federation.plan))["loss"]
    losses = [sum(told["loss"] for told in record.evaluation.values()) / 2 for record in federate(federation, nodes).rounds]
    assert losses[-1] < losses[0] < base
    assert losses[-1] < 0.5 * base


def test_three_rounds_of_rl_raise_the_reward_of_a_rule(tmp_path, monkeypatch):
    """The reward is an answer's share of the letter e, as in the tests of rl on one machine; nodes allow the function."""
    (tmp_path / "rule_of_e.py").write_text(
        "def share(prompts, answers):\n    return [10 * answer.count('e') / max(1, len(answer)) for answer in answers]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rule_of_e", raising=False)
    rows = [{"prompt": f"Which room has number {n}?"} for n in range(40)]
    content = {
        "objective": "rl",
        "lora": LORA,
        "rl": {"reward_functions": ["rule_of_e:share"], "num_generations": 4, "max_completion_length": 8, "beta": 0.05},
        "data": {"max_length": 64},
        "training": {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 3},
    }
    federation = Federation.model_validate({"plan": content, "rounds": {"count": 3}, "output": tmp_path / "runs"})
    nodes = nodes_of(tmp_path, rows, reward_functions="rule_of_e:share")
    base = measure(federation.plan, find("tiny"), load(nodes[0].evaluate, federation.plan))["reward"]
    rewards = [sum(told["reward"] for told in record.evaluation.values()) / 2 for record in federate(federation, nodes).rounds]
    assert rewards[-1] > max(base, rewards[0])
