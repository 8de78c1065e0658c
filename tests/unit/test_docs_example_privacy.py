"""docs/privacy.md, "Each row's own privacy": its job runs as it stands, and says what it cost."""

import json
import re
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from fedge import app
from protocol.configuration import parse
from protocol.plan import PRIVATE_OBJECTIVES, Plan
from strategies.job import Job

PAGE = (Path(__file__).parent.parent.parent / "docs" / "privacy.md").read_text()
SECTION = re.search(r"^## Each row's own privacy.*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL).group()


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    return found


def test_its_job_runs_as_it_stands_and_says_what_it_cost(tmp_path, monkeypatch):
    """But for steps: four in the place of twenty."""
    monkeypatch.chdir(tmp_path)
    rows = ({"input_text": f"Which room has number {n}?", "target_text": f"{n % 7}."} for n in range(60))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("job.yaml").write_text(block("yaml").replace("max_steps: 20", "max_steps: 4"))
    done = CliRunner().invoke(app, shlex.split(block("bash"))[1:])
    assert done.exit_code == 0, done.output
    (spent,) = re.findall(r"^ +example-epsilon +([\d.]+)$", done.output, re.MULTILINE)
    assert 7 < float(spent) <= 8
    assert "train-loss" not in done.output
    card = json.loads(Path("runs/private/adapter/data-card.json").read_text())
    assert card["example_privacy"] == {"epsilon": 8.0, "delta": 1e-5, "clipping_norm": 1.0}
    assert "loss" not in Path("runs/private/adapter/history.jsonl").read_text()
    again = CliRunner().invoke(app, shlex.split(block("bash"))[1:])
    assert again.exit_code == 0
    assert "is trained already" in again.output
    assert len(Path("runs/private/memory/example-privacy.jsonl").read_text().splitlines()) == 1


def test_its_table_names_every_method_and_objective_that_keeps_the_promise_and_no_other():
    (methods,) = re.findall(r"^\| methods \| (.*?) \|", SECTION, re.MULTILINE)
    (objectives,) = re.findall(r"^\| objectives \| (.*?) \|", SECTION, re.MULTILINE)
    assert set(objectives.split(", ")) == set(PRIVATE_OBJECTIVES)
    named = set(re.sub(r"\(.*?\)", "", methods).replace(" ", "").split(","))
    keeps = set()
    for method in Plan.model_fields["method"].annotation.__args__:
        precision = "nf4" if method == "qlora" else "fp32"
        try:
            Plan.model_validate({"method": method, "precision": precision, "training": {"example_privacy": {"epsilon": 8}}})
        except ValueError:
            continue
        keeps.add(method)
    assert named == keeps


def test_its_section_is_read():
    assert parse(yaml.safe_load(block("yaml")), Job, source="docs").training.example_privacy.epsilon == 8
