"""Each selection rule, by its id: what fires it, and what it does to the choice. The expectations are the issue's sentences."""

from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import ConfigurationError
from protocol.plan import Plan
from strategies import rules
from strategies.architecture import read
from strategies.hardware import PROFILES, Hardware, override
from strategies.selector import select
from strategies.task import Limits, Task

GIB = 2**30
HOST = Hardware((), 8, 64 * GIB, 48 * GIB, 500 * GIB)
BERT = {"model_type": "bert"}
LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
SMALL = {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True}
GPT2 = {"model_type": "gpt2"}
PAIRS = {"feedback": "pairs", "preference_pairs": 2000}
LABELS = {"kind": "classification", "classes": 10, "rows": 5000}


def chosen(task, model=LLAMA, machine="a100-80gb", *, gpus=None, limits=None, wishes=None):
    found = select(Task(**task), override(HOST, profile=machine, gpus=gpus), read(model), limits or Limits(), wishes or {})
    assert found.chosen is not None, found.rejected
    return found


def ids(found):
    return [rule.id for rule in found.rules]


# (rule, task, more of ``chosen``, method, fields of the plan)
CASES = [
    ("classification-small", {"kind": "classification", "classes": 5, "rows": 999}, {"model": BERT}, "lora",
     {"lora.r": 8, "lora.target_modules": ("query", "value"), "training.num_train_epochs": 5, "training.learning_rate": 2e-5}),
    ("classification-many-classes", {"kind": "classification", "classes": 21, "rows": 5000}, {"model": BERT}, "full",
     {"training.num_train_epochs": 3, "training.learning_rate": 1e-5, "training.warmup_ratio": 0.1,
      "training.weight_decay": 0.01, "dropout": 0.1}),
    ("classification-many-rows", {"kind": "classification", "classes": 3, "rows": 10_001}, {"model": BERT}, "full",
     {"training.num_train_epochs": 3, "training.learning_rate": 1e-5, "dropout": 0.1}),
    ("classification-between", LABELS, {"model": BERT}, "lora",
     {"lora.r": 16, "lora.target_modules": ("query", "key", "value", "dense")}),
    ("near-domain", LABELS | {"similarity": 0.81}, {"model": BERT}, "freezing", {"freezing.frozen_share": 0.7}),
    ("regression", {"kind": "regression"}, {"model": BERT}, "lora", {"objective": "regression"}),
    ("short-answers", {"output_tokens": 128}, {}, "lora",
     {"lora.r": 16, "lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}),
    ("answers", {"output_tokens": 129}, {}, "lora", {"lora.r": 32, "lora.target_modules": "all-linear"}),
    ("long-answers", {"output_tokens": 1025, "input_tokens": 2048}, {"model": SMALL}, "full", {"objective": "sft"}),
    ("creative", {"creative": True}, {"model": SMALL}, "full", {"objective": "sft"}),
    ("creative", {"creative": True}, {"machine": "rtx-4090"}, "lora", {"lora.r": 32, "lora.target_modules": "all-linear"}),
    ("question-answering", {"kind": "question-answering"}, {}, "lora", {"lora.r": 16}),
    ("code", {"kind": "code", "expertise": "expert"}, {}, "adalora", {"lora.target_modules": "all-linear"}),
    ("many-tasks", {"tasks": 3, "output_tokens": 200}, {}, "adalora", {}),
    ("style", {"shift": "small"}, {}, "prompt-tuning", {}),
    ("small-model-prompts", {"shift": "small"}, {"model": SMALL}, "p-tuning-v2", {}),
    ("near-pretraining", {"shift": "pretraining"}, {"model": GPT2}, "bitfit", {}),
    ("many-domains", {"domains": 3}, {}, "lora", {}),
    ("continued-pretraining", {"kind": "pretraining"}, {"model": SMALL}, "full", {"objective": "pretraining"}),
    ("full-critical", {"quality": "critical", "output_tokens": 200}, {"model": SMALL}, "full", {}),
    ("full-data", {"rows": 100_000, "output_tokens": 200, "speed": "thorough"}, {"model": SMALL}, "lora", {}),
    ("consumer-gpu", {}, {"machine": "rtx-4090"}, "lora", {"precision": "bf16"}),
    ("prototype", {"situation": "prototype"}, {}, "lora", {"training.num_train_epochs": 1}),
    ("production", {"situation": "production"}, {}, "lora", {}),
    ("default", {}, {}, "lora", {}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "task", "more", "method", "fields"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_fires_and_sets_up_what_it_says(rule, task, more, method, fields):
    found = chosen(task, **more)
    assert rule in ids(found)
    assert found.chosen.plan.method == method
    for name, value in fields.items():
        plan = found.chosen.plan
        for part in name.split("."):
            plan = getattr(plan, part)
        assert plan == value, name


STAGES = [
    ("preference-pairs", PAIRS, ["sft", "dpo"], {"training.learning_rate": 5e-5}),
    ("single-feedback", {"feedback": "single"}, ["sft", "kto"], {}),
    ("reward-reinforcement", PAIRS | {"quality": "critical", "expertise": "expert"}, ["sft", "reward", "rl"], {}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "task", "stages", "fields"), STAGES, ids=[case[0] for case in STAGES])
def test_feedback_is_learnt_after_instruction_tuning(rule, task, stages, fields):
    found = chosen(task)
    assert rule in ids(found)
    assert [stage.objective for stage in found.chosen.stages] == stages
    for name, value in fields.items():
        plan = found.chosen.stages[-1]
        for part in name.split("."):
            plan = getattr(plan, part)
        assert plan == value


def test_a_reward_that_can_be_computed_is_optimised_after_instruction_tuning():
    task = {"feedback": "reward", "expertise": "expert"}
    found = chosen(task, wishes={"rl.reward_functions": ["rewards:short"]})
    assert found.chosen.rule.id == "reward-function"
    assert [stage.objective for stage in found.chosen.stages] == ["sft", "rl"]
    assert found.chosen.stages[1].rl.reward_functions == ("rewards:short",)
    without = chosen(task)
    assert any("needs a reward" in one.reason for one in without.rejected)
    assert "rl" not in [stage.objective for stage in without.chosen.stages]


def test_full_preference_optimisation_has_a_rate_of_its_own():
    found = chosen(PAIRS, model=SMALL, wishes={"method": "full"})
    assert [stage.training.learning_rate for stage in found.chosen.stages] == [1e-5, 5e-6]


ADVICE = [
    ("private", {"private": True}, {}, "federated"),
    ("on-device", {"on_device": True}, {"model": SMALL, "machine": "rtx-4060"}, "4 or 8 bits"),
    ("low-memory-classification", LABELS, {"machine": "rtx-4090"}, "an encoder"),
    ("many-domains", {"domains": 2}, {}, "one adapter for each domain"),
    ("consumer-gpu", {}, {"machine": "rtx-3090"}, "DPO"),
    ("production", {"situation": "production"}, {}, "version"),
]


@pytest.mark.parametrize(("rule", "task", "more", "said"), ADVICE, ids=[case[0] for case in ADVICE])
def test_what_no_plan_can_hold_is_said_as_advice(rule, task, more, said):
    found = chosen(task, **more)
    (advice,) = [text for text in found.advice if f"rule {rule} " in text]
    assert said in advice


def test_on_a_device_the_base_has_4_or_8_bits_and_whole_weights_never_train():
    found = chosen({"on_device": True}, SMALL, "rtx-4060")
    assert {one.plan.precision for one in found.feasible} == {"nf4", "int8"}
    assert {"full bf16", "full fp32"} <= {one.name for one in found.rejected}


@pytest.mark.parametrize(
    ("rule", "task", "name"),
    [
        ("many-tasks", {"tasks": 2}, "multi-task"),
        ("rich-multi-task", {"tasks": 2, "quality": "critical"}, "multi-task"),
        ("ai-feedback", {"feedback": "judge", "expertise": "expert"}, "ai-feedback"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_rule_asks_for_and_this_version_lacks_is_rejected_by_name_and_the_next_is_taken(rule, task, name):
    found = chosen(task, gpus=2)
    assert rule in ids(found)
    reasons = [one.reason for one in found.rejected if one.name.startswith(name)]
    assert reasons
    assert all("not built in this version" in reason for reason in reasons)


def test_experts_are_for_several_domains_in_one_model_and_need_a_base_that_has_some():
    several = {"domains": 2, "one_model": True, "expertise": "expert"}
    dense = chosen(several)
    assert "multi-domain-capacity" in ids(dense)
    assert {one.reason for one in dense.rejected if one.name.startswith("experts")} == {
        "the base has no experts; give a mixture of experts"
    }
    mixture = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1024}
    assert chosen(several, mixture).chosen.plan.method == "experts"


def test_low_memory_takes_qlora_where_lora_does_not_fit_and_soft_prompts_below_that():
    """7 B: LoRA needs about 15 GB at its smallest, QLoRA 5.6, soft prompts a little less."""
    sizes = {"24GB": "lora", "12GB": "qlora"}
    for size, method in sizes.items():
        found = select(Task(), override(HOST, gpu_memory=size), read(LLAMA))
        assert found.chosen.plan.method == method
    assert "low-memory" in ids(found)
    assert found.ladder[-1].plan.method in ("prefix-tuning", "prompt-tuning")


def test_plenty_of_data_brings_layer_wise_freezing_into_question():
    found = chosen({"rows": 20_000, "output_tokens": 200}, SMALL)
    assert "plenty-of-data" in ids(found)
    assert any(one.plan.method == "freezing" for one in found.feasible)


@pytest.mark.parametrize(("similarity", "share"), [(None, 0.2), (0.0, 0.2), (0.5, 0.2), (0.51, 0.4), (0.8, 0.4), (0.81, 0.7)])
def test_the_nearer_the_data_the_more_layers_are_frozen(similarity, share):
    assert rules.frozen_share(similarity) == share


def test_fast_takes_the_cheapest_that_fits():
    found = chosen({"speed": "fast"})
    assert found.chosen.seconds == pytest.approx(min(one.seconds for one in found.feasible), rel=0.25)
    slow = chosen({"speed": "thorough"})
    assert slow.chosen.preference == max(one.preference for one in slow.feasible)


def test_a_beginner_is_not_handed_reinforcement_learning():
    task, wishes = {"feedback": "reward"}, {"rl.reward_functions": ["rewards:short"]}
    assert [stage.objective for stage in chosen(task | {"expertise": "expert"}, wishes=wishes).chosen.stages] == ["sft", "rl"]
    found = chosen(task | {"expertise": "beginner"}, wishes=wishes)
    assert "rl" not in [stage.objective for stage in found.chosen.stages]
    assert any("complexity 5 of 5, expertise beginner" in one.reason for one in found.rejected)


@pytest.mark.parametrize(
    ("method", "objective", "rate"),
    [("lora", "sft", 2e-4), ("full", "sft", 1e-5), ("lora", "dpo", 5e-5), ("full", "dpo", 5e-6)],
)
def test_where_sources_disagree_the_defaults_hold(method, objective, rate):
    found = chosen(PAIRS, SMALL, wishes={"method": method, "objective": objective})
    training = found.chosen.plan.training
    assert training.learning_rate == rate
    assert (training.warmup_ratio, training.lr_scheduler_type, training.weight_decay) == (0.1, "cosine", 0.01)
    assert (training.max_grad_norm, training.save_steps, training.early_stopping_patience) == (1.0, 500, 3)
    assert training.optim == "adamw_torch"


def test_every_rule_has_an_id_of_its_own_a_source_and_a_test_here():
    names = [rule.id for rule in rules.RULES]
    assert len(set(names)) == len(names)
    assert all(rule.source for rule in rules.RULES)
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in names if f'"{name}"' not in here] == []


def test_every_field_that_was_decided_has_a_reason():
    found = chosen({"kind": "classification", "classes": 4, "rows": 500}, BERT, wishes={"lora.r": 4})
    told = found.chosen.plan.model_dump(exclude_defaults=True)
    flat = {f"{k}.{i}" if isinstance(v, dict) else k for k, v in told.items() for i in (v if isinstance(v, dict) else [""])}
    assert flat - {"objective", "lora.lora_alpha"} <= set(found.chosen.reasons)  # alpha follows the rank
    assert found.chosen.reasons["lora.r"] == "as wished"
    assert "classification-small" in found.chosen.reasons["training.learning_rate"]


def test_wishes_that_no_plan_can_have_are_all_told_at_once():
    with pytest.raises(ConfigurationError) as error:
        chosen({}, wishes={"lora.r": 0, "training.optim": "adam", "lora.rank": 3, "method": "qlora", "precision": "bf16"})
    assert len(error.value.problems) >= 3


def test_machines_without_bf16_compute_in_fp16():
    found = chosen({}, SMALL, "t4")
    assert (found.chosen.plan.precision, found.chosen.plan.training.mixed_precision) == ("fp16", "fp16")


def test_without_rates_hours_are_not_known_and_it_is_said():
    gpu = replace(PROFILES["rtx-4090"].gpus[0], rates=None)
    found = select(Task(), replace(HOST, gpus=(gpu,)), read(SMALL))
    assert found.chosen.seconds is None
    assert any("not known" in warning for warning in found.warnings)


def test_an_encoder_is_not_asked_to_write():
    found = select(Task(), override(HOST, profile="rtx-4090"), read(BERT))
    assert found.chosen is None
    assert all("writes no text" in one.reason for one in found.rejected)


def test_a_plan_is_a_plan():
    assert isinstance(chosen({}).chosen.plan, Plan)
