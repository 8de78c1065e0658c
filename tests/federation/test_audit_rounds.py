"""What coordinator and nodes write in their audit logs while a federation runs, and what never stands there."""

import json
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from drawn_nodes import Scripted, federation, make_app
from flwr.app import Error, Message, MessageType, RecordDict
from typer.testing import CliRunner

from client.app import app
from client.node import Node
from fedge import app as fedge
from protocol.audit import AuditLog, read, verify
from protocol.audit_bundle import verify_bundle
from protocol.errors import AuditError, FederationError
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.records import Call, call_records
from protocol.signature import fingerprint, make_key, write_pair
from protocol.vault import make_key_file
from server.rounds import run
from simulations.federation import federate
from simulations.grid import InProcessGrid

ALL = {"count": 3, "cohort": None, "over_selection": 0.0}


def told(path):
    return [(line.event, dict(line.facts)) for line in read(path)]


def test_a_coordinator_tells_who_joined_was_asked_answered_and_what_left(tmp_path):
    outcome = run(Scripted(make_app(), 4), federation(tmp_path / "run", 1, rounds=ALL))
    log = tmp_path / "run" / "audit.jsonl"
    lines = told(log)
    assert verify(log).lines == len(lines)
    assert log.stat().st_mode & 0o777 == 0o600
    names = [f"node-{number}" for number in range(1, 5)]
    assert sorted(facts["node"] for event, facts in lines if event == "joined") == names
    rounds = [record.round for record in outcome.rounds]
    for event in ("asked", "answered", "released"):
        assert [facts["round"] for found, facts in lines if found == event] == rounds
    assert all(facts["nodes"] == names for event, facts in lines if event == "asked")
    assert all(facts["accepted"] == names for event, facts in lines if event == "answered")
    released = [facts["digest"] for event, facts in lines if event == "released"]
    assert released[-1] == outcome.adapter.digest()
    assert lines[-1][0] == "ended"
    assert {facts["federation"] for _, facts in lines} == {"drawn"}


def test_a_log_that_is_named_is_written_even_where_no_round_succeeds(tmp_path):
    def failed(message, reply):
        if message.metadata.message_type == MessageType.TRAIN:
            return Message(Error(code=1, reason="CANARY-4711 in /home/canary/rows.jsonl"), reply_to=message)
        return None

    changes = {"rounds": ALL | {"retries": 1, "timeout_seconds": 5}, "at_rest": {"audit": str(tmp_path / "log")}}
    named = federation(tmp_path / "run", 1, **changes)
    with pytest.raises(FederationError):
        run(Scripted(make_app(), 3, edit=failed), named)
    lines = told(tmp_path / "log")
    assert [facts["attempt"] for event, facts in lines if event == "asked"] == [1, 2]
    assert all(event != "released" for event, _ in lines)
    assert b"CANARY" not in (tmp_path / "log").read_bytes()
    assert not (tmp_path / "run").exists()


# Nodes ----------------------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
TRAINING = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 1}
CANARY = "canary4711"


def summed(folder, count=1):
    """Three nodes whose updates go into secure sums, with an audit log each; a canary stands in rows and in their paths."""
    nodes = []
    for name in ("bank", "clinic", "court"):
        path = folder / f"{CANARY}-{name}.jsonl"
        rows = [{"input_text": f"{CANARY} {number}?", "target_text": f"{CANARY} {number}."} for number in range(8)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        nodes.append(Node(name=name, train=path, audit=folder / "audit" / name))
    content = {
        "name": "hospitals",
        "plan": {"base_model": "tiny", "lora": LORA, "data": {"max_length": 64}, "training": TRAINING},
        "rounds": {"count": count, "minimum_nodes": 3, "retries": 0},
        "secure_sum": {"enabled": True},
        "output": folder / "run",
    }
    return Federation.model_validate(content), nodes


def test_a_node_tells_what_it_was_asked_what_left_and_whose_sums_it_opened_and_no_line_holds_data(tmp_path):
    settings, nodes = summed(tmp_path)
    federate(settings, nodes)
    lines = told(tmp_path / "audit" / "bank")
    stages = [facts.get("stage", facts["kind"]) for event, facts in lines if event == "asked"]
    assert stages == ["query", "train", "share", *["mask", "confirm", "open"] * 2, "evaluate"]
    kinds = [event for event, _ in lines]
    assert kinds.count("asked") == kinds.count("sent") == len(stages)
    assert [facts["nodes"] for event, facts in lines if event == "opened"] == [["bank", "clinic", "court"]] * 2
    sent = [facts for event, facts in lines if event == "sent"]
    assert all(len(facts["digest"]) == 64 for facts in sent)
    assert sent[3]["bytes"] > 1000  # the masked vector
    assert "loss" in sent[-1]["metrics"]
    assert all(facts["coordinator"].startswith("SHA256:") for event, facts in lines if event == "asked")
    for log in [*(tmp_path / "audit").iterdir(), tmp_path / "run" / "audit.jsonl"]:
        content = log.read_bytes()
        assert CANARY.encode() not in content
        assert str(tmp_path).encode() not in content
        assert all(line.signature for line in read(log))
    keys = {facts["key"] for event, facts in told(tmp_path / "run" / "audit.jsonl") if event == "joined"}
    assert len(keys) == 3


def asked(node, state=None, plan=None):
    """What a node answers to an invitation."""
    plan = Plan.model_validate({"base_model": "tiny", "lora": LORA, "training": TRAINING} | (plan or {}))
    grid = InProcessGrid(app, [{key.replace("_", "-"): value if key == "trial" else str(value) for key, value in node.items()}])
    if state is not None:
        grid._contexts[1].state = state
    invitation = call_records(Call(federation="f", round=0, rounds=1, plan=plan))
    sent = grid.push_messages([Message(invitation, dst_node_id=1, message_type=MessageType.QUERY)])
    (reply,) = grid.pull_messages(sent)
    return reply


def test_what_a_node_refuses_stands_in_its_log_by_code_and_rule_alone(tmp_path):
    (tmp_path / f"{CANARY}.jsonl").write_text('{"text": broken\n')
    (tmp_path / "policy.yaml").write_text("methods: [ia3]\nrounds: 3\n")
    settings = {"train": tmp_path / f"{CANARY}.jsonl", "audit": tmp_path / "log", "trial": False}
    assert asked(settings).error.reason == "data"
    assert asked(settings | {"train": tmp_path / f"{CANARY}-missing.jsonl"}).error.reason == "data"
    assert asked(settings | {"policy": tmp_path / "policy.yaml"}).error.reason.startswith("policy")
    refused = [facts for event, facts in told(tmp_path / "log") if event == "refused"]
    assert [facts["code"] for facts in refused[:2]] == ["data", "data"]
    assert refused[2]["rules"] == ["methods"]
    assert CANARY.encode() not in (tmp_path / "log").read_bytes()


def test_a_node_whose_log_was_changed_answers_nothing_until_somebody_has_looked(tmp_path):
    rows = [{"input_text": f"{n}?", "target_text": f"{n}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings, state = {"train": tmp_path / "rows.jsonl", "audit": tmp_path / "log", "trial": False}, RecordDict()
    assert not asked(settings, state).has_error()
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content.replace(b'"asked"', b'"joked"'))
    assert asked(settings, state).error.reason == "audit"
    (tmp_path / "log").write_bytes(content.splitlines(keepends=True)[0])  # whole lines, fewer than this SuperNode wrote
    assert asked(settings, state).error.reason == "audit"
    (tmp_path / "log").write_bytes(content)
    assert not asked(settings, state).has_error()


# The verbs ------------------------------------------------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(fedge, [str(word) for word in words])


def test_the_verbs_say_whether_a_log_holds_and_what_it_says(tmp_path):
    key, other = make_key(), make_key()
    public = write_pair(tmp_path / "key", key)
    log = AuditLog(tmp_path / "log", key)
    for number in range(3):
        log.write("asked", round=number, nodes=["bank", "clinic"])
    line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    other_line = other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    listed = {"consortium": {"key": line, "role": "coordinator"}, "bank": {"key": other_line}}
    (tmp_path / "list.yaml").write_text(json.dumps(listed))
    for trusted in (public, tmp_path / "list.yaml"):
        said = call("coordinator", "audit", "verify", log.path, "--trusted", trusted, "--expect", log.last)
        assert said.exit_code == 0, said.output
        assert "3 line(s) hold" in said.output
        assert fingerprint(key.public_key()) in said.output
    shown = call("coordinator", "audit", "show", log.path).output.splitlines()
    assert len(shown) == 3
    assert 'asked       nodes ["bank", "clinic"]  round 2' in shown[2]
    assert [json.loads(each)["n"] for each in call("node", "audit", "show", log.path, "--json").output.splitlines()] == [
        1,
        2,
        3,
    ]
    wrong = call("node", "audit", "verify", log.path, "--trusted", tmp_path / "list.yaml")  # a coordinator's key is no node's
    assert isinstance(wrong.exception, AuditError)
    log.path.write_bytes(log.path.read_bytes().replace(b"clinic", b"cl1nic", 1))
    words = [sys.executable, "-m", "fedge", "coordinator", "audit", "verify", str(log.path)]
    broken = subprocess.run(words, capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    assert "line 1 is not what was written" in broken.stderr


def test_an_auditor_is_given_the_log_the_ledger_and_events_without_figures_signed_and_sealed(tmp_path):
    key = make_key()
    write_pair(tmp_path / "key", key)
    run(Scripted(make_app(), 4), federation(tmp_path / "run", 1, rounds=ALL))
    (tmp_path / "run" / "privacy.jsonl").write_text("{}\n")
    unsigned = call("coordinator", "audit", "export", tmp_path / "run", tmp_path / "bundle")
    assert isinstance(unsigned.exception, AuditError)
    made = call("coordinator", "audit", "export", tmp_path / "run", tmp_path / "bundle", "--identity", tmp_path / "key")
    assert made.output.split() == ["audit.jsonl", "events.jsonl", "privacy.jsonl"]
    content = (tmp_path / "bundle" / "events.jsonl").read_text()
    assert '"accepted": ["node-1", "node-2"' in content
    for figure in ("loss", "bytes", "seconds", "merge", "reason", "evaluation"):
        assert figure not in content
    assert call("coordinator", "audit", "verify", tmp_path / "bundle").exit_code == 0
    assert verify_bundle(tmp_path / "bundle", None).lines == len(told(tmp_path / "run" / "audit.jsonl"))

    make_key_file(tmp_path / "vault")
    sealed = tmp_path / "for-the-auditor"
    words = ["--identity", tmp_path / "key", "--key", tmp_path / "vault"]
    assert call("coordinator", "audit", "export", tmp_path / "run", sealed, *words).exit_code == 0
    assert b"node-1" not in sealed.read_bytes()
    assert call("vault", "open", sealed, "--key", tmp_path / "vault", "--to", tmp_path / "at-the-auditor").exit_code == 0
    assert verify_bundle(tmp_path / "at-the-auditor" / "audit", None).lines > 0
    # The run itself had no key, so its lines are not signed; the bundle is.
    with pytest.raises(AuditError, match="line 1 is not signed"):
        verify_bundle(tmp_path / "bundle", [key.public_key()])
    with pytest.raises(AuditError, match=r"manifest\.json: does not hold"):
        verify_bundle(tmp_path / "bundle", [make_key().public_key()])
    for name in ("audit.jsonl", "events.jsonl", "privacy.jsonl"):
        before = (tmp_path / "bundle" / name).read_bytes()
        (tmp_path / "bundle" / name).write_bytes(before + b"{}\n")
        with pytest.raises(AuditError, match="is not what the manifest says"):
            verify_bundle(tmp_path / "bundle", None)
        (tmp_path / "bundle" / name).unlink()
        with pytest.raises(AuditError, match="is missing"):
            verify_bundle(tmp_path / "bundle", None)
        (tmp_path / "bundle" / name).write_bytes(before)
