"""docs/methods.md: it names every method and its section, its files train, and its commands run."""

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from fedge import app
from protocol.plan import USED_BY, Method

TEXT = (Path(__file__).parent.parent.parent / "docs" / "methods.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROBED, MIXED = [body for kind, body in FENCE.findall(TEXT) if kind == "yaml"]


def test_its_table_names_every_method_with_the_sections_that_it_reads():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
    sections = {method: set(re.findall(r"`(\w+)`", row[2])) for row in rows for method in re.findall(r"`([\w-]+)`", row[0])}
    assert sections.keys() == set(get_args(Method))
    for section, (kind, users) in USED_BY.items():
        if kind == "method":
            assert {method for method, named in sections.items() if section in named} == set(users)


def fedge(*arguments):
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("here")
def test_a_base_is_probed_and_the_file_trains():
    rows = "".join(f'{{"text": "row {n} of {name}", "label": "{name}"}}\n' for n in range(20) for name in ("fees", "cards"))
    Path("rows.jsonl").write_text(rows)
    Path("job.yaml").write_text(PROBED)
    (command,) = re.findall(r"^fedge probe .*$", TEXT, re.MULTILINE)
    told = fedge(*shlex.split(command)[1:])
    assert "frozen_share" in told
    assert {path.name for path in Path("runs/probe").iterdir()} == {"probe.json", "probe.png"}
    fedge("train", "job.yaml")


@pytest.mark.usefixtures("here")
def test_adapters_that_were_trained_apart_are_mixed():
    Path("rows.jsonl").write_text("".join(f'{{"input_text": "What is {n}?", "target_text": "{n}."}}\n' for n in range(20)))
    for place in yaml.safe_load(MIXED)["xlora"]["adapters"]:
        one = {"base_model": "tiny", "data": {"train": "rows.jsonl"}, "training": {"max_steps": 1}}
        Path("one.yaml").write_text(yaml.safe_dump(one | {"output": str(Path(place).parent)}))
        fedge("train", "one.yaml")
    Path("job.yaml").write_text(MIXED)
    fedge("train", "job.yaml")
    assert Path("runs/mixed/adapter/adapter_model.safetensors").is_file()
