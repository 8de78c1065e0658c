"""A device in a round: it offers, trains and measures what a node with PyTorch does, and says why it refuses the rest."""

import json
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import RecordDict

from client import device
from client import round as node_round
from client.device_tier import narrowed, tier_of
from client.memory import Memory
from client.node import Node
from edge.runtime.adapting import budget
from edge.runtime.adapting.adapt import in_use
from edge.runtime.adapting.personal import Personal
from edge.runtime.adapting.schedule import SCHEDULES, share
from edge.runtime.manifest import parsed
from protocol.adapter import Adapter, Factors
from protocol.errors import (
    AdapterError,
    BaseMismatchError,
    BundleError,
    ConfigurationError,
    DataError,
    DivergenceError,
    ModelError,
    NotNowError,
    SignatureError,
)
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.product_space import trained_part
from protocol.records import Call, Received
from server.admission import check
from strategies.hardware import Hardware

PLAN = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "data": {"max_length": 64},
    "training": {"learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2},
}
GIB = 2**30


def plan_of(**changes):
    told = {key: dict(value) for key, value in PLAN.items()}
    for name, value in changes.items():
        told[name] = told[name] | value if isinstance(value, dict) and name in told else value
    return Plan.model_validate(told)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(numbers):
    return [{"input_text": f"Which room has number {n}?", "target_text": f"Room {n}, on the left."} for n in numbers]


def pairs(numbers):
    return [
        {"prompt": f"Which room has number {n}?", "chosen": f"Room {n}, on the left.", "rejected": "No idea."} for n in numbers
    ]


def memory():
    return Memory(RecordDict(), "f", None)


@pytest.fixture
def node(trainable_bundle, tmp_path):
    """A device with rows of its own."""
    train, held = written(tmp_path / "train.jsonl", questions(range(8))), written(tmp_path / "held.jsonl", questions((20, 21)))
    return Node(name="phone", train=train, evaluate=held, device=trainable_bundle[0], device_key=trainable_bundle[1])


def torch_of(node):
    """The same rows at a node with PyTorch."""
    return node.model_copy(update={"device": None, "device_key": None})


def call_of(plan, number=1, start=None, **more):
    told = {"federation": "f", "round": number, "rounds": 3, "plan": plan, "r": plan.lora.r}
    return Call(**told | {"digest": start.digest() if start else ""} | more)


@pytest.fixture(scope="module")
def drawn(trainable_bundle):
    """A global adapter of rank 6: more than nodes of rank 4 train."""
    rng = np.random.default_rng(0)
    modules = parsed((trainable_bundle[0] / "manifest.json").read_bytes()).lora
    factors = {
        module: Factors(rng.normal(0, 0.1, (6, d_in)).astype(np.float32), rng.normal(0, 0.02, (d_out, 6)).astype(np.float32))
        for module, (d_in, d_out) in modules.items()
        if module.rpartition(".")[2] in PLAN["lora"]["target_modules"]
    }
    return Adapter(factors)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_a_device_offers_the_adapter_that_a_node_with_pytorch_does(node, targets):
    call = call_of(plan_of(lora={"target_modules": targets}), 0)
    found, wanted = device.join(call, node), node_round.join(call, torch_of(node))
    assert found == wanted


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("more", [{}, {"trains": "B"}, {"trains": "A"}], ids=["both", "B", "A"])
def test_from_the_same_start_it_makes_the_update_that_pytorch_makes(node, drawn, tmp_path, more, schedule):
    """Oracle: ``client.round``, by Hugging Face's trainer. All rows are alike, so that their order is nothing; the second of
    three rounds has a place on the schedule, a climb, decay and accumulation. Where a gradient is all but zero Adam divides
    rounding by rounding, which a large epsilon keeps small; float32 in two orders of summation leaves 1e-4 of the change."""
    node = node.model_copy(update={"train": written(tmp_path / "alike.jsonl", questions([3]) * 8)})
    training = {"lr_scheduler_type": schedule, "max_steps": 3, "weight_decay": 0.01, "adam_epsilon": 1e-4}
    call = call_of(plan_of(training=training), 2, drawn, **more)
    received = Received(call, drawn)
    found, wanted = device.train(received, node, memory()), node_round.train(received, torch_of(node), memory())
    assert found.update.manifest == wanted.update.manifest
    assert found.metrics.keys() == wanted.metrics.keys()
    assert found.metrics["train-loss"] == pytest.approx(wanted.metrics["train-loss"], rel=1e-5)
    change = difference = 0.0
    for module, pair in wanted.update.adapter.factors.items():
        theirs, ours = pair.product(), found.update.adapter.factors[module].product()
        change += np.sum((theirs - trained_part(drawn, 4, fresh=False).factors[module].product()) ** 2)
        difference += np.sum((theirs - ours) ** 2)
    assert 0 < difference**0.5 <= 1e-4 * change**0.5


@pytest.mark.parametrize("objective", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_it_measures_what_a_node_with_pytorch_measures(node, drawn, tmp_path, objective):
    if objective == "dpo":
        node = node.model_copy(update={"evaluate": written(tmp_path / "pairs.jsonl", pairs((20, 21, 22)))})
        node = node.model_copy(update={"train": written(tmp_path / "more.jsonl", pairs(range(4)))})
    received = Received(call_of(plan_of(objective=objective), 1, drawn), drawn)
    found, count = device.evaluate(received, node, memory())
    wanted, rows = node_round.evaluate(received, torch_of(node), memory())
    assert (found.keys(), count) == (wanted.keys(), rows)
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("more", [{}, {"trains": "B"}, {"trains": "A"}, {"fresh": True}, {"r": 2}], ids=str)
def test_asked_again_it_sends_the_same_bits_and_the_coordinator_admits_them(node, drawn, more):
    offer = device.join(call_of(plan_of(), 0), node)
    call = call_of(plan_of(), 2, drawn, **more)
    received = Received(call, drawn)
    first, again = device.train(received, node, memory()), device.train(received, node, memory())
    assert first.update.adapter.digest() == again.update.adapter.digest()
    assert check(first.update, offer, call, received.trained()).norm > 1e-3
    assert first.metrics.keys() == {"train-loss", "train-steps"}


def test_rows_of_another_round_are_other_rows_and_training_lowers_the_loss(node):
    """From nothing: new directions are drawn, A at random and B zero, with the round's seed."""
    plan = plan_of(training={"max_steps": 1})
    first, other = (device.train(Received(call_of(plan, number), Adapter()), node, memory()) for number in (1, 2))
    assert first.update.adapter.digest() != other.update.adapter.digest()
    learnt = device.train(Received(call_of(plan_of(training={"max_steps": 6}), 1), Adapter()), node, memory()).update.adapter
    before, after = (
        device.evaluate(Received(call_of(plan, 2, adapter), adapter), node, memory())[0]["loss"]
        for adapter in (Adapter(), learnt)
    )
    assert after < 0.7 * before


REFUSED = {
    "method": {"method": "full"},
    "adalora": {"method": "adalora"},
    "objective": {"objective": "kto"},
    "training.packing": {"training": {"packing": True}},
    "training.example_privacy": {"training": {"example_privacy": {"epsilon": 8.0, "delta": 1e-5, "clipping_norm": 1.0}}},
    "training.proximal_mu": {"training": {"proximal_mu": 0.1}},
    "training.lr_scheduler_type": {"training": {"lr_scheduler_type": "polynomial"}},
    "training.optim": {"training": {"optim": "sgd"}},
    "lora.use_dora": {"lora": {"use_dora": True}},
    "lora.init_lora_weights": {"lora": {"init_lora_weights": "pissa"}},
    "lora.rank_pattern": {"lora": {"rank_pattern": {"q_proj": 2}}},
    "lora.modules_to_save": {"lora": {"modules_to_save": ["embed_tokens"]}},
    "dpo.loss_type": {"objective": "dpo", "dpo": {"loss_type": "ipo"}},
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_plan_that_no_device_can_carry_out_is_refused_by_its_settings_name(node, named):
    with pytest.raises(ConfigurationError, match=named if named != "adalora" else "method: found adalora"):
        device.join(call_of(plan_of(**REFUSED[named]), 0), node)


def test_what_a_device_leaves_out_is_said(node):
    more = {"lora": {"lora_dropout": 0.1}, "training": {"neftune_noise_alpha": 5.0, "eval_steps": 2}, "dropout": 0.1}
    found = device.choose(plan_of(**more), node)
    named = {"lora.lora_dropout", "training.neftune_noise_alpha", "training.eval_steps", "dropout"}
    assert found.reasons.keys() == named
    assert device.choose(plan_of(), node).reasons == {}


def test_what_the_bundle_cannot_is_refused_with_numbers(node, drawn, tmp_path):
    with pytest.raises(ModelError, match=r"1 of 2 are none of the \d+ modules"):
        device.join(call_of(plan_of(lora={"target_modules": ["q_proj", "embed_tokens"]}), 0), node)
    labelled = plan_of(objective="classification", data={"labels": ["a", "b"]})
    with pytest.raises(ModelError, match="needs a classifier, and the bundle is a decoder"):
        device.join(call_of(labelled, 0), node)
    with pytest.raises(DataError, match="training rows: none of 8 rows"):
        device.join(call_of(plan_of(data={"max_length": 3}), 0), node)
    other = Manifest(base_digest="ab" * 32, kind="global", round=1)
    with pytest.raises(BaseMismatchError):
        device.train(Received(call_of(plan_of(), 2, drawn, manifest=other), drawn), node, memory())
    wide = Adapter(
        {m: Factors(np.zeros((300, p.shape[1]), "f4"), np.zeros((p.shape[0], 300), "f4")) for m, p in drawn.factors.items()}
    )
    with pytest.raises(AdapterError, match="rank 300; expected 1 to 256"):
        device.train(Received(call_of(plan_of(), 2, wide), wide), node, memory())
    name, pair = next(iter(drawn.factors.items()))
    turned = Factors(np.zeros((2, pair.shape[0]), "f4"), np.zeros((pair.shape[1], 2), "f4"))
    for strange, said in (
        (Adapter({**drawn.factors, "model.nowhere": pair}), "1 parts of the adapter are none of the 10 modules"),
        (Adapter(drawn.factors, {"score.weight": np.zeros((2, 2), "f4")}), "1 parts of the adapter"),
        (Adapter({name: turned}), "changes a weight of shape"),
    ):
        with pytest.raises(AdapterError, match=said):
            device.train(Received(call_of(plan_of(), 2, strange), strange), node, memory())
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BundleError):
        device.join(call_of(plan_of(), 0), node.model_copy(update={"device": tmp_path / "nothing"}))


def test_a_bundle_that_another_key_signed_is_not_opened(node, tmp_path):
    from protocol.signature import make_key, write_public

    write_public(tmp_path / "other.pub", make_key().public_key())
    with pytest.raises(SignatureError):
        device.join(call_of(plan_of(), 0), node.model_copy(update={"device_key": tmp_path / "other.pub"}))


@pytest.mark.parametrize("given", [{"device": "b"}, {"device_key": "k"}, {"device_own": "o"}], ids=str)
def test_half_a_device_is_no_node(given):
    with pytest.raises(ValueError, match="device"):
        Node(train="rows.jsonl", **given)


def supplies(folder, charge, online):
    for name, told in {"BAT0": {"type": "Battery", "capacity": charge}, "AC": {"type": "Mains", "online": online}}.items():
        (folder / name).mkdir(parents=True)
        for file, value in told.items():
            (folder / name / file).write_text(str(value))
    return folder


@pytest.mark.parametrize(("charge", "online", "works"), [(19, 0, False), (19, 1, True), (21, 0, True)])
def test_a_low_battery_that_is_not_charging_says_not_now(node, tmp_path, monkeypatch, charge, online, works):
    """The system's files are told, as Linux lays them out."""
    monkeypatch.setattr(budget, "_POWER", supplies(tmp_path / "power", charge, online))
    plan = plan_of(training={"max_steps": 1})
    if works:
        assert device.join(call_of(plan, 0), node).r == 4
        return
    with pytest.raises(NotNowError, match="19 per cent and not charging; expected at least 20") as caught:
        device.join(call_of(plan, 0), node)
    assert caught.value.code == "not-now"
    with pytest.raises(NotNowError):
        device.train(Received(call_of(plan), Adapter()), node, memory())


@pytest.mark.parametrize(
    ("gib", "cores", "most", "tier", "rank", "batch"),
    [
        (64, 16, "large", "large", 32, (6, 2)),
        (64, 16, "small", "small", 8, (4, 3)),
        (8, 4, "large", "medium", 16, (6, 2)),
        (8, 2, "large", "small", 8, (4, 3)),
        (4, 8, "large", "small", 8, (4, 3)),
        (1, 8, "large", "micro", 4, (1, 12)),
    ],
)
def test_memory_and_cores_decide_rank_and_micro_batch_and_never_the_rows_of_a_step(
    monkeypatch, gib, cores, most, tier, rank, batch
):
    hardware = Hardware((), cores, gib * GIB, gib * GIB, 0)
    assert tier_of(hardware, most).name == tier
    node = Node(train="rows.jsonl", tier=most)
    monkeypatch.setattr(Node, "hardware", lambda self: hardware)
    wish = plan_of(lora={"r": 32}, training={"batch_size": 6})
    chosen, reasons = narrowed(wish, node, 256)
    assert (chosen.lora.r, (chosen.training.batch_size, chosen.training.gradient_accumulation_steps)) == (rank, batch)
    assert ("lora.r" in reasons, "training.batch_size" in reasons) == (rank < 32, batch[0] < 6)
    assert narrowed(wish, node, 3)[0].lora.r == 3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_rate_goes_as_transformers_has_it(kind):
    import torch
    from transformers import get_scheduler

    warmup, total = 3, 11
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    wanted = get_scheduler(kind, optimiser, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 2):
        assert share(kind, step, warmup, total) == pytest.approx(wanted.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        wanted.step()


def test_its_own_adapter_stays_on_the_device_and_is_better_there(node, drawn, tmp_path):
    """The update is that of a device that keeps none, to the bit."""
    own = node.model_copy(update={"device_own": tmp_path / "own"})
    received = Received(call_of(plan_of(), 2, drawn), drawn)
    plain, beside = device.train(received, node, memory()), device.train(received, own, memory())
    assert plain.update.adapter.digest() == beside.update.adapter.digest()
    manifest = parsed((node.device / "manifest.json").read_bytes())
    served, _ = in_use(node.device, manifest, own.device_own)
    whole = Received(call_of(plan_of(), 2, served), served)
    assert set(drawn.ranks().values()) == {6}
    assert max(served.ranks().values()) == 10
    assert device.evaluate(whole, node, memory())[0]["loss"] < device.evaluate(received, node, memory())[0]["loss"]
    device.train(received, own, memory())  # the next round goes on from it


@pytest.mark.parametrize(
    "training", [{"max_steps": 10**400}, {"batch_size": 10**6}, {"max_steps": None, "num_train_epochs": 1e300}]
)
def test_a_plan_that_would_exhaust_a_device_is_refused_before_anything_is_drawn(node, training):
    with pytest.raises(ConfigurationError, match="a device takes"):
        device.train(Received(call_of(plan_of(training=training)), Adapter()), node, memory())


def test_weights_that_are_no_numbers_never_leave(node, drawn):
    """The only step's loss is a number; what the step makes of the weights is none."""
    call = call_of(plan_of(training={"learning_rate": 1e38, "max_steps": 1}), 2, drawn)
    with np.errstate(all="ignore"), pytest.raises(DivergenceError, match="a weight is no number"):
        device.train(Received(call, drawn), node, memory())


def test_an_own_adapter_of_another_base_or_of_strange_facts_is_begun_anew(node, drawn, tmp_path):
    """The round goes on whatever lies in the device's own folder; a folder that is a file only costs the own adapter."""
    received = Received(call_of(plan_of(), 2, drawn), drawn)
    base = parsed((node.device / "manifest.json").read_bytes()).base_digest
    for at, facts in enumerate(({"base_digest": "00" * 32, "own-rank": 4}, {"base_digest": base, "own-rank": "x"})):
        folder = tmp_path / str(at)
        Personal(folder).keep(drawn, facts)
        device.train(received, node.model_copy(update={"device_own": folder}), memory())
        assert Personal(folder).current()[0].facts["own-rank"] == 4
        assert not list(folder.glob("training-*"))  # it came to its end
    (tmp_path / "file").touch()
    device.train(received, node.model_copy(update={"device_own": tmp_path / "file"}), memory())


ABSENT = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "accelerate", "datasets", "trl", "optimum")
ALONE = """
import importlib.abc, json, sys
from pathlib import Path

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from flwr.app import RecordDict
import client.app
from client import device
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.records import Call, Received
node, call = Node.model_validate_json(NODE), Call.model_validate_json(CALL)
memory = Memory(RecordDict(), "f", None)
offer = device.join(call.model_copy(update={"round": 0}), node, memory)
done = device.train(Received(call, Adapter()), node, memory)
device.evaluate(Received(call, Adapter()), node, memory)
print(json.dumps([done.update.adapter.digest(), sorted(name for name in ABSENT if name in sys.modules)]))
"""


def test_it_joins_trains_and_measures_where_there_is_no_torch(node):
    """The other process makes the same bits."""
    call = call_of(plan_of())
    told = f"ABSENT, NODE, CALL = {ABSENT!r}, {node.model_dump_json(exclude_defaults=True)!r}, {call.model_dump_json()!r}\n"
    done = subprocess.run([sys.executable, "-c", told + ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = device.train(Received(call, Adapter()), node, memory()).update.adapter.digest()
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, []]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A small base that classifies, and its bundle: the base's folder, the bundle's, its key's."""
    import torch
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from edge.make import Request, make_bundle
    from protocol.signature import write_public
    from strategies.base_model import find

    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(find("tiny").folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: at for at, label in enumerate(LABELS)}}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **shape, **labels)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    write_public(folder / "key.pub", key.public_key())
    made = make_bundle(Request(str(folder / "base"), folder / "bundle", key, profile="fp32", trainable=True))
    return str(folder / "base"), made, folder / "key.pub"


LABELS = ["billing", "other", "travel"]


@pytest.mark.slow
@pytest.mark.parametrize("own", [("billing", "travel"), tuple(LABELS)], ids=["two-of-three-labels", "all-labels"])
def test_a_classifier_s_head_trains_as_it_does_with_pytorch_and_only_in_rows_that_the_node_has(classifier, tmp_path, own):
    """Oracle: ``client.round``. A step takes all rows, so that their order is nothing; no dropout."""
    base, bundle, key = classifier
    rows = [{"text": f"This is about {label}, number {n}.", "label": label} for label in own for n in range(2)]
    train, held = written(tmp_path / "train.jsonl", rows), written(tmp_path / "held.jsonl", rows[:3])
    node = Node(train=train, evaluate=held, device=bundle, device_key=key)
    plan = Plan.model_validate(
        {
            "base_model": base,
            "objective": "classification",
            "lora": {"r": 2, "lora_alpha": 4},
            "dropout": 0.0,
            "head": {"learning_rate": 3e-2},
            "data": {"labels": LABELS, "max_length": 32},
            "training": {"batch_size": len(rows), "max_steps": 1, "adam_epsilon": 1e-4, "weight_decay": 0.01},
        }
    )
    call = call_of(plan, 2)
    assert device.join(call, node) == node_round.join(call, torch_of(node))
    received = Received(call, Adapter())
    found, wanted = device.train(received, node, memory()).update, node_round.train(received, torch_of(node), memory()).update
    assert found.manifest == wanted.manifest
    assert found.rows.keys() == wanted.rows.keys()
    assert all(np.array_equal(mask, wanted.rows[name]) for name, mask in found.rows.items())
    check(found, device.join(call, node), call, received.trained())
    for name, tensor in wanted.adapter.dense.items():
        assert np.abs(found.adapter.dense[name] - tensor).max() <= 1e-5
    told, theirs = (work.evaluate(received, own, memory())[0] for work, own in ((device, node), (node_round, torch_of(node))))
    assert theirs.keys() - told.keys() == {"macro-f1"}
    assert all(value == pytest.approx(theirs[name], abs=1e-5) for name, value in told.items())
    with pytest.raises(ModelError, match="not the same in the same order"):
        device.join(
            call.model_copy(
                update={"plan": plan.model_copy(update={"data": plan.data.model_copy(update={"labels": tuple(LABELS[::-1])})})}
            ),
            node,
        )
