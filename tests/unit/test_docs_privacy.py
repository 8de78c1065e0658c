"""The blocks of docs/privacy.md, and that the tests which it names are there."""

import json
import re
import shlex
from pathlib import Path

import yaml
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from typer.testing import CliRunner

from client.node import Node
from fedge import app
from protocol.audit import AuditLog
from protocol.configuration import parse
from protocol.enrolment import read_enrolment
from protocol.federation import Federation
from protocol.signature import make_key, write_pair
from simulations.federation import federate

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "privacy.md").read_text()


def block(language, section=""):
    (found,) = blocks(language, section)
    return found


def blocks(language, section=""):
    """Of a section, or of the whole page."""
    text = re.search(rf"^## {section}.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group() if section else PAGE
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def written(path, text):
    """A list with real keys in the place of the dots."""
    keys = (make_key().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for _ in range(9))
    path.write_text(re.sub(r"ssh-ed25519 AAAA\.\.\.", lambda _: next(keys), text))
    return path


def test_the_list_and_the_federation_of_who_is_who_are_read(tmp_path):
    listed, described = blocks("yaml", "Who is who")
    found = read_enrolment(written(tmp_path / "enrolled.yaml", listed))
    assert (found.nodes.keys(), found.coordinators.keys()) == ({"bank", "clinic"}, {"consortium"})
    assert found.revoked.keys() == {"law_firm"}
    federation = parse(yaml.safe_load(described), Federation, source="docs")
    assert (str(federation.trust.enrolled), str(federation.trust.identity)) == ("enrolled.yaml", "identity")


def test_a_federation_as_it_stands_there_signs_both_ways_and_what_it_releases_is_verified(tmp_path):
    """The block as it is, but for one round of one step in a simulation, which makes keys of its own."""
    (tmp_path / "rows.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n' * 8)
    told = yaml.safe_load(blocks("yaml", "Who is who")[1])
    told["plan"] |= {"training": {"max_steps": 1, "batch_size": 2}, "lora": {"r": 2}, "data": {"max_length": 16}}
    told |= {"output": str(tmp_path / "runs"), "rounds": {"count": 1, "evaluate_every": 0}}
    nodes = [Node(name=name, train=tmp_path / "rows.jsonl") for name in ("bank", "clinic")]
    federate(parse(told, Federation, source="docs"), nodes)
    assert json.loads((tmp_path / "runs" / "adapter" / "signature.json").read_text())["release"]["federation"] == "clinics"


def test_the_section_of_a_federation_with_secure_sums_is_read(tmp_path):
    told = yaml.safe_load(block("yaml", "Secure sum"))
    about = {"name": "f", "plan": {"base_model": "tiny"}, "output": str(tmp_path / "runs")}
    assert parse(about | told, Federation, source="docs").secure_sum.enabled


def test_the_budget_can_be_asked(tmp_path, monkeypatch):
    """Five rounds of two sums cost what ten of one do."""
    monkeypatch.chdir(tmp_path)
    Path("federation.yaml").write_text(blocks("yaml", "Differential privacy")[0] + "plan: {base_model: tiny}\n")
    of_a_file, of_numbers = block("bash", "Differential privacy").splitlines()
    for line in (of_a_file, of_numbers):
        told = CliRunner().invoke(app, shlex.split(line)[1:])
        assert told.exit_code == 0
        assert "3.4189" in told.output  # the noise multiplier of the analytic Gaussian mechanism, as in benchmarks/LOG.md


def test_the_federations_with_noise_are_read_and_one_whose_nodes_add_it_runs(tmp_path):
    """The second block as it is, but with four nodes and one round of one step in a simulation, which makes keys of its own."""
    (tmp_path / "rows.jsonl").write_text('{"input_text": "a", "target_text": "b"}\n' * 8)
    plan = {"base_model": "tiny", "training": {"max_steps": 1, "batch_size": 2}, "lora": {"r": 2}, "data": {"max_length": 16}}
    first, second = (yaml.safe_load(text) | {"plan": plan} for text in blocks("yaml", "Differential privacy"))
    assert parse(first, Federation, source="docs").privacy.noise == "coordinator"
    assert parse(second, Federation, source="docs").privacy.noise == "nodes"
    second |= {"output": str(tmp_path / "runs"), "rounds": {"count": 1, "minimum_nodes": 4, "evaluate_every": 0}}
    del second["trust"]
    second["privacy"]["colluders"] = 1
    nodes = [Node(name=f"node-{at}", train=tmp_path / "rows.jsonl") for at in range(4)]
    outcome = federate(parse(second, Federation, source="docs"), nodes)
    assert 3.99 < outcome.rounds[0].privacy["epsilon"] <= 4.0


def test_what_is_said_of_vaults_is_done_line_by_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "clinics").mkdir(parents=True)
    (tmp_path / "runs" / "clinics" / "adapter_model.safetensors").write_bytes(b"weights")
    for line in block("bash", "At rest").splitlines():
        told = CliRunner().invoke(app, shlex.split(line)[1:])
        assert told.exit_code == 0, told.output
    assert not (tmp_path / "runs" / "clinics").exists()
    assert (tmp_path / "elsewhere" / "clinics" / "adapter_model.safetensors").read_bytes() == b"weights"
    about = {"name": "f", "plan": {"base_model": "tiny"}, "output": str(tmp_path / "runs")}
    assert parse(about | yaml.safe_load(block("yaml", "At rest")), Federation, source="docs").at_rest.vault == Path("vault.key")
    named = {"train": "rows.jsonl", "vault": "/etc/fedge/vault.key", "vault_passphrase_env": "WORDS", "wipe": True}
    assert Node.model_validate(named).wipe


def test_what_is_said_of_audit_logs_is_done_line_by_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key, node = make_key(), make_key()
    lines = {"consortium": {"key": write_pair(Path("coordinator"), key).read_text(), "role": "coordinator"}}
    Path("enrolled.yaml").write_text(json.dumps(lines))
    write_pair(Path("identity"), node)
    AuditLog(tmp_path / "runs" / "clinics" / "audit.jsonl", key).write("asked", nodes=["bank"])
    AuditLog(tmp_path / "audit.jsonl", node).write("asked", kind="train")
    for line in block("bash", "Audit log").splitlines():
        told = CliRunner().invoke(app, shlex.split(line)[1:])
        assert told.exit_code == 0, told.output
        assert "1 line(s) hold" in told.output or "bank" in told.output


def test_every_test_that_holds_a_promise_is_there():
    names = set(re.findall(r"test_\w+\.py", PAGE))
    assert names <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(names) >= 4
