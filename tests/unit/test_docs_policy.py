"""The section of docs/privacy.md on what an institution allows: its policy is read, its commands run, its names are there."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from client.policy import read_policy
from fedge import app
from protocol.policy_rules import RULES

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "privacy.md").read_text()
SECTION = re.search(r"^## What an institution allows\n.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group()
FEDERATION = {
    "name": "clinics",
    "plan": {"base_model": "tiny", "training": {"learning_rate": 5e-3, "max_steps": 100}},
    "rounds": {"count": 10, "minimum_nodes": 5},
    "secure_sum": {"enabled": True},
    "trust": {"enrolled": "enrolled.yaml", "identity": "identity"},
    "privacy": {"enabled": True, "epsilon": 8, "noise": "nodes"},
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(re.search(r"```yaml\n(.*?)```", SECTION, re.DOTALL).group(1))
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(FEDERATION))
    (tmp_path / "data.yaml").write_text("masking: {kinds: all}\n")
    return tmp_path


def run(line):
    return CliRunner().invoke(app, shlex.split(line)[1:], env={"COLUMNS": "200"})


def test_the_commands_say_what_is_allowed_and_what_would_be_refused(files):
    alone, beside = re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL).group(1).strip().split("\n")
    told = run(alone)
    assert told.exit_code == 0, told.output
    assert "rank: 32 (largest rank of an update that a plan may ask for)" in told.output
    told = run(beside)
    assert told.exit_code == 0, told.output
    assert "plan: allowed" in told.output


def test_a_federation_beyond_the_policy_ends_with_exit_code_1_and_the_rules(files):
    beyond = FEDERATION | {"name": "others", "plan": {"base_model": "tiny", "lora": {"r": 64}}}
    (files / "federation.yaml").write_text(yaml.safe_dump(beyond))
    told = run("fedge node policy policy.yaml federation.yaml --json")
    assert told.exit_code == 1
    refused = yaml.safe_load(told.output)["refused"]["plan"]
    assert [line.partition(":")[0] for line in refused] == ["federations", "rank", "local_steps", "masking"]


def test_each_stage_and_each_adapter_is_looked_at(files):
    plan = FEDERATION["plan"]
    staged = {key: value for key, value in FEDERATION.items() if key != "plan"} | {"rounds": {"minimum_nodes": 5}}
    staged["stages"] = [
        {"name": "slow", "rounds": 2, "plan": plan},
        {"name": "long", "rounds": 2, "plan": plan | {"training": {"learning_rate": 5e-3, "max_steps": 300}}},
    ]
    (files / "federation.yaml").write_text(yaml.safe_dump(staged))
    told = run("fedge node policy policy.yaml federation.yaml --data-policy data.yaml")
    assert told.exit_code == 1
    assert "slow: allowed\nlong: refused\n  - local_steps: asked for 300, allowed 200 at most\n" in told.output


def test_a_plan_alone_is_looked_at_as_a_federation_of_it(files):
    (files / "plan.yaml").write_text("lora: {r: 8}\n")
    (files / "small.yaml").write_text("rank: 4\n")
    told = run("fedge node policy small.yaml plan.yaml")
    assert told.exit_code == 1
    assert "rank: asked for 8, allowed 4 at most" in told.output


def test_a_policy_with_contradictions_is_told_with_all_of_them(files):
    (files / "policy.yaml").write_text("epsilon: 1\nnoise: nodes\n")
    told = run("fedge node policy policy.yaml")
    assert str(told.exception).count("\n  - ") == 2


def test_an_empty_mapping_allows_everything_and_says_so(files):
    (files / "policy.yaml").write_text("{}\n")
    assert "nothing: is refused" in run("fedge node policy policy.yaml").output


def test_the_policy_of_the_page_has_rules_that_there_are(files):
    told = yaml.safe_load((files / "policy.yaml").read_text())
    assert told.keys() - RULES.keys() == {"time_zone", "metrics", "measured_rows", "examples"}
    assert read_policy(files / "policy.yaml").upload_bytes == 100_000_000


def test_every_test_that_holds_a_promise_is_there():
    names = set(re.findall(r"`(tests/[\w/]+\.py)`", SECTION))
    assert len(names) == 4
    assert all((ROOT / name).is_file() for name in names)
