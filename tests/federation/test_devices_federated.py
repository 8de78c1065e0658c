"""GPU nodes and devices in one federation: each learns, the sums stay closed, and what a device cannot do now ends no round."""

import json
import shutil

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import device
from client import round as node_round
from client.memory import Memory
from client.node import Node
from edge.make import requantise
from edge.runtime.adapting import budget
from protocol.adapter import Adapter
from protocol.errors import FederationError
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.records import Call, Received
from simulations.federation import federate

PLAN = {
    "base_model": "tiny",
    "lora": {"r": 4, "lora_alpha": 8},
    "data": {"max_length": 64},
    "training": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 4},
}


@pytest.fixture(scope="module")
def smaller(trainable_bundle, tmp_path_factory):
    """The same bundle in 8 bits; the key is that of the fixture ``trainable_bundle``."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    return requantise(trainable_bundle[0], "q8", tmp_path_factory.mktemp("smaller") / "q8", key)


def nodes_of(folder, phone, kiosk, key):
    """Two nodes with PyTorch and two devices, each with the rooms of its own house."""
    made = []
    for at, (name, bundle) in enumerate({"bank": None, "clinic": None, "phone": phone, "kiosk": kiosk}.items()):
        home = folder / name
        home.mkdir(parents=True)
        for file, numbers in (("train", range(10)), ("held", range(10, 13))):
            rows = [
                {"input_text": f"Which room of the {name} has number {n}?", "target_text": f"Room {n}, floor {at}."}
                for n in numbers
            ]
            (home / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"device": bundle, "device_key": key} if bundle else {}
        made.append(Node(name=name, train=home / "train.jsonl", evaluate=home / "held.jsonl", **own))
    return made


def federation(folder, **more):
    content = {
        "name": "mixed",
        "plan": PLAN,
        "rounds": {"count": 3, "minimum_nodes": 4, "retries": 0, "evaluate_every": 0},
        "aggregation": {"rank_cap": 16},
        "output": str(folder),
    }
    return Federation.model_validate(content | more)


def loss(node, adapter):
    """On the rows that it holds out, as it measures itself."""
    from flwr.app import RecordDict

    call = Call(federation="mixed", round=3, rounds=3, plan=federation("x").plan, r=4, digest=adapter.digest())
    work = device if node.device else node_round
    return work.evaluate(Received(call, adapter), node, Memory(RecordDict(), "mixed", None))[0]["loss"]


@pytest.mark.slow
def test_two_gpu_nodes_and_two_devices_learn_together_in_the_open_and_under_a_secure_sum(tmp_path, trainable_bundle, smaller):
    """In the first round the ranks of all nodes fit into the sketch: the sum errs by fixed point alone, and factors by float32.
    Later on a node's change has twice its rank, and the sketch is near and not equal."""
    nodes = nodes_of(tmp_path / "homes", trainable_bundle[0], smaller, trainable_bundle[1])
    opened = federate(federation(tmp_path / "open"), nodes)
    summed = federate(federation(tmp_path / "summed", secure_sum={"enabled": True}), nodes)
    assert {name: (offer.method, offer.precision) for name, offer in opened.offers.items()} == {
        "bank": ("lora", "fp32"),
        "clinic": ("lora", "fp32"),
        "phone": ("lora", "fp32"),
        "kiosk": ("qlora", "int8"),
    }
    for outcome in (opened, summed):
        assert [sorted(record.accepted) for record in outcome.rounds] == [["bank", "clinic", "kiosk", "phone"]] * 3
        for node in nodes:
            assert loss(node, outcome.adapter) < 0.6 * loss(node, Adapter())
    first, other = (read_adapter(tmp_path / kind / "rounds" / "0001")[0] for kind in ("open", "summed"))
    for module, pair in first.factors.items():
        product = pair.product()
        assert np.abs(other.factors[module].product() - product).max() <= 1e-5 * np.abs(product).max()


def test_a_device_with_a_low_battery_stays_away_and_the_others_go_on(tmp_path, trainable_bundle, monkeypatch):
    power = tmp_path / "power" / "BAT0"
    power.mkdir(parents=True)
    (power / "type").write_text("Battery")
    (power / "capacity").write_text("50")
    monkeypatch.setattr(budget, "_POWER", tmp_path / "power")
    bank, _, phone, kiosk = nodes_of(tmp_path / "homes", *[trainable_bundle[0]] * 2, trainable_bundle[1])
    tired = phone.model_copy(update={"device_battery": 60.0})
    rounds = {"count": 1, "minimum_nodes": 2, "retries": 0, "evaluate_every": 0}
    outcome = federate(federation(tmp_path / "runs", rounds=rounds), [bank, tired, kiosk])
    assert sorted(outcome.rounds[0].accepted) == ["bank", "kiosk"]
    assert "not-now" in (tmp_path / "runs" / "events.jsonl").read_text()
    with pytest.raises(FederationError):
        federate(federation(tmp_path / "few", rounds=rounds | {"minimum_nodes": 3}), [bank, tired, kiosk])
    shutil.rmtree(tmp_path / "few", ignore_errors=True)
