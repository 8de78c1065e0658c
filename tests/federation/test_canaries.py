"""Distinctive strings, planted wherever a node keeps something of its own, are in nothing that leaves it or a server keeps.

Nodes, rounds, secure sums and signatures are the real ones. What is searched: every reply that crosses the grid, as the bytes
of its objects as Flower sends them; the server's log; every file of the federation's folder (rounds, events, TensorBoard,
ledgers, audit log); what ``fedge coordinator`` prints; nodes' audit logs. A node's own log is not searched: it may hold
tracebacks, and stays where the node is.
"""

import base64
import json
import logging
import os
import sys
from contextlib import suppress

import pytest
from flwr.app import MessageType
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from typer.testing import CliRunner

import simulations.federation
from client.node import Node
from fedge import app as fedge
from protocol.errors import FederationError
from protocol.federation import Federation
from simulations.federation import federate
from simulations.grid import InProcessGrid

CANARY = "Zanzibar4711"
SECURE_SUM = f"{MessageType.TRAIN}.secure_sum"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
SFT = {
    "base_model": "tiny",
    "lora": LORA,
    "data": {"max_length": 48},
    "training": {"learning_rate": 1e-2, "batch_size": 2, "max_steps": 1},
}


def disguises():
    """The canary as it could stand in bytes: as it is, in wide letters, in hexadecimal digits, in base64 at each offset."""
    plain = CANARY.encode()
    yield from (
        plain,
        plain.lower(),
        plain.upper(),
        CANARY.encode("utf-16-le"),
        CANARY.encode("utf-32-le"),
        plain.hex().encode(),
    )
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + plain + b"\0" * 3)
        yield coded[4:12]  # letters that depend on the canary alone


DISGUISES = tuple(disguises())


def found_in(content):
    return [disguise for disguise in DISGUISES if disguise in content]


class Spy(InProcessGrid):
    """Keeps what nodes send as the bytes of its objects, and lets something happen at a node before a message reaches it."""

    sent, in_node, before = [], False, staticmethod(lambda message: None)

    def answer(self, message):
        Spy.before(message)
        Spy.in_node = True
        try:
            reply = super().answer(message)
        finally:
            Spy.in_node = False
        Spy.sent.append(message_to_proto(reply).SerializeToString())
        Spy.sent.extend(each.deflate() for each in get_all_nested_objects(reply).values())
        return reply


class ServerLog(logging.Handler):
    """Keeps what is logged while no node is at work."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines, self.own = [], []

    def emit(self, record):
        (self.own if Spy.in_node else self.lines).append(logging.Formatter().format(record))


@pytest.fixture
def spied(monkeypatch):
    """The transport of simulations with ears; a fresh one for each test."""
    monkeypatch.setattr(simulations.federation, "InProcessGrid", Spy)
    Spy.sent, Spy.before = [], staticmethod(lambda message: None)
    log = ServerLog()
    for name in (None, "flwr"):
        logging.getLogger(name).addHandler(log)
    yield log
    for name in (None, "flwr"):
        logging.getLogger(name).removeHandler(log)


def nothing_is_told(federation, log, nodes, outcome=None):
    """Searches everything that has left the nodes."""
    assert Spy.sent
    assert not [found for content in Spy.sent if (found := found_in(content))]
    assert not [line for line in log.lines if found_in(line.encode(errors="replace"))]
    assert not found_in(repr(outcome).encode())
    files = [path for path in federation.output.rglob("*") if path.is_file()]
    files += [node.audit for node in nodes if node.audit.is_file()]
    assert not [(path.name, found) for path in files if (found := found_in(path.read_bytes()) or found_in(str(path).encode()))]
    if not (federation.output / "events.jsonl").exists():
        return
    for verb in (["status"], ["status", "--json"], ["rounds"], ["rounds", "--json"]):
        told = CliRunner().invoke(fedge, ["coordinator", *verb, str(federation.output)], env={"COLUMNS": "500"})
        assert told.exit_code == 0
        assert not found_in(told.output.encode())


# What nodes have ---------------------------------------------------------------------------------------------------------


def sft_row(at):
    return {"input_text": f"Who is {CANARY} {at}?", "target_text": f"{CANARY} of row {at}.", "note": f"{CANARY}-column"}


def pair(at):
    return {"prompt": f"Who is {CANARY} {at}?", "chosen": f"{CANARY}.", "rejected": f"Not {CANARY}."}


def labelled(at):
    return {"text": f"About {CANARY} {at}.", "label": "ab"[at % 2]}


def node_of(folder, name, row=sft_row, **more):
    """A node whose folders, files, rows and rules all hold the canary."""
    home = folder / f"{CANARY}-{name}"
    home.mkdir()
    content = "".join(json.dumps(row(at)) + "\n" for at in range(8))
    (home / f"{CANARY}.jsonl").write_text(content)
    (home / f"{CANARY}-held.jsonl").write_text(content)
    (home / f"{CANARY}-names.txt").write_text(f"{CANARY}\n")
    (home / "data-policy.yaml").write_text(
        f"masking: {{kinds: [email], names: [{CANARY}-names.txt]}}\n" if name == "masks" else "{}"
    )
    (home / "policy.yaml").write_text(json.dumps({"federations": ["fed", CANARY], "base_models": ["tiny", CANARY]}))
    own = {
        "train": home / f"{CANARY}.jsonl",
        "evaluate": home / f"{CANARY}-held.jsonl",
        "state": home / f"{CANARY}-state",
        "folder": home / f"{CANARY}-kept",
        "data_policy": home / "data-policy.yaml",
        "policy": home / "policy.yaml",
        "models": f"{CANARY}-teacher",
        "endpoints": f"https://{CANARY}.example/v1 {CANARY}_KEY",
        "files": str(home / f"{CANARY}-names.txt"),
        "audit": folder / f"audit-{name}.jsonl",
    }
    return Node(name=name, **own | more)


def federation_of(folder, plan=None, **more):
    content = {
        "name": "fed",
        "plan": SFT | (plan or {}),
        "rounds": {"count": 2, "retries": 0, "tensorboard": True, "join_seconds": 1} | more.pop("rounds", {}),
        "aggregation": {"rank_cap": 8},
        "output": folder / "runs",
    }
    return Federation.model_validate(content | more)


def _slow(*values):
    """What another default case says of another route."""
    return pytest.param(*values, marks=pytest.mark.slow)


# Everything goes well -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [_slow(False), True], ids=["unsigned", "signed"])
def test_rows_paths_and_settings_of_nodes_that_train_and_measure_are_in_nothing(signed, spied, tmp_path):
    nodes = [node_of(tmp_path, name) for name in ("bank", "masks")]
    federation = federation_of(tmp_path, {"forgetting": {"max_rise": 5.0}}, trust={"signed": signed})
    outcome = federate(federation, [*nodes[:1], nodes[1].model_copy(update={"probe": nodes[1].train})])
    assert [sorted(record.accepted) for record in outcome.rounds] == [["bank", "masks"]] * 2
    assert all(record.evaluation.keys() == {"bank", "masks"} for record in outcome.rounds)
    nothing_is_told(federation, spied, nodes, outcome)


@pytest.mark.parametrize(
    ("row", "plan"),
    [
        _slow(pair, {"objective": "dpo"}),
        (labelled, {"objective": "classification", "data": {"labels": ["a", "b", "nobody"], "max_length": 48}}),
    ],
    ids=["dpo", "classification"],
)
def test_pairs_and_labelled_texts_are_in_nothing(row, plan, spied, tmp_path):
    nodes = [node_of(tmp_path, name, row) for name in ("bank", "clinic")]
    federation = federation_of(tmp_path, plan, rounds={"count": 1, "wire": "int8", "wire_down": "int8"})
    outcome = federate(federation, nodes)
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic"]
    nothing_is_told(federation, spied, nodes, outcome)


def test_secure_sums_tell_nothing(spied, tmp_path):
    nodes = [node_of(tmp_path, name) for name in ("bank", "clinic", "court")]
    federation = federation_of(tmp_path, secure_sum={"enabled": True}, rounds={"count": 1, "minimum_nodes": 3})
    outcome = federate(federation, nodes)
    assert sorted(outcome.rounds[0].accepted) == ["bank", "clinic", "court"]
    nothing_is_told(federation, spied, nodes, outcome)


@pytest.mark.parametrize("secure", [_slow(False), True], ids=["open", "secure"])
def test_rounds_with_noise_and_their_ledger_tell_nothing(secure, spied, tmp_path):
    nodes = [node_of(tmp_path, name) for name in ("bank", "clinic", "court")]
    privacy = {"enabled": True, "epsilon": 1000.0, "delta": 1e-5, "evaluate": True} | ({"noise": "nodes"} if secure else {})
    more = {"privacy": privacy, "secure_sum": {"enabled": secure}}
    federation = federation_of(tmp_path, rounds={"count": 1, "minimum_nodes": 3}, **more)
    outcome = federate(federation, nodes)
    assert len(outcome.rounds[0].accepted) == 3
    assert (federation.output / "privacy.jsonl").is_file()
    nothing_is_told(federation, spied, nodes, outcome)


def test_the_name_of_a_task_leaves_with_its_metrics_and_does_not_where_the_policy_lists_others(spied, tmp_path):
    """It is the one text of a node's own, beside its name, that is meant to leave (docs/mixtures.md)."""
    bank = node_of(tmp_path, "bank")
    files = {"train": str(bank.train), "evaluate": str(bank.evaluate)}
    bank = Node.model_validate(
        bank.model_dump(exclude={"train", "evaluate", "tasks"}) | {"tasks": {CANARY: files, "other": files}}
    )
    federation = federation_of(tmp_path, rounds={"count": 1})
    federate(federation, [bank])
    assert [content for content in Spy.sent if CANARY.encode() in content]
    bank.policy.write_text("metrics: {loss: 0.1}")
    Spy.sent, federation = [], federation.model_copy(update={"output": tmp_path / "again"})
    spied.lines.clear()
    (tmp_path / "audit-bank.jsonl").unlink(missing_ok=True)  # which says the names of metrics that have left
    nothing_is_told(federation, spied, [bank], federate(federation, [bank]))


# Something fails ------------------------------------------------------------------------------------------------------------


def _rows(text):
    return lambda node: [path.write_text(text) for path in (node.train, node.evaluate)]


# What befalls a node, by what it is then called.
SPOILED = {
    "answerless": _rows(json.dumps({"input_text": CANARY, CANARY: CANARY}) + "\n"),
    "surrogate": _rows(json.dumps({"input_text": f"{CANARY} \ud800", "target_text": CANARY}) + "\n"),
    "broken": _rows(f'{{"input_text": "{CANARY}'),
    "number": _rows(json.dumps({"input_text": CANARY, "target_text": [CANARY]}) + "\n"),
    "bytes": lambda node: [path.write_bytes(b"\xff\xfe" + CANARY.encode()) for path in (node.train, node.evaluate)],
    "gone": lambda node: [path.unlink() for path in (node.train, node.evaluate)],
    "policy": lambda node: node.policy.write_text(f"{CANARY}: {CANARY}\nbase_models: [{CANARY}]"),
    "forbids": lambda node: node.policy.write_text(f"base_models: [{CANARY}]\nfederations: [{CANARY}]"),
    "yaml": lambda node: node.policy.write_text(f"base_models: [{CANARY}"),
    "treatment": lambda node: node.data_policy.write_text(f"{CANARY}: [{CANARY}]"),
    "names": lambda node: node.data_policy.write_text(f"masking: {{kinds: [email], names: [{CANARY}-nowhere.txt]}}"),
    "audit": lambda node: (node.audit.unlink(missing_ok=True), node.audit.mkdir(), (node.audit / CANARY).touch()),
    "memory": lambda node: node.state.exists() or node.state.write_text(CANARY),
}
CODES = ("data", "internal", "configuration", "model", "message", "secure-sum", "audit")


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_nodes_that_fail_at_any_message_say_nothing_but_a_code(kind, spied, tmp_path):
    nodes = [node_of(tmp_path, name) for name in ("bank", *SPOILED)]
    done = set()

    def before(message):
        node = nodes[message.metadata.dst_node_id - 1]
        if message.metadata.message_type == kind and node.name in SPOILED and node.name not in done:
            done.add(node.name)
            SPOILED[node.name](node)

    Spy.before = staticmethod(before)
    federation = federation_of(tmp_path, rounds={"count": 1})
    outcome = federate(federation, nodes)
    assert done == SPOILED.keys()
    (record,) = outcome.rounds
    assert "bank" in record.accepted
    reasons = {
        MessageType.QUERY: outcome.left_out,
        MessageType.TRAIN: record.silent,
        MessageType.EVALUATE: record.evaluation_refused,
    }
    said = reasons[kind]
    assert len(said) >= len(SPOILED) - 1, "a memory that nothing is kept in may fail nobody"
    for reason in said.values():
        code = reason.removeprefix("the node answered with an error: ")
        assert code in CODES or code == "the node's policy refuses it: federations, base_models"
    assert [line for line in spied.own if CANARY in line], "the node's own log says what it was"
    nothing_is_told(federation, spied, nodes, outcome)


@pytest.mark.parametrize("stage", [*(_slow(each) for each in ("train", "share", "mask", "confirm")), "open"])
def test_a_node_that_fails_at_a_stage_of_a_secure_sum_says_nothing_but_a_code(stage, spied, tmp_path):
    nodes = [node_of(tmp_path, name) for name in ("bank", "clinic", "court", "school", "town")]
    done = []

    def before(message):
        kind = message.metadata.message_type
        asked = json.loads(message.content["fedge"]["json"])
        at = "train" if kind == MessageType.TRAIN else asked.get("question", {}).get("stage") if kind == SECURE_SUM else ""
        if at == stage and message.metadata.dst_node_id == 5:
            done.append(stage)
            nodes[4].policy.write_text(f"{CANARY}: [")
            nodes[4].train.write_text(f"{CANARY}: [")

    Spy.before = staticmethod(before)
    federation = federation_of(tmp_path, secure_sum={"enabled": True}, rounds={"count": 1, "minimum_nodes": 4})
    with suppress(FederationError):  # without it the second sum would give away who is left; then there is none
        federate(federation, nodes)
    assert done
    assert [line for line in spied.own if CANARY in line]
    assert b"configuration" in b"".join(Spy.sent)
    nothing_is_told(federation, spied, nodes)


def test_labels_that_nobody_published_are_in_nothing(spied, tmp_path):
    court = node_of(tmp_path, "court", lambda at: labelled(at) | {"label": CANARY})
    nodes = [node_of(tmp_path, "bank", labelled), court]
    plan = {"objective": "classification", "data": {"labels": ["a", "b"], "max_length": 48}}
    federation = federation_of(tmp_path, plan, rounds={"count": 1})
    outcome = federate(federation, nodes)
    assert list(outcome.left_out.values()) == ["the node answered with an error: data"]
    nothing_is_told(federation, spied, nodes, outcome)


def test_what_a_reward_function_or_an_endpoint_raises_is_in_nothing(spied, tmp_path, monkeypatch):
    (tmp_path / "canary_reward.py").write_text(
        f"def raises(prompts, answers):\n    raise RuntimeError(f'{CANARY} {{prompts}} {{answers}}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(f"{CANARY}_KEY", f"{CANARY}-secret")
    rl = SFT | {
        "objective": "rl",
        "rl": {"reward_functions": ["canary_reward:raises"], "num_generations": 2, "max_completion_length": 4},
    }
    judge = {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m", "timeout_seconds": 1, "retries": 0}}
    for at, plan in enumerate((rl, SFT | {"objective": "dpo", "ai_feedback": {"judge": judge}})):
        folder = tmp_path / str(at)
        folder.mkdir()
        more = {"reward_functions": "canary_reward:raises", "endpoints": "http://127.0.0.1:9/v1"}
        nodes = [node_of(folder, "bank", lambda at: {"prompt": f"Who is {CANARY} {at}?"}, **more)]
        federation = federation_of(folder, plan, rounds={"count": 1})
        with pytest.raises(FederationError):
            federate(federation, nodes)
        nothing_is_told(federation, spied, nodes)
    assert [line for line in spied.own if f"RuntimeError: {CANARY}" in line], "the node's own log quotes it"
    sys.modules.pop("canary_reward", None)
    assert f"{CANARY}_KEY" in os.environ
