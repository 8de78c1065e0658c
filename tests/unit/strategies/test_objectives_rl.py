"""Reinforcement learning on answers of the model's own: where rewards come from, what is refused, and that they rise."""

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ConfigurationError, DataError, ModelError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import answered_ids, encode
from strategies.data.formats import Prompt
from strategies.evaluation.preferences import figures
from strategies.methods import registry
from strategies.objectives.rewards import rewards_of
from strategies.training import fit

ROWS = [Prompt(({"role": "user", "content": f"Which room has number {n}?"},)) for n in range(24)]
RULES = """
def vowels(prompts, answers):
    return [10 * sum(c in "aeiou" for c in answer) / max(len(answer), 1) for answer in answers]

def asked(prompts, answers):
    return [len(prompt[-1]["content"]) for prompt in prompts]

def too_few(prompts, answers):
    return [1.0]

def no_numbers(prompts, answers):
    return [float("nan")] * len(answers)

word = "vowels"
"""


@pytest.fixture(autouse=True)
def _rules(tmp_path, monkeypatch):
    (tmp_path / "rules_of_the_rl_test.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)


def plan_of(*functions, base="tiny", training=None, **rl):
    settings = {"reward_functions": [f"rules_of_the_rl_test:{name}" for name in functions], "num_generations": 4, **rl}
    settings = {"max_completion_length": 8, **settings}
    return Plan.model_validate(
        {
            "base_model": base,
            "objective": "rl",
            "lora": {"r": 4, "lora_alpha": 8},
            "rl": settings,
            "training": {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 2, **(training or {})},
        }
    )


def drawn(plan, seed=0):
    rng = np.random.default_rng(seed)
    shape = registry.shape(find(plan.base_model), plan)
    factors = {
        name: Factors(rng.standard_normal((2, d_in)).astype("f4") / 9, rng.standard_normal((d_out, 2)).astype("f4") / 9)
        for name, (d_out, d_in) in shape.modules.items()
    }
    return Adapter(factors, {name: rng.standard_normal(size).astype("f4") for name, size in shape.dense.items()})


def saved(folder, plan, adapter):
    base = find(plan.base_model)
    manifest = Manifest(base_digest=base.digest, kind="global", r=2, federation="x", round=1, parent="", num_examples=1)
    write_adapter(folder, adapter, manifest, plan)
    return str(folder)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize(
    "more",
    [
        {"num_iterations": 2, "temperature": 0.7},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"beta": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_both_algorithms_take_steps_on_answers_of_their_own(algorithm, more):
    made = fit(plan_of("vowels", algorithm=algorithm, **more), find("tiny"), ROWS)
    assert made.metrics["train-steps"] == 2
    assert max(np.abs(pair.product()).max() for pair in made.adapter.factors.values()) > 0


def test_near_another_adapter_than_the_base_a_second_model_says_what_is_likely():
    """Near its own start the distance is zero in the first step; near the base it is not: the steps differ."""
    sgd = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    plan = plan_of("asked", beta=10.0, training=sgd)
    start = drawn(plan)
    near, far = (fit(plan, find("tiny"), ROWS, start=start, reference=each).adapter for each in (None, Adapter()))
    before = {name: pair.product() for name, pair in start.factors.items()}
    # All answers to a prompt have one reward, so nothing but the distance can move the policy.
    moved = [max(np.abs(made.factors[name].product() - before[name]).max() for name in before) for made in (near, far)]
    assert moved[0] < 1e-6 < 1e-4 < moved[1]


def test_several_rewards_are_what_each_function_says():
    prompts, answers = [ROWS[0].prompt, ROWS[20].prompt], ["aaaa", "aabb"]
    first, second = rewards_of(plan_of("vowels", "asked"))
    assert first(prompts, answers) == [10, 5]
    assert second(prompts, answers) == [len("Which room has number 0?"), len("Which room has number 20?")]


def test_a_reward_adapter_scores_whole_conversations(tmp_path):
    """Oracle: the same adapter over the same base, one answer at a time."""
    import torch

    reader = Plan.model_validate({"objective": "reward", "lora": {"r": 2, "lora_alpha": 2}})
    adapter = drawn(reader)
    folder = saved(tmp_path / "reward", reader, adapter)
    answers = ["In the hall.", "No."]
    (found,) = rewards_of(plan_of(reward_model=folder, reward_functions=[]))
    model, tokenizer = with_adapter(reader, find("tiny"), adapter)
    with torch.no_grad():
        wanted = [
            float(model(torch.tensor([answered_ids(row.prompt, answer, tokenizer)])).logits[0, 0])
            for row, answer in zip(ROWS, answers, strict=False)
        ]
    assert found([row.prompt for row in ROWS[:2]], answers) == pytest.approx(wanted, abs=1e-4)
    assert wanted[0] != wanted[1]


def test_a_whole_sequence_classifier_scores_too(tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(find("tiny").folder, num_labels=1).save_pretrained(tmp_path / "scorer")
    AutoTokenizer.from_pretrained(find("tiny").folder).save_pretrained(tmp_path / "scorer")
    (found,) = rewards_of(plan_of(reward_model=str(tmp_path / "scorer"), reward_functions=[]))
    one, two = found([ROWS[0].prompt] * 2, ["In the hall.", "No."])
    assert one != two


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:vowels", "no module 'no_such_module'"),
        ("rules_of_the_rl_test:nothing", "no function of that name"),
        ("rules_of_the_rl_test:word", "no function of that name"),
        ("rules_of_the_rl_test", "expected module:function"),
        (":vowels", "expected module:function"),
    ],
)
def test_a_function_that_is_not_there_is_named(name, said):
    with pytest.raises(ConfigurationError, match=said):
        rewards_of(plan_of(reward_functions=[name]))


@pytest.mark.parametrize("name", ["too_few", "no_numbers"])
def test_a_function_that_gives_no_number_for_each_answer_is_named(name):
    (reward,) = rewards_of(plan_of(name))
    with pytest.raises(ConfigurationError, match=name):
        reward([ROWS[0].prompt] * 2, ["a", "b"])


def test_what_does_not_score_is_refused_as_a_reward_model(tmp_path):
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        rewards_of(plan_of(reward_model="tiny"))
    sft = Plan.model_validate({"lora": {"r": 2, "lora_alpha": 2}})
    with pytest.raises(AdapterError, match="objective reward is SEQ_CLS"):
        rewards_of(plan_of(reward_model=saved(tmp_path / "sft", sft, drawn(sft))))


def test_fewer_prompts_than_one_step_takes_are_refused():
    with pytest.raises(DataError, match="1 prompt"):
        fit(plan_of("vowels"), find("tiny"), ROWS[:1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rl": {}}, "objective rl needs a reward"),
        ({"training": {"batch_size": 6}}, "does not divide"),
        ({"objective": "sft"}, "rl is for objective rl"),
    ],
)
def test_a_plan_that_cannot_take_whole_groups_of_answers_is_refused(change, said):
    content = {"objective": "rl", "rl": {"reward_functions": ["m:f"]}}
    with pytest.raises(ValueError, match=said):
        Plan.model_validate(content | change)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "weak", "strong"), [("grpo", 0.05, 2.0), ("rloo", 0.0, 0.5)])
def test_a_rule_based_reward_rises_and_the_pull_bounds_the_distance(algorithm, weak, strong):
    """RLOO raises E[reward] - beta KL(answer): what is worth more than the base is at most (gain of reward) / beta nats away.

    GRPO pushes a token by its answer's advantage A and pulls by beta (1 - pi_ref / pi), the gradient of arXiv:2402.03300,
    eq. 4, so a weak pull never holds an answer with A > beta; A counts standard deviations of the group, with 8 at most 2.5.
    """
    base, nats, rewards = find("tiny"), {}, {}
    for beta in (weak, strong):
        plan = plan_of(
            "vowels",
            algorithm=algorithm,
            beta=beta,
            num_generations=8,
            max_completion_length=24,
            training={"batch_size": 32, "max_steps": 20, "learning_rate": 3e-3, "lr_scheduler_type": "constant_with_warmup"},
        )
        rows = encode(ROWS * 4, load_tokenizer(base), plan.data.max_length, "rl").rows
        before = figures(plan, base, rows, None, Adapter())["reward"].value
        found = figures(plan, base, rows, fit(plan, base, ROWS).adapter, Adapter())
        rewards[beta], nats[beta] = found["reward"].value, found["kl"].rows[:, 0].mean()
    assert min(rewards.values()) > 1.2 * before
    assert 0 < nats[strong] < nats[weak] / 2
    if algorithm == "rloo":
        assert nats[strong] < (rewards[strong] - before) / strong
