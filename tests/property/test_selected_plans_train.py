"""Every kind of plan that the selector returns takes a real step on the embedded model, and comes back as an adapter.

GPU plans are carried out on a CPU: what only a GPU has (fp16, 8-bit and paged optimizers) is replaced, all else is as selected.
"""

import pytest

from protocol.plan import Plan
from strategies.architecture import read
from strategies.base_model import find
from strategies.data.formats import load
from strategies.hardware import Hardware, override
from strategies.selector import select
from strategies.task import Task
from strategies.training import fit

GIB = 2**30
HOST = Hardware((), 8, 64 * GIB, 48 * GIB, 500 * GIB)
# The selector sees a model of the embedded one's architecture that is large enough to matter.
LLAMA = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 32000}
MODEL = read(LLAMA | {"intermediate_size": 5632, "max_position_embeddings": 2048})
TASKS = [
    {},
    {"output_tokens": 500, "rows": 200_000},
    {"kind": "classification", "classes": 3, "rows": 100},
    {"kind": "classification", "classes": 3, "similarity": 0.9},
    {"kind": "regression"},
    {"kind": "pretraining"},
    {"kind": "code", "expertise": "expert"},
    {"shift": "small"},
    {"shift": "pretraining"},
    {"feedback": "pairs", "preference_pairs": 100},
    {"feedback": "pairs", "preference_pairs": 100, "quality": "critical", "expertise": "expert"},
    {"feedback": "single"},
    {"on_device": True},
]
ROWS = {
    "sft": '{"input_text": "a question", "target_text": "an answer to it"}',
    "classification": '{"text": "a text", "label": "b"}',
    "regression": '{"text": "a text", "label": 0.5}',
    "pretraining": '{"text": "some plain text to read on and on"}',
    "dpo": '{"prompt": "a question", "chosen": "a good answer", "rejected": "a bad one"}',
    "reward": '{"prompt": "a question", "chosen": "a good answer", "rejected": "a bad one"}',
    "kto": '{"prompt": "a question", "completion": "an answer", "label": true}\n'
    '{"prompt": "another", "completion": "one more", "label": false}',
    "rl": '{"prompt": "a question"}',
}


def kinds():
    """One plan of each method, objective and precision that is selected for any of the tasks on any of the machines."""
    found = {}
    for task in TASKS:
        for machine in ("a100-80gb", "rtx-4060", "t4", None):
            hardware = override(HOST, profile=machine)
            wishes = {"bitfit.add_missing": True} if task.get("shift") == "pretraining" else {}
            for one in select(Task(**task), hardware, MODEL, wishes=wishes).feasible:
                for plan in one.stages:
                    found.setdefault((plan.method, plan.objective, plan.precision), plan)
    return found


KINDS = kinds()


def on_this_machine(plan):
    content = plan.model_dump()
    content["base_model"] = "tiny"
    content["data"] |= {"max_length": 64, "labels": ("a", "b", "c") if plan.objective == "classification" else None}
    content["training"] |= {"max_steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "optim": "adamw_torch"}
    content["training"] |= {"eval_steps": None, "early_stopping_patience": None, "save_steps": None}
    if content["training"]["mixed_precision"] == "fp16":
        content["training"]["mixed_precision"] = "fp32"
    if plan.precision == "fp16":
        content["precision"] = "bf16"
    if plan.objective == "rl":
        content["rl"] |= {"reward_model": None, "reward_functions": (f"{__name__}:short",), "max_completion_length": 4}
        content["rl"] |= {"num_generations": 2}
    return Plan.model_validate(content)


def short(prompts, answers):
    """Shorter is better."""
    return [-float(len(answer)) for answer in answers]


@pytest.mark.parametrize("kind", KINDS, ids=" ".join)
def test_a_selected_plan_takes_a_real_step(kind, tmp_path):
    plan = on_this_machine(KINDS[kind])
    path = tmp_path / "rows.jsonl"
    path.write_text((ROWS[plan.objective] + "\n") * 4, encoding="utf-8")

    trained = fit(plan, find("tiny"), load(path, plan))

    assert trained.metrics["train-steps"] == 1
    assert trained.adapter.factors or trained.adapter.dense


def test_many_kinds_are_selected():
    assert len(KINDS) >= 30, sorted(KINDS)
    assert {"lora", "qlora", "full", "freezing", "adalora", "prompt-tuning", "prefix-tuning", "bitfit"} <= {k[0] for k in KINDS}
    assert {"sft", "classification", "regression", "pretraining", "dpo", "kto", "reward", "rl"} == {k[1] for k in KINDS}
