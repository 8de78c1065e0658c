"""Secure sums of what real models learn, through a node's own ClientApp: mixed ranks and precisions, a head, prompts."""

import json

import numpy as np
import pytest

from client.app import app
from client.node import Node
from protocol.errors import ConfigurationError, FederationError
from protocol.federation import Federation
from protocol.signature import make_key
from server.rounds import run
from simulations.federation import federate
from simulations.grid import InProcessGrid

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2}
SFT = {"base_model": "tiny", "lora": LORA, "data": {"max_length": 32}, "training": TRAINING}
CLASSIFIER = SFT | {"objective": "classification", "data": {"labels": ["a", "b", "nobody"], "max_length": 32}}
FULL = SFT | {"method": "full"}
PROMPTS = {key: value for key, value in SFT.items() if key != "lora"} | {"method": "prompt-tuning"}


def nodes_of(folder, plan, **more):
    """Three nodes: one of rank 8, one that holds its base at four bits, one of rank 2 with one label alone."""
    made = []
    for at, (name, own) in enumerate({"bank": {}, "clinic": {"tier": "small"}, "court": {"max_rank": 2}}.items()):
        if plan.get("objective") == "classification":
            rows = [{"text": f"Which room has number {n}?", "label": "a" if at == 2 else "ab"[n % 2]} for n in range(12)]
        else:
            rows = [{"input_text": f"Which room has number {n}?", "target_text": f"{at} {n % 5}."} for n in range(12)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(Node(name=name, train=path, **own | more))
    return made


def federation(folder, plan, secure):
    content = {
        "plan": plan,
        "rounds": {"count": 1, "minimum_nodes": 3, "evaluate_every": 0, "retries": 0},
        "aggregation": {"rank_cap": 16},
        "output": folder,
    }
    return Federation.model_validate(content | ({"secure_sum": {"enabled": True}} if secure else {}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "plan",
    [SFT, CLASSIFIER, pytest.param(PROMPTS, marks=pytest.mark.slow), pytest.param(FULL, marks=pytest.mark.slow)],
    ids=["decoder", "classifier", "prompts", "full"],
)
def test_a_secure_round_of_training_makes_the_adapter_of_an_open_one(tmp_path, plan):
    """The sum of all ranks is below the sketch's width: what is left is fixed point, 1.4e-8 a node, and factors in float32."""
    nodes = nodes_of(tmp_path, plan)
    found = federate(federation(tmp_path / "secure", plan, secure=True), nodes)
    wanted = federate(federation(tmp_path / "open", plan, secure=False), nodes)
    assert {name: offer.r for name, offer in found.offers.items()} == {name: offer.r for name, offer in wanted.offers.items()}
    assert len(found.rounds[0].accepted) == 3
    assert found.adapter.factors.keys() == wanted.adapter.factors.keys()
    assert found.adapter.dense.keys() == wanted.adapter.dense.keys()
    for module, pair in wanted.adapter.factors.items():
        product = pair.product()
        assert np.abs(found.adapter.factors[module].product() - product).max() <= 1e-5 * np.abs(product).max()
    for name, tensor in wanted.adapter.dense.items():
        assert np.abs(found.adapter.dense[name] - tensor).max() <= 1e-6 * max(1.0, np.abs(tensor).max())


def test_nothing_of_a_round_stays_on_a_node_s_disk_but_whose_sums_it_has_opened(tmp_path):
    nodes = nodes_of(tmp_path, SFT)
    federate(federation(tmp_path / "secure", SFT, secure=True), nodes)
    kept = [path for path in (tmp_path / "secure" / "node-state").rglob("*") if path.is_file()]
    numbers = [path for path in kept if path.name.startswith("issued")]  # of the newest message, by coordinator
    assert len(numbers) == 3
    kept = [path for path in kept if path not in numbers]
    assert len(kept) == 3
    for path in kept:
        assert path.name.startswith("secure-sum_past")
        assert path.stat().st_size < 1000
        assert b'"bank", "clinic", "court"' in path.read_bytes()


def configs(nodes):
    return [
        {key.replace("_", "-"): value if isinstance(value, int | str) else str(value) for key, value in own.items()}
        for own in (node.model_dump(exclude_none=True) for node in nodes)
    ]


def open_run(folder, nodes, *, secure, enrolled=None):
    return run(InProcessGrid(app, configs(nodes)), federation(folder, SFT, secure), enrolled=enrolled)


def test_a_node_that_takes_part_in_sums_alone_sends_no_update_of_its_own(tmp_path):
    nodes = nodes_of(tmp_path, SFT, trial=False, only_summed=True)
    with pytest.raises(FederationError, match="the node answered with an error: secure-sum"):
        open_run(tmp_path / "open", nodes, secure=False)


def test_a_node_without_a_key_takes_no_part_and_a_coordinator_without_a_list_does_not_begin(tmp_path):
    nodes = nodes_of(tmp_path, SFT, trial=False)
    known = {node.name: make_key().public_key() for node in nodes}
    with pytest.raises(FederationError, match="the node answered with an error: configuration"):
        open_run(tmp_path / "keyless", nodes, secure=True, enrolled=known)
    with pytest.raises(ConfigurationError, match=r"trust\.enrolled: missing"):
        open_run(tmp_path / "listless", nodes, secure=True)
