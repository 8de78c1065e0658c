"""Rows that models make, in a federation: each node has its own labelled or taught, by whom it allows."""

import json

import pytest
from chat_server import preferring, serving

from client.node import Node
from client.round import choose
from protocol.errors import ConfigurationError, FederationError
from protocol.federation import Federation
from simulations.federation import federate


def nodes(folder, row, **settings):
    made = []
    for at in range(2):
        paths = {name: folder / f"{name}-{at}.jsonl" for name in ("train", "evaluate")}
        for name, path in paths.items():
            numbers = range(at, 24, 2) if name == "train" else range(24 + at, 32, 2)
            path.write_text("".join(json.dumps(row(n)) + "\n" for n in numbers))
        made.append(Node(name=f"node-{at}", **paths, **settings))
    return made


def federation(folder, rounds=1, steps=2, **plan):
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    training = {"learning_rate": 4e-3, "batch_size": 4, "max_steps": steps, "lr_scheduler_type": "constant"}
    told = {"lora": lora, "data": {"max_length": 64}, "training": training, **plan}
    return Federation.model_validate({"plan": told, "rounds": {"count": rounds, "minimum_nodes": 2}, "output": folder / "run"})


def test_prompts_at_two_nodes_are_answered_judged_and_trained_on(tmp_path):
    with serving(preferring(len)) as chat:
        judge = {"endpoint": {"base_url": chat.url, "model": "m", "retries": 0}}
        asked = federation(tmp_path, objective="dpo", ai_feedback={"judge": judge, "max_new_tokens": 6})
        own = nodes(tmp_path, lambda n: {"prompt": f"Which room has number {n}?"}, endpoints=chat.url)
        outcome = federate(asked, own)
        assert len(chat.requests) > 40  # of both nodes, to train and to measure
    (record,) = (record for record in outcome.rounds if record.round == 1)
    assert sorted(record.accepted) == ["node-0", "node-1"]
    assert all("reward-accuracy" in told for told in record.evaluation.values())


def test_a_node_that_does_not_list_the_judge_does_not_join(tmp_path):
    judge = {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}}
    asked = federation(tmp_path, objective="dpo", ai_feedback={"judge": judge})
    own = nodes(tmp_path, lambda n: {"prompt": f"Which room has number {n}?"})
    with pytest.raises(ConfigurationError, match=r"endpoints: the plan names http://127.0.0.1:9/v1"):
        choose(asked.plan, own[0])
    with pytest.raises(FederationError):
        federate(asked, own)


def test_a_teacher_at_each_node_teaches_both(tmp_path):
    """The teacher is the base after supervised fine-tuning: what the students learn of it is what it was taught."""
    from protocol.files import write_adapter
    from protocol.manifest import Manifest
    from protocol.plan import Plan
    from strategies.base_model import find
    from strategies.data.formats import Conversation
    from strategies.training import fit

    def row(n):
        return {"input_text": f"Which room has number {n}?", "target_text": f"Room {n} is upstairs."}

    base = find("tiny")
    plan = Plan.model_validate({"lora": {"r": 4, "lora_alpha": 8}, "training": {"learning_rate": 1e-2, "max_steps": 20}})
    rows = [Conversation(({"role": "user", "content": row(n)["input_text"]},), row(n)["target_text"]) for n in range(24)]
    manifest = Manifest(base_digest=base.digest, kind="global", r=4, federation="x", round=1, parent="", num_examples=1)
    write_adapter(tmp_path / "teacher", fit(plan, base, rows).adapter, manifest, plan)
    teacher = {"base_model": "tiny", "adapter": str(tmp_path / "teacher")}
    asked = federation(
        tmp_path, rounds=2, steps=6, objective="distillation", distillation={"teacher": teacher, "hard_weight": 0.0}
    )
    outcome = federate(asked, nodes(tmp_path, row, models=f"tiny, {tmp_path / 'teacher'}"))
    found = [sum(told["perplexity"] for told in record.evaluation.values()) for record in outcome.rounds if record.evaluation]
    assert found[-1] < 0.5 * found[0]
