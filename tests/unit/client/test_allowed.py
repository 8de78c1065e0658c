"""A plan from outside may name only the functions, models and endpoints that a node's own settings list."""

from pathlib import Path

import pytest

from client.allowed import check, everything, used
from client.node import Node
from protocol.errors import ConfigurationError
from protocol.plan import Plan

JUDGE = {"endpoint": {"base_url": "https://judge.example/v1", "model": "m", "api_key_env": "JUDGE_KEY"}}
FEEDBACK = Plan.model_validate(
    {
        "objective": "dpo",
        "ai_feedback": {"judge": JUDGE, "writer": {"base_model": "big", "adapter": "/ours/style", "temperature": 1.0}},
    }
)
TAUGHT = Plan.model_validate({"objective": "distillation", "distillation": {"teacher": {"base_model": "big"}}})
RL = Plan.model_validate({"objective": "rl", "rl": {"judge": JUDGE, "reward_functions": ["m:f"]}})


def node(**fields):
    return Node(train=Path("rows.jsonl"), **fields)


MIXED = Plan.model_validate({"method": "xlora", "xlora": {"adapters": ["/ours/fees", "/ours/cards"]}})


def named(plan):
    return {field: names for field, names in used(plan).items() if names}


def test_what_a_plan_names_is_found_wherever_it_stands():
    endpoint = "https://judge.example/v1 JUDGE_KEY"
    assert named(FEEDBACK) == {"models": ["big", "/ours/style"], "endpoints": [endpoint]}
    assert named(TAUGHT) == {"models": ["big"]}
    assert named(RL) == {"reward_functions": ["m:f"], "endpoints": [endpoint]}
    assert named(MIXED) == {"models": ["/ours/fees", "/ours/cards"]}
    assert not named(Plan())


@pytest.mark.parametrize("plan", [FEEDBACK, TAUGHT, RL, MIXED])
def test_a_node_that_lists_nothing_refuses_all_of_it_at_once(plan):
    with pytest.raises(ConfigurationError) as found:
        check(plan, node())
    for field, names in used(plan).items():
        assert (f"{field}: the plan names {', '.join(names)}" in str(found.value)) == bool(names)


@pytest.mark.parametrize("plan", [FEEDBACK, TAUGHT, RL, MIXED, Plan()])
def test_a_node_whose_own_user_wrote_the_plans_allows_all_that_they_name(plan):
    check(plan, node(**everything([FEEDBACK, TAUGHT, RL, MIXED])))


@pytest.mark.parametrize(
    "listed",
    ["https://judge.example/v1", "https://judge.example/v1 OTHER_KEY", "https://judge.example/v2 JUDGE_KEY", "JUDGE_KEY"],
)
def test_an_address_goes_with_its_key_or_not_at_all(listed):
    """A plan could otherwise have any variable of the environment sent to any address."""
    with pytest.raises(ConfigurationError, match="endpoints: the plan names"):
        check(RL, node(reward_functions="m:f", endpoints=listed))


def test_spaces_in_a_list_do_not_count():
    check(RL, node(reward_functions=" m:f ", endpoints=" http://a/v1 ,https://judge.example/v1   JUDGE_KEY"))
