"""Two institutions, three rounds, with IA3, soft prompts, prefixes and deep prompts: what they make together is worth more."""

import json

import numpy as np
import pytest

from client.node import Node
from protocol.adapter import Adapter
from protocol.federation import Federation
from protocol.files import read_stored
from protocol.plan import Plan
from simulations.federation import federate
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.data.formats import load
from strategies.evaluation.measure import measure
from strategies.training import fit

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Of each method a rate at which a few steps show; prompts are few numbers and take large ones.
RATES = {"ia3": 3e-2, "prompt-tuning": 5e-2, "prefix-tuning": 5e-3, "p-tuning-v2": 5e-2}
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("ia3", "prompt-tuning", "p-tuning-v2")]


def written(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(nodes, tmp_path, plan):
    """The federation's outcome, and the mean held-out loss of the base and after each round."""
    federation = Federation.model_validate({"name": "fed", "plan": plan, "rounds": {"count": 3}, "output": tmp_path / "runs"})
    outcome = federate(federation, nodes)
    # What the base was worth: the nodes' own measure, with nothing attached.
    base = [measure(federation.plan, find(plan["base_model"]), load(n.evaluate, federation.plan))["loss"] for n in nodes]
    losses = [[measured["loss"] for measured in record.evaluation.values()] for record in outcome.rounds]
    assert all(len(each) == len(nodes) for each in losses)
    return outcome, [float(np.mean(each)) for each in (base, *losses)]


@pytest.mark.parametrize("method", ["prefix-tuning", *SLOW])
def test_a_decoder_learns_over_rounds_and_its_folder_answers_as_its_adapter(tmp_path, method):
    nodes = []
    for name, thing in (("bank", "vault"), ("clinic", "ward")):
        rows = [{"input_text": f"Which {thing} has number {n}?", "target_text": f"Number {n % 5}."} for n in range(40)]
        home = tmp_path / name
        nodes.append(
            Node(name=name, train=written(home / "train.jsonl", rows[:30]), evaluate=written(home / "held.jsonl", rows[30:]))
        )
    plan = {
        "base_model": "tiny",
        "method": method,
        "data": {"max_length": 64},
        "training": {"learning_rate": RATES[method], "batch_size": 4, "max_steps": 5},
    }
    outcome, losses = run(nodes, tmp_path, plan)
    assert losses[3] < losses[1] < losses[0], losses
    assert losses[3] < 0.8 * losses[0], losses
    assert not outcome.adapter.factors
    stored = read_stored(tmp_path / "runs" / "adapter", base_digest=find("tiny").digest)
    assert stored.adapter.digest() == outcome.adapter.digest()
    assert stored.settings["method"] == method
    found, wanted = (
        with_adapter(used, find("tiny"), adapter)[0](input_ids=_ids()).logits
        for used, adapter in ((stored.on(Plan()), stored.adapter), (Plan.model_validate(plan), outcome.adapter))
    )
    assert bool((found == wanted).all())


def _ids():
    import torch

    return torch.tensor([[5, 9, 200, 31]])


@pytest.mark.slow
@pytest.mark.parametrize("method", RATES)
def test_an_encoder_learns_over_rounds_though_its_nodes_have_labels_of_their_own(data, encoder, tmp_path, method):
    every = [json.loads(line) for line in (data / "classify" / "snips_train.jsonl").read_text().splitlines()]
    labels = sorted({row["label"] for row in every})
    nodes = []
    for at, name in enumerate(("bank", "clinic")):
        rows = [row for row in every if row["label"] in labels[at * 3 : at * 3 + 4]][:: len(every) // 150]
        home = tmp_path / name
        nodes.append(
            Node(name=name, train=written(home / "train.jsonl", rows[::2]), evaluate=written(home / "held.jsonl", rows[1::2]))
        )
    plan = {
        "base_model": encoder,
        "objective": "classification",
        "method": method,
        "head": {"init": "label-names"},
        "data": {"max_length": 64, "labels": labels},
        "training": {"learning_rate": RATES[method], "batch_size": 8, "max_steps": 8},
    }
    outcome, losses = run(nodes, tmp_path, plan)
    assert losses[3] < losses[1], losses
    assert losses[3] < 0.9 * losses[0], losses
    assert {"classifier.weight", "classifier.bias"} <= outcome.adapter.dense.keys()


def test_a_round_that_is_sent_a_prefix_begins_at_it(tmp_path):
    """With a rate of nothing the second round ends where it began: at what was sent, not at the network's own draw."""
    plan = Plan.model_validate(
        {
            "method": "prefix-tuning",
            "prompt": {"num_virtual_tokens": 4},
            "data": {"max_length": 64},
            "training": {"learning_rate": 1e-30, "batch_size": 2, "max_steps": 1},
        }
    )
    rows = load(written(tmp_path / "rows.jsonl", [{"input_text": "a", "target_text": "b"}] * 2), plan)
    drawn = fit(plan, find("tiny"), rows).adapter.dense["prompt_embeddings"]
    sent = np.random.default_rng(0).standard_normal(drawn.shape).astype(np.float32)
    found = fit(plan, find("tiny"), rows, start=Adapter({}, {"prompt_embeddings": sent})).adapter.dense["prompt_embeddings"]
    # sent - f + f: two roundings of 6e-8 of numbers up to 4.
    np.testing.assert_allclose(found, sent, rtol=0, atol=1e-6)
    assert np.abs(drawn - sent).max() > 1.0
