"""What a federation's file says twice, or can never reach, is refused before anybody is asked; what is written can be read."""

import re
from pathlib import Path
from typing import get_args

import pytest

from protocol.configuration import parse
from protocol.errors import ConfigurationError
from protocol.federation import MEASURED, Federation
from protocol.plan import Objective

STAGES = [{"name": "first", "rounds": 2, "plan": {}}, {"name": "second", "rounds": 1, "plan": {"lora": {"r": 4}}}]
ADAPTERS = {"legal": {}, "medical": {"objective": "dpo"}}


def problems(content):
    with pytest.raises(ConfigurationError) as caught:
        parse(content, Federation, source="x")
    return [problem.removeprefix("(whole file): ") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"plan": {}, "stages": STAGES}, ["plan: found beside stages"]),
        ({"plan": {}, "adapters": ADAPTERS}, ["plan: found beside adapters"]),
        ({"rounds": {"count": 5}, "stages": STAGES}, ["rounds.count: found beside stages"]),
        (
            {"plan": {}, "rounds": {"count": 5}, "stages": STAGES, "stop": {"metric": "foo", "target": 1}},
            ["plan: found beside stages", "rounds.count: found", "stop.metric: found 'foo', nodes measure loss, perplexity,"],
        ),
        ({"stop": {"metric": "acuracy", "target": 0.5}}, ["stop.metric: found 'acuracy'"]),
        ({"stop": {"metric": "accuracy", "target": 50}}, ["stop.target: found 50, and accuracy is never better than 1"]),
        ({"stop": {"metric": "loss", "target": -0.5}}, ["stop.target: found -0.5, and loss is never better than 0"]),
        ({"stop": {"metric": "perplexity", "target": 0.9}}, ["stop.target: found 0.9, and perplexity is never better than 1"]),
        (
            {"stop": {"metric": "accuracy", "target": 2}, "rounds": {"evaluate_every": 0}},
            ["stop.target: found 2", "stop.metric: rounds.evaluate_every is 0"],
        ),
        (
            {"stages": [STAGES[0], {"name": "b", "rounds": 1, "plan": {"base_model": "x", "lora": {"target_modules": ["q"]}}}]},
            ["stages: number 2 has base_model x, and the first, ", "stages: number 2 has lora.target_modules ('q',)"],
        ),
    ],
)
def test_each_contradiction_is_told_beside_the_others(content, said):
    found = problems(content)
    assert [line[: len(wanted)] for line, wanted in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    "content",
    [
        {"stop": {"metric": "accuracy", "target": 1.0}},
        {"stop": {"metric": "loss", "target": 0.0}},
        {"adapters": ADAPTERS, "stop": {"metric": "reward-accuracy", "target": 0.9}},
        {"plan": {"objective": "regression"}, "stop": {"metric": "pearson", "target": -1.0}},
    ],
)
def test_a_target_that_some_node_can_reach_is_taken(content):
    assert parse(content, Federation, source="x").stop.metric


@pytest.mark.parametrize("content", [{"stages": STAGES}, {"adapters": ADAPTERS}, {"plan": {}, "rounds": {"count": 3}}, {}])
@pytest.mark.parametrize("mode", ["python", "json"])
def test_what_is_written_of_a_federation_is_read_as_the_same(content, mode):
    made = Federation.model_validate(content)
    again = Federation.model_validate(made.model_dump(mode=mode))
    assert (again, again.identity()) == (made, made.identity())
    assert again.differing(made) == []


def test_two_federations_differ_in_what_they_compute_and_not_in_how_long_they_wait():
    made = Federation.model_validate({"plan": {"lora": {"r": 8}}})
    other = {"plan": {"lora": {"r": 4}}, "rounds": {"count": 9, "timeout_seconds": 1}, "stop": {"seconds": 3}, "output": "x"}
    assert made.differing(Federation.model_validate(other)) == ["plan.lora.r", "rounds.count"]


def test_a_round_knows_its_stage():
    assert [Federation(stages=STAGES).stage(number) for number in (1, 2, 3)] == ["first", "first", "second"]
    assert Federation().stage(1) == ""


def test_a_target_may_name_what_the_table_of_objectives_says_is_measured():
    """The table itself is held against what is measured (tests/unit/test_docs_objectives.py)."""
    text = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    rows = [line.strip("|").split("|") for line in re.findall(r"^\| `.*", text, re.MULTILINE)]
    table = {row[0].strip(" `"): sorted(re.findall(r"`(.*?)`", row[4])) for row in rows if len(row) == 5}
    assert {objective: sorted(names) for objective, names in MEASURED.items()} == table
    assert MEASURED.keys() == set(get_args(Objective))
