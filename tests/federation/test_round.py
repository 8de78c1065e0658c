"""Whole federations in one process on a real tiny decoder: mixed ranks, nodes that fail, fresh rows, what is kept and sent."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from flwr.app import MessageType, RecordDict

from client import round as node_round
from client.app import app
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.errors import FederationError
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.records import Call, Received
from server.rounds import run
from simulations.federation import federate
from simulations.grid import InProcessGrid
from strategies.base_model import find
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure, with_adapter
from strategies.methods.registry import shape

CANARY = "Zanzibar-4711"
LABELS = ["a", "b", "c", "d", "nobody"]


@pytest.fixture(scope="module")
def stories(data):
    return str(data / "models" / "stories260k-hf")


@pytest.fixture
def nodes(data, tmp_path):
    """Two institutions with rows of their own: a large one, and a small one that holds its base at four bits."""
    every = (data / "instruct" / "gsm8k_train.jsonl").read_text(encoding="utf-8").strip().split("\n")
    lines = [line for line in every if len(json.loads(line)["instruction"]) < 140]  # questions well below max_length
    made = []
    for at, name in enumerate(("bank", "clinic")):
        home = tmp_path / name
        home.mkdir()
        (home / "train.jsonl").write_text("\n".join(lines[at * 20 : at * 20 + 12]) + "\n", encoding="utf-8")
        (home / "held.jsonl").write_text("\n".join(lines[100 + at * 3 : 103 + at * 3]) + "\n", encoding="utf-8")
        tier = "small" if at else "large"
        made.append(
            Node(name=name, train=home / "train.jsonl", evaluate=home / "held.jsonl", tier=tier, max_rank=4 if at else None)
        )
    return tuple(made)


@pytest.fixture
def published(stories, tmp_path):
    """A federation of two rounds of two steps; keywords change its rounds."""

    def make(plan=None, aggregation=None, **rounds):
        content = {
            "base_model": stories,
            "lora": {"r": 12, "lora_alpha": 24},
            "data": {"max_length": 160},
            "training": {"learning_rate": 5e-3, "batch_size": 2, "max_steps": 2},
        }
        return Federation.model_validate(
            {
                "name": "fed",
                "plan": content | (plan or {}),
                "rounds": {"count": 2, "evaluate_every": 0} | rounds,
                "aggregation": {"rank_cap": 32} | (aggregation or {}),
                "output": tmp_path / "runs",
            }
        )

    return make


class Listening(InProcessGrid):
    """Keeps every reply that crosses it; a node may live in a folder of its own, and something may happen before a message."""

    def __init__(self, configs, homes=None, before=lambda message: None):
        super().__init__(app, configs)
        self.replies, self.homes, self.before = [], homes or {}, before

    def answer(self, message):
        self.before(message)
        with contextlib.chdir(self.homes.get(message.metadata.dst_node_id, ".")):
            reply = super().answer(message)
        self.replies.append(reply)
        return reply


def configs(nodes):
    return [
        {key.replace("_", "-"): value if isinstance(value, int | str) else str(value) for key, value in own.items()}
        for own in (node.model_dump(exclude_none=True) for node in nodes)
    ]


def everything_in(reply):
    """All that a reply says, as bytes."""
    if reply.has_error():
        return f"{reply.error.code} {reply.error.reason} {reply.metadata}".encode()
    said = repr(reply.metadata).encode()
    for key, record in reply.content.items():
        said += key.encode()
        for name, value in record.items():
            said += f"{name} ".encode() + (value.data if hasattr(value, "data") else repr(value).encode())
    return said


def products(adapter):
    return {module: pair.product() for module, pair in adapter.factors.items()}


def largest_difference(one, other):
    left, right = products(one), products(other)
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def ask(federation, node, number=1, adapter=None):
    """What one node does with one round, by its own code, asked outside any federation."""
    call = Call(
        federation=federation.name,
        round=number,
        rounds=federation.rounds.count,
        plan=federation.plan,
        r=node_round.choose(federation.plan, node).chosen.lora.r,
        digest=(adapter or Adapter()).digest(),
    )
    return node_round.train(Received(call, adapter or Adapter()), node, Memory(RecordDict(), federation.name, None))


# Mixed ranks and precisions -------------------------------------------------------------------------------------------


def test_nodes_of_different_ranks_and_precisions_make_one_adapter_that_helps_both(nodes, published):
    federation = published()
    outcome = federate(federation, nodes)
    assert {name: (o.method, o.precision, o.r) for name, o in outcome.offers.items()} == {
        "bank": ("lora", "fp32", 12),
        "clinic": ("qlora", "nf4", 4),
    }
    assert [sorted(record.accepted) for record in outcome.rounds] == [["bank", "clinic"]] * 2
    assert not any(record.refused for record in outcome.rounds)
    assert 12 < max(outcome.adapter.ranks().values()) <= 32
    base, plan = find(federation.plan.base_model), federation.plan
    for node in nodes:
        rows = load_rows(node.evaluate, plan)
        assert measure(plan, base, rows, outcome.adapter)["loss"] < measure(plan, base, rows)["loss"]


def test_the_first_round_is_the_mean_of_what_each_node_alone_would_send(nodes, published):
    federation = published(count=1)
    outcome = federate(federation, nodes)
    alone = [ask(federation, node).update for node in nodes]
    weights = [update.manifest.num_examples for update in alone]
    for module, found in products(outcome.adapter).items():
        wanted = sum(w * update.adapter.factors[module].product() for w, update in zip(weights, alone, strict=True)) / sum(
            weights
        )
        assert np.abs(found - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-3)


def test_a_federation_can_be_repeated_to_the_bit(nodes, published):
    federation = published(count=1)
    assert federate(federation, nodes).adapter.digest() == federate(federation, nodes).adapter.digest()


def test_the_rank_cap_holds(nodes, published):
    outcome = federate(published(aggregation={"rank_cap": 5}, count=1), nodes)
    assert max(outcome.adapter.ranks().values()) == 5
    assert outcome.rounds[-1].merge["discarded_energy"] > 0


def test_fp16_on_the_wire_halves_the_bytes_and_hardly_moves_the_adapter(nodes, published):
    full, half = federate(published(count=1), nodes[:1]), federate(published(count=1, wire="fp16"), nodes[:1])
    assert half.rounds[0].bytes_received / full.rounds[0].bytes_received == pytest.approx(0.5, abs=0.02)  # and headers
    scale = max(float(np.abs(product).max()) for product in products(full.adapter).values())
    assert 0 < largest_difference(full.adapter, half.adapter) <= 2e-3 * scale


# Nodes that cannot take part, or fail ---------------------------------------------------------------------------------


def test_a_node_that_holds_another_base_is_left_out_with_the_reason_and_the_rest_goes_on(nodes, published, stories, tmp_path):
    for at, name in enumerate(("bank", "clinic", "stranger")):
        shutil.copytree(stories, tmp_path / name / "base", copy_function=shutil.copyfile)
        if at == 2:
            weights = tmp_path / name / "base" / "model.safetensors"
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    everyone = (*nodes, nodes[0].model_copy(update={"name": "stranger"}))
    homes = {at: tmp_path / node.name for at, node in enumerate(everyone, 1)}
    federation = published({"base_model": "./base"}, count=1)
    outcome = run(Listening(configs(everyone), homes), federation)
    assert list(outcome.left_out) == ["stranger"]
    assert "another base model" in outcome.left_out["stranger"]
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic"]
    facts = json.loads((federation.output / "federation.json").read_text())
    assert facts["left_out"] == dict(outcome.left_out)


def test_a_node_without_data_is_left_out_and_the_rest_goes_on(nodes, published):
    poor = nodes[0].model_copy(update={"name": "poor", "train": nodes[0].train.with_name(f"{CANARY}.jsonl")})
    grid = Listening(configs([*nodes, poor]))
    outcome = run(grid, published(count=1))
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic"]
    assert list(outcome.left_out.values()) == ["the node answered with an error: data"]
    assert not any(CANARY.encode() in everything_in(reply) for reply in grid.replies)


def spoil(kind, node):
    """Makes the node's next round fail, with the canary where an exception would quote it."""
    if kind == "a row without its answer":
        node.train.write_text(json.dumps({"input_text": CANARY, CANARY: CANARY}) + "\n")
    elif kind == "a row that a library chokes on":
        node.train.write_text(json.dumps({"input_text": f"{CANARY} \ud800", "target_text": CANARY}) + "\n")
    elif kind == "a file that is gone":
        node.train.unlink()
    elif kind == "a path that cannot be written":
        node.folder.parent.mkdir(exist_ok=True)
        node.folder.write_text("a file where a folder should be")
    else:
        node.state.write_text("a file where a folder should be")


@pytest.mark.parametrize(
    "kind",
    [
        "a row without its answer",
        "a row that a library chokes on",
        "a file that is gone",
        "a path that cannot be written",
        "a memory that is a file",
    ],
)
def test_a_node_that_fails_ends_no_round_and_nothing_of_its_own_is_in_any_reply(nodes, published, tmp_path, kind):
    home = tmp_path / CANARY
    home.mkdir()
    own = {"train": home / "train.jsonl", "folder": home / "logs" / "x", "state": home / "memory"}
    shutil.copyfile(nodes[1].train, own["train"])
    failing = nodes[1].model_copy(update=own)
    done = []

    def before(message):
        if message.metadata.message_type == MessageType.TRAIN and not done:
            spoil(kind, failing) if kind != "a path that cannot be written" else (home / "logs").write_text("a file")
            done.append(kind)

    grid = Listening(configs([nodes[0], failing]), before=before)
    outcome = run(grid, published(count=1))
    for record in outcome.rounds:
        assert list(record.accepted) == ["bank"]
        assert list(record.silent) == ["clinic"]
        assert record.silent["clinic"].startswith("the node answered with an error: ")
    errors = [reply for reply in grid.replies if reply.has_error()]
    assert errors
    assert all(reply.error.reason in ("data", "internal", "configuration", "model") for reply in errors)
    assert not any(CANARY.encode() in everything_in(reply) for reply in grid.replies)
    assert not any(str(tmp_path).encode() in everything_in(reply) for reply in grid.replies)


def test_rows_that_do_train_are_in_no_reply_as_text(nodes, published):
    row = {"input_text": f"Who is {CANARY}?", "target_text": CANARY}
    nodes[0].train.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    grid = Listening(configs(nodes))
    run(grid, published(count=1))
    assert not any(CANARY.encode() in everything_in(reply) for reply in grid.replies)


def test_too_few_nodes_is_a_federation_error_with_every_reason(nodes, published):
    for node in nodes:
        node.train.unlink()
    with pytest.raises(FederationError, match=r"0 node\(s\) can take part, 2 are needed .*node-1.*data.*node-2"):
        federate(published(minimum_nodes=2), nodes)


# Fresh rows -----------------------------------------------------------------------------------------------------------


def test_every_round_takes_the_rows_after_those_of_the_round_before(nodes, published, monkeypatch):
    """Oracle: the rows themselves, as the training is given them; twelve rows in three rounds of four are each taken once."""
    taken = []
    monkeypatch.setattr(node_round, "fit", lambda plan, base, rows, *args, **kwargs: taken.append(rows) or 1 / 0)
    for number in (1, 2, 3):
        with pytest.raises(ZeroDivisionError):
            ask(published(count=3), nodes[0], number)
    assert [len(rows) for rows in taken] == [4, 4, 4]
    assert len({repr(row) for rows in taken for row in rows}) == 12


def test_what_is_trained_depends_on_the_round_and_only_on_it(nodes, published):
    federation = published()
    first, again, later = (ask(federation, nodes[0], number) for number in (1, 1, 2))
    assert first.update.adapter.digest() == again.update.adapter.digest()
    assert first.update.adapter.digest() != later.update.adapter.digest()
    assert first.update.manifest.num_examples == 4


def test_a_node_that_failed_once_goes_on_with_the_next_round(nodes, published):
    kept, after = nodes[1].train.read_text(), []

    def watch(record):
        after.append(sorted(record.accepted))
        nodes[1].train.write_text("{}\n" if record.round == 1 else kept)

    federate(published(count=3), nodes, watch)
    assert after == [["bank", "clinic"], ["bank"], ["bank", "clinic"]]


def test_rows_that_are_too_long_hold_a_node_up_for_no_longer_than_their_turn(nodes, published):
    rows = [{"input_text": "long " * 400 if at < 2 else "Hi", "target_text": "Yes"} for at in range(4)]
    nodes[1].train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nodes = (nodes[0], nodes[1].model_copy(update={"tier": "large"}))
    plan = {"training": {"batch_size": 1, "max_steps": 1}, "data": {"max_length": 512}}
    outcome = federate(published(plan, count=4), nodes)
    assert all("clinic" in record.accepted for record in outcome.rounds), "it reads on to a row that it can train on"


# The schedule, stages, several adapters -------------------------------------------------------------------------------


def test_stages_follow_each_other_with_plans_of_their_own_and_one_adapter(nodes, published):
    federation = published()
    quick = federation.plan.model_copy(update={"training": federation.plan.training.model_copy(update={"max_steps": 1})})
    stages = [{"name": "long", "rounds": 2, "plan": federation.plan}, {"name": "short", "rounds": 1, "plan": quick}]
    content = federation.model_dump(exclude={"plan": True, "rounds": {"count"}})
    content |= {"stages": [{**s, "plan": s["plan"].model_dump()} for s in stages]}
    grid = Listening(configs(nodes))
    outcome = run(grid, Federation.model_validate(content))
    steps = [record.accepted["bank"]["train-steps"] for record in outcome.rounds]
    assert steps == [2, 2, 1]
    assert [(record.round, record.stage) for record in outcome.rounds] == [(1, "long"), (2, "long"), (3, "short")]


def test_a_stages_schedule_begins_anew_with_the_stage(nodes, published):
    """Oracle: the same rounds with the stage's first round said to be the first of all are the same training."""
    federation = published(count=4)
    call = {"federation": "fed", "plan": federation.plan, "r": 12, "digest": Adapter().digest()}

    def trained(**where):
        received = Received(Call(**call, **where), Adapter())
        return node_round.train(received, nodes[0], Memory(RecordDict(), "fed", None)).update.adapter.digest()

    assert trained(round=3, first=3, rounds=4) != trained(round=3, first=1, rounds=4)
    assert trained(round=3, first=3, rounds=4) == trained(round=3, first=3, rounds=4)


def test_several_adapters_are_each_merged_over_the_nodes_that_name_them(nodes, published):
    bank, clinic = (node.model_copy(update={"adapter": name}) for node, name in zip(nodes, ("money", "health"), strict=True))
    stranger = nodes[0].model_copy(update={"name": "stranger", "adapter": "law"})
    plan = published().plan.model_dump()
    federation = Federation.model_validate(
        published(count=2).model_dump(exclude={"plan"}) | {"adapters": {"money": plan, "health": plan}}
    )
    outcome = run(Listening(configs([bank, clinic, stranger])), federation)
    assert sorted(outcome.kept) == ["health", "money"]
    by_adapter = {record.adapter: sorted(record.accepted) for record in outcome.rounds}
    assert by_adapter == {"money": ["bank"], "health": ["clinic"]}
    assert list(outcome.left_out.values()) == ["the node answered with an error: configuration"]
    for name, node in (("money", nodes[0]), ("health", nodes[1])):
        alone = federate(published(count=2).model_copy(update={"name": f"alone-{name}"}), [node])
        merged, manifest = read_adapter(federation.output / "adapters" / name)
        assert merged.digest() == outcome.kept[name].adapter.digest()
        assert manifest.num_examples == alone.manifest.num_examples


# Classification with label sets that differ ---------------------------------------------------------------------------


@pytest.fixture
def disjoint(tmp_path):
    """Two nodes that share no label, and one label that nobody has."""
    words = {"a": "dog", "b": "cat", "c": "tree", "d": "boat"}
    made = []
    for name, own in (("left", "ab"), ("right", "cd")):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": f"the {words[label]} number {at}", "label": label} for at in range(6) for label in own]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(Node(name=name, train=path, evaluate=path))
    return tuple(made)


def classification(published, **rounds):
    return published({"objective": "classification", "data": {"labels": LABELS}}, **rounds)


def test_a_row_of_the_head_is_merged_from_the_nodes_that_have_its_label_alone(disjoint, published):
    federation = classification(published, count=1)
    outcome = federate(federation, disjoint)
    left, right = (ask(federation, node).update for node in disjoint)
    for name, head in outcome.adapter.dense.items():
        assert head.shape[0] == len(LABELS)
        assert np.allclose(head[:2], left.adapter.dense[name][:2], atol=1e-6)
        assert np.allclose(head[2:4], right.adapter.dense[name][2:4], atol=1e-6)


def test_what_a_node_says_it_trained_are_the_rows_of_its_labels(disjoint, published):
    federation = classification(published, count=1)
    for node, wanted in zip(disjoint, ([1, 1, 0, 0, 0], [0, 0, 1, 1, 0]), strict=True):
        update = ask(federation, node).update
        assert update.rows.keys() == update.adapter.dense.keys()
        assert all(mask.astype(int).tolist() == wanted for mask in update.rows.values())


def test_a_row_that_nobody_trained_stays_as_it_began(disjoint, published):
    federation = classification(published, count=1)
    fresh = with_adapter(federation.plan, find(federation.plan.base_model), None)[0].score.weight.detach().numpy()
    outcome = federate(federation, disjoint)
    assert np.allclose(outcome.adapter.dense["score.weight"][4], fresh[4], atol=1e-6)


def test_rows_of_labels_that_no_accepted_node_has_do_not_move_in_later_rounds(disjoint, published):
    federation, kept = classification(published, count=2), disjoint[1].train.read_text()
    heads = []

    def watch(record):
        heads.append(read_adapter(federation.output / "adapter")[0].dense["score.weight"])
        disjoint[1].train.write_text("{}\n")

    outcome = federate(federation, disjoint, watch)
    disjoint[1].train.write_text(kept)
    assert list(outcome.rounds[1].accepted) == ["left"]
    assert np.array_equal(heads[0][2:], heads[1][2:])
    assert not np.array_equal(heads[0][:2], heads[1][:2])


# What is kept ---------------------------------------------------------------------------------------------------------


def test_every_round_is_on_disk_and_plain_peft_loads_it(nodes, published, stories):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    federation = published()
    outcome = federate(federation, nodes)
    folders = sorted((federation.output / "rounds").iterdir())
    assert [folder.name for folder in folders] == ["0001", "0002"]
    for folder, record in zip(folders, outcome.rounds, strict=True):
        adapter, manifest = read_adapter(folder)
        assert (manifest.round, manifest.kind, manifest.federation) == (record.round, "global", "fed")
        told = json.loads((folder / "round.json").read_text())
        assert told["accepted"].keys() == record.accepted.keys()
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stories, dtype="float32"), str(folder))
        for module, product in products(adapter).items():
            delta = plain.get_submodule(f"base_model.model.{module}").get_delta_weight("default").detach().numpy()
            assert np.abs(delta - product).max() <= 1e-6
    newest, _ = read_adapter(federation.output / "adapter")
    assert newest.digest() == outcome.adapter.digest() == read_adapter(folders[-1])[0].digest()
    assert not [path for path in federation.output.rglob("*") if path.name.startswith(".")], "a draft was left behind"


def test_a_classifiers_round_loads_in_plain_peft_with_its_head(disjoint, published, stories):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    federation = classification(published, count=1)
    outcome = federate(federation, disjoint)
    model = AutoModelForSequenceClassification.from_pretrained(stories, num_labels=len(LABELS), dtype="float32")
    plain = PeftModel.from_pretrained(model, str(federation.output / "adapter"))
    head = plain.get_submodule("base_model.model.score.modules_to_save.default").weight.detach().numpy()
    assert np.array_equal(head, outcome.adapter.dense["score.weight"])


# Evaluation through the nodes -----------------------------------------------------------------------------------------


def test_nodes_measure_what_the_coordinator_would_measure_had_it_their_rows(nodes, published):
    federation = published(count=1)
    outcome = federate(federation, nodes)
    base = find(federation.plan.base_model)
    for node in nodes:
        plan = node_round.choose(federation.plan, node).chosen
        rows = load_rows(node.evaluate, plan)
        wanted = measure(plan, base, rows, outcome.adapter) | {"num-examples": len(rows)}
        assert dict(outcome.rounds[0].evaluation[node.name]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("every", "wanted"), [(0, [False, False, True]), (1, [True] * 3), (2, [False, True, True])])
def test_rounds_are_measured_as_often_as_the_federation_says_and_the_last_always(nodes, published, every, wanted):
    outcome = federate(published({"training": {"batch_size": 4, "max_steps": 1}}, count=3, evaluate_every=every), nodes[:1])
    assert [bool(record.evaluation) for record in outcome.rounds] == wanted


def test_without_held_out_rows_a_share_of_the_training_rows_never_trains(nodes, published):
    federation = published({"data": {"evaluate_fraction": 0.25, "max_length": 160}}, count=1)
    node = nodes[0].model_copy(update={"evaluate": None})
    train, held = node_round.training_rows(federation.plan, node), node_round.held_out_rows(federation.plan, node)
    assert (len(train), len(held)) == (9, 3)
    assert not set(map(repr, train)) & set(map(repr, held))
    assert ask(federation, node).update.manifest.num_examples == 4  # two steps of two rows


def test_an_update_is_of_the_shape_that_the_node_offered(nodes, published):
    federation = published(count=1)
    for node in nodes:
        offer = node_round.join(Call(federation="fed", round=0, rounds=1, plan=federation.plan), node)
        update = ask(federation, node).update
        assert {name: pair.shape for name, pair in update.adapter.factors.items()} == offer.modules
        assert set(update.adapter.ranks().values()) == {offer.r}
        assert offer.modules == shape(find(federation.plan.base_model), federation.plan).modules


def test_an_adapted_embedding_loads_in_plain_peft(nodes, published, stories):
    """PEFT names an embedding's factors in its own way and leaves out, with a warning at most, what it finds under others."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    federation = published({"lora": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}}, count=1)
    outcome = federate(federation, nodes[:1])
    base = AutoModelForCausalLM.from_pretrained(stories, dtype="float32")
    with pytest.warns(UserWarning, match="tied layer"):  # this decoder's head is its embedding; PEFT adapts the input side
        plain = PeftModel.from_pretrained(base, str(federation.output / "adapter"))
    layer = plain.get_submodule("base_model.model.model.embed_tokens")
    wanted = outcome.adapter.factors["model.embed_tokens"].product().T
    assert np.abs(layer.get_delta_weight("default").detach().numpy() - wanted).max() <= 1e-6
    assert np.abs(wanted).max() > 0
