"""The table of objectives in docs/configuration.md: every objective, rows that are read, figures that are measured."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from protocol.plan import Objective, Plan
from strategies.base_model import find
from strategies.data.formats import load
from strategies.evaluation.measure import LEADING, measure

TEXT = (Path(__file__).parent.parent.parent / "docs" / "configuration.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*", TEXT, re.MULTILINE)]
TABLE = {cells[0].strip("`"): cells for cells in ROWS if len(cells) == 5}
MORE = {
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
    assert set(defaults) - set(shown) == ({"reward_model", "reward_functions"} if section == "rl" else set())
