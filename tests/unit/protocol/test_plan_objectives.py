"""What an objective's own settings cannot be is said when the plan is written."""

import pytest
from pydantic import ValidationError

from protocol.federation import Federation
from protocol.plan import Plan

REWARDED = {"reward_functions": ["m:f"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"objective": "sft", "dpo": {"beta": 0.2}}, "dpo is for objective dpo, found sft"),
        ({"objective": "dpo", "kto": {"beta": 0.2}}, "kto is for objective kto, found dpo"),
        ({"objective": "dpo", "dpo": {"label_smoothing": 0.1}}, "take robust"),
        ({"objective": "dpo", "dpo": {"loss_type": "exo_pair"}}, "label_smoothing above 0"),
        ({"objective": "dpo", "dpo": {"loss_type": "sft"}}, "loss_type"),
        ({"objective": "kto", "training": {"batch_size": 1}}, "kto needs 2 or more"),
        ({"objective": "rl"}, "needs a reward"),
        ({"objective": "rl", "rl": {**REWARDED, "num_generations": 1}}, "num_generations"),
        ({"objective": "rl", "rl": {**REWARDED, "num_generations": 3}}, "does not divide"),
        ({"objective": "regression", "head": {"init": "label-names"}}, "head is for objective classification"),
    ],
)
def test_settings_that_an_objective_cannot_use_are_refused(content, said):
    with pytest.raises(ValidationError, match=said):
        Plan.model_validate(content)


@pytest.mark.parametrize(
    "content",
    [
        {"objective": "dpo", "dpo": {"loss_type": "robust", "label_smoothing": 0.1}},
        {"objective": "dpo", "dpo": {"loss_type": "exo_pair", "label_smoothing": 1e-3}},
        {"objective": "rl", "rl": {**REWARDED, "num_generations": 16}, "training": {"gradient_accumulation_steps": 2}},
    ],
)
def test_settings_that_it_can_use_are_taken(content):
    assert Plan.model_validate(content).objective == content["objective"]


def staged(*objectives, **more):
    stages = [{"name": name, "rounds": 1, "plan": {"objective": name}} for name in objectives]
    return {"stages": stages, **more}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (staged("sft", "reward"), "number 2 is reward and the first sft"),
        (staged("reward", "regression"), "number 2 is regression and the first reward"),
        (staged("sft", "dpo", aggregation={"rule": "fedsa"}), r"stages\.1\.plan\.objective: dpo stays near"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(content, said):
    with pytest.raises(ValidationError, match=said):
        Federation.model_validate(content)


@pytest.mark.parametrize(
    "content",
    [staged("pretraining", "sft", "dpo", "kto"), staged("dpo", aggregation={"rule": "fedsa"}), staged("reward", "reward")],
)
def test_stages_that_can_are_taken(content):
    assert len(Federation.model_validate(content).stages) == len(content["stages"])
