"""Models beside the one that trains are found wherever a plan names them, and a plan that names them travels whole."""

from pathlib import Path

from protocol.plan import Plan
from protocol.writer_settings import beside, second_models

ENDPOINT = {"endpoint": {"base_url": "http://127.0.0.1:8000/v1", "model": "m"}}
OURS = {"base_model": "big", "adapter": "adapters/ours"}
PLANS = [
    Plan.model_validate(content)
    for content in (
        {"objective": "dpo", "ai_feedback": {"judge": ENDPOINT, "writer": {**OURS, "temperature": 0.7}, "answers": 3}},
        {"objective": "rl", "rl": {"judge": OURS}},
        {"objective": "distillation", "distillation": {"teacher": OURS, "temperature": 4.0}},
        {"objective": "distillation", "distillation": {"teacher": {**ENDPOINT, "temperature": 0.5}, "kind": "text"}},
        {},
    )
]


def test_every_second_model_of_a_plan_is_found():
    found = [[(model.base_model, model.endpoint is not None) for model in second_models(plan)] for plan in PLANS]
    assert found == [[(None, True), ("big", False)], [("big", False)], [("big", False)], [(None, True)], []]


def test_their_adapters_lie_beside_the_file_that_names_them_and_nothing_else_changes():
    for plan in PLANS:
        placed = beside(plan, Path("/jobs"))
        assert {model.adapter for model in second_models(placed)} <= {None, "/jobs/adapters/ours"}
        assert beside(placed, Path("/elsewhere")) == placed, "an absolute folder stays"
        back = placed.model_dump_json().replace("/jobs/adapters/ours", "adapters/ours")
        assert Plan.model_validate_json(back) == plan


def test_a_plan_that_names_them_comes_back_as_it_was_sent():
    """What was said and what was left out are told apart by value alone: a plan travels with every field."""
    for plan in PLANS:
        assert Plan.model_validate_json(plan.model_dump_json()) == plan
