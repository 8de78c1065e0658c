"""docs/training.md: its section in full names every field, its blocks do what they say, its table of words is taken."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedge import app
from protocol.configuration import parse
from protocol.training_settings import TrainingSettings
from strategies.job import Job

TEXT = (Path(__file__).parent.parent.parent / "docs" / "training.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# They are shown where they belong: federations, several processes, in place of another.
ELSEWHERE = {
    "max_steps",
    "warmup_steps",
    "restart_warmup_ratio",
    "proximal_mu",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "example_privacy",
}


def blocks(language):
    return [body for kind, body in FENCE.findall(TEXT) if kind == language]


def test_the_section_in_full_names_every_field():
    shown = yaml.safe_load(blocks("yaml")[0].replace("1.0e-3", "0.001"))
    assert set(shown["training"]) == set(TrainingSettings.model_fields) - ELSEWHERE
    for name in ELSEWHERE:
        assert name in TEXT or name in (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_its_files_are_jobs(block):
    assert parse(yaml.safe_load(block), Job, source="docs").jobs()


def test_its_blocks_run_as_they_stand(tmp_path, monkeypatch):
    """In this process: commands of their own would each pay for importing torch."""
    monkeypatch.chdir(tmp_path)
    told = []
    for block in blocks("bash"):
        for name, body in re.findall(r"^cat > (\S+) <<END\n(.*?)^END$", block, re.MULTILINE | re.DOTALL):
            Path(name).write_text(body)
        for line in re.findall(r"^fedge .*$", block, re.MULTILINE):
            done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            told.append(done.output)
        for folder in re.findall(r"^ls (.*)$", block, re.MULTILINE)[:1]:
            assert all((Path(place) / "adapter_model.safetensors").is_file() for place in folder.split())
    assert told[1].count("is trained already") == 2
    assert json.loads(told[-1].splitlines()[-1])["adapter"] == "runs/theirs/adapter"
