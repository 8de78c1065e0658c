"""Every block of the README and of the pages on configuration, coordinator, adapters and planning does what it says."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedge import app
from protocol.configuration import parse
from simulations.scenario import Scenario
from strategies.job import Job

ROOT = Path(__file__).parent.parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name, language):
    return [body for kind, body in FENCE.findall((ROOT / name).read_text()) if kind == language]


def write_rows(folder):
    rows = [{"input_text": f"What is the fee of plan {n}?", "target_text": f"{n} crowns"} for n in range(30)]
    for name in ("rows.jsonl", "train.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(command, folder):
    executable = Path(sys.executable).parent / "fedge"
    done = subprocess.run(
        ["bash", "-euc", command.replace("fedge ", f"{executable} ")], cwd=folder, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_readme_names_the_two_make_targets():
    targets = (ROOT / "Makefile").read_text()
    for block in blocks("README.md", "console"):
        target = block.removeprefix("$ make ").strip()
        assert re.search(rf"^{target}:", targets, re.MULTILINE)


def test_the_readme_trains_evaluates_and_asks(tmp_path):
    write_rows(tmp_path)
    (tmp_path / "job.yaml").write_text(blocks("README.md", "yaml")[0])
    told = run(blocks("README.md", "bash")[0], tmp_path)
    assert (tmp_path / "runs/job/adapter/adapter_model.safetensors").is_file()
    assert "What is the daily cash limit?" in told


def test_the_readme_looks_at_rows_and_plans(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path / "cache"))
    write_rows(tmp_path)
    run(blocks("README.md", "bash")[1], tmp_path)
    assert (tmp_path / "masked.jsonl").is_file()
    assert "what fits" in run(blocks("README.md", "bash")[2], tmp_path)
    assert yaml.safe_load((tmp_path / "planned.yaml").read_text())["method"] == "lora"


@pytest.mark.slow
def test_the_readme_simulates(tmp_path):
    run(blocks("README.md", "bash")[3], tmp_path)
    assert (tmp_path / "runs/example/adapter/adapter_model.safetensors").is_file()


def test_the_documented_job_and_scenario_run(tmp_path):
    write_rows(tmp_path)
    job, scenario, _ = blocks("docs/configuration.md", "yaml")
    parse(yaml.safe_load(job), Job, source="docs")
    parse(yaml.safe_load(scenario), Scenario, source="docs")
    (tmp_path / "scenario.yaml").write_text(scenario)
    assert "global adapter" in run("fedge simulate scenario.yaml", tmp_path)


def test_the_documented_devices_and_their_traces_run(tmp_path, trainable_bundle):
    write_rows(tmp_path)
    bundle, key = trainable_bundle
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "1").symlink_to(bundle)
    (tmp_path / "release.pub").write_bytes(key.read_bytes())
    scenario = blocks("docs/configuration.md", "yaml")[2]
    (tmp_path / "phones.yaml").write_text(scenario)
    assert "global adapter of rank" in run("fedge simulate phones.yaml 2> told", tmp_path)
    assert " devices spent " in (tmp_path / "told").read_text()
    (tmp_path / "traces.jsonl").write_text(blocks("docs/configuration.md", "json")[0])
    drawn = "{share: 0.3, spell_seconds: 2400}"
    assert drawn in scenario
    (tmp_path / "traced.yaml").write_text(
        scenario.replace(drawn, "{traces: traces.jsonl}").replace("runs/phones", "runs/traced")
    )
    run("fedge simulate traced.yaml", tmp_path)
    # The three conditions hold from one o'clock to six: the first round begins then.
    first = (tmp_path / "runs/traced/node-state/devices.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["sent"] == 3600


def test_the_documented_rounds_run_and_the_coordinators_commands_read_them(tmp_path):
    write_rows(tmp_path)
    (tmp_path / "scenario.yaml").write_text(blocks("docs/coordinator.md", "yaml")[0])
    told = run(blocks("docs/coordinator.md", "bash")[0], tmp_path)
    assert "every round is done" in told
    assert "round 2: runs/released" in told
    assert (tmp_path / "runs/released/adapter_model.safetensors").is_file()


def test_the_documented_adapter_is_trained_used_and_read(tmp_path, monkeypatch):
    """In this process: three commands in one of their own each would pay for importing torch three times."""
    write_rows(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(blocks("docs/adapters.md", "yaml")[0])
    for line in blocks("docs/adapters.md", "bash")[0].splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "runs/bottleneck/adapter/adapter_config.json").read_text())
    assert told == json.loads(blocks("docs/adapters.md", "json")[0])
    subprocess.run([sys.executable, "-c", blocks("docs/adapters.md", "python")[0]], check=True)


def test_the_planning_page_plans_trains_compares_and_lays_out(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGE_CACHE", str(tmp_path / "cache"))
    first, second = blocks("docs/planning.md", "bash")
    assert "what does not" in run(first, tmp_path)
    told = run(second, tmp_path)
    assert (tmp_path / "runs/job/adapter/adapter_model.safetensors").is_file()
    assert "federated pilot" in told
