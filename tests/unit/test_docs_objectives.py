"""The table of objectives in docs/configuration.md, and the blocks of docs/objectives.md: they do what they say."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from chat_server import preferring, serving, shown
from typer.testing import CliRunner

from fedge import app
from protocol.plan import Objective, Plan
from strategies.base_model import find
from strategies.data.formats import load
from strategies.evaluation.measure import LEADING, measure

TEXT = (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*", TEXT, re.MULTILINE)]
TABLE = {cells[0].strip("`"): cells for cells in ROWS if len(cells) == 5}
MORE = {
    "distillation": {"distillation": {"teacher": {"base_model": "tiny"}}},
    "classification": {"data": {"labels": ["a", "b"]}},
    "rl": {"rl": {"reward_functions": ["rule_of_the_docs:length"], "max_completion_length": 4}},
}


def test_every_objective_is_in_the_table():
    assert sorted(TABLE) == sorted(get_args(Objective))


@pytest.mark.parametrize("objective", sorted(get_args(Objective)))
def test_the_documented_rows_are_read_and_the_documented_figures_measured(tmp_path, monkeypatch, objective):
    (tmp_path / "rule_of_the_docs.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, rows, _, sections, figures = TABLE[objective]
    samples = [json.loads(row) for row in re.findall(r"`(\{.*?\})`(?:,|$)", rows)]
    assert samples
    if objective in ("regression", "kto"):  # figures of two kinds of rows
        samples.append({**samples[0], "label": 0, **({"text": "Another text."} if objective == "regression" else {})})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    plan = Plan.model_validate({"objective": objective, **MORE.get(objective, {})})
    found = measure(plan, find("tiny"), load(tmp_path / "rows.jsonl", plan))
    assert sorted(found) == sorted(re.findall(r"`(.*?)`", figures))
    assert LEADING[objective] in found
    for section in re.findall(r"`(\w+)`", sections):
        assert section in Plan.model_fields


@pytest.mark.parametrize("section", ["dpo", "kto", "rl"])
def test_the_documented_settings_are_the_defaults(section):
    """The line that begins with the section's name shows each of its settings at its default."""
    import yaml

    shown = yaml.safe_load(re.search(rf"`({section}: \{{.*?\}})`", TEXT, re.DOTALL)[1])[section]
    defaults = Plan.model_fields[section].default.model_dump()
    assert shown == {name: value for name, value in defaults.items() if name in shown}
    assert set(defaults) - set(shown) == ({"reward_model", "reward_functions", "judge"} if section == "rl" else set())


def blocks(language):
    text = (Path(__file__).parent.parent.parent / "docs" / "objectives.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_page_on_second_models_distils_labels_trains_and_marks(tmp_path, monkeypatch):
    """In this process. The documented endpoint is a server on loopback that prefers longer answers and marks by length."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"What is the fee of plan {n}?", f"{n} crowns") for n in range(16)]
    for name in ("train", "test"):
        lines = [json.dumps({"input_text": question, "target_text": answer}) for question, answer in rows]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": question}) for question, _ in rows))

    def judge(request):
        seen = shown(request)
        return str(min(9, 1 + len(seen["answer"]) // 5)) if "answer" in seen else preferring(len)(request)

    with serving(judge) as chat:
        for block in blocks("yaml"):
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block.replace("http://127.0.0.1:8000/v1", chat.url))
        for line in [*"".join(blocks("bash")).splitlines(), "fedge train marked.yaml"]:
            done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
            assert done.exit_code == 0, done.output
    assert any("Prefer short answers." in request["messages"][-1]["content"] for request in chat.requests)
    assert len(Path("runs/pairs.jsonl").read_text().splitlines()) > 4
    for name in ("teacher", "student", "feedback", "marked"):
        assert Path(f"runs/{name}/adapter/adapter_model.safetensors").is_file()
