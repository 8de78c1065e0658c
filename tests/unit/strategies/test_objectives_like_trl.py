"""dpo, kto, reward and regression are what TRL and transformers do: the oracle is a script of theirs alone, with PEFT's LoRA.

The oracles tokenise, truncate, pair and train by themselves, from the same messages, seed and settings. 1e-6 leaves room for
the rounding of float32 sums and no more: a training of these lengths moves weights by 1e-4 and more.
"""

import json
import random

import numpy as np
import pytest

from protocol.plan import Plan
from strategies.base_model import CHAT_TEMPLATE, find
from strategies.data.encode import encode
from strategies.data.formats import load as load_rows
from strategies.training import fit

SEED, STEPS, LENGTH = 7, 4, 200
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}
TRAINING = {"learning_rate": 1e-3, "batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": STEPS}
PLAIN = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "logging_steps": 10,
    "save_strategy": "no",
    "seed": SEED,
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": [],
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def base(data):
    return str(data / "models" / "stories260k-hf")


def chosen(paths):
    """Short rows, then some that are cut and some that are dropped."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: len(json.dumps(row, ensure_ascii=False).encode()))
    return rows[:16] + rows[60:100:8]


@pytest.fixture(scope="module")
def pairs(data):
    return chosen([data / "pref" / "dpo_en.jsonl", data / "pref" / "dpo_zh_500_train.jsonl"])


@pytest.fixture(scope="module")
def liked(data):
    return chosen([data / "pref" / "kto_en.jsonl"])


def plan_of(base, objective, **more):
    content = {"base_model": base, "objective": objective, "lora": LORA, "data": {"max_length": LENGTH}}
    return Plan.model_validate({**content, "training": {**TRAINING, "seed": SEED}, **more})


def ours(plan, rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    trained = fit(plan, find(plan.base_model), load_rows(path, plan))
    return trained.adapter, trained.metrics


def agree(trainer, adapter, metrics):
    """Mean loss, every weight's change, and every tensor that trained whole."""
    assert metrics["train-loss"] == pytest.approx(trainer.train().training_loss, abs=1e-6)
    seen = 0
    for name, module in trainer.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            plain = module.get_delta_weight("default").detach().double().numpy()
            assert np.abs(plain - adapter.factors[name.removeprefix("base_model.model.")].product()).max() <= 1e-6
            seen += 1
    for name, tensor in trainer.model.named_parameters():
        if "modules_to_save.default" in name:
            key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            assert np.abs(tensor.detach().numpy() - adapter.dense[key]).max() <= 1e-6
    assert seen == len(adapter.factors) > 0
    assert max(np.abs(pair.product()).max() for pair in adapter.factors.values()) > 1e-4, "what moves nothing proves nothing"


def messages(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def answer(text):
    return [{"role": "assistant", "content": text}]


def loaded(base, kind, **settings):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    return kind.from_pretrained(base, dtype="float32", **settings), tokenizer


def adapter_config(task, **more):
    from peft import LoraConfig

    return LoraConfig(**LORA, target_modules="all-linear", task_type=task, **more)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "sigmoid", "beta": 0.2},
        pytest.param({"loss_type": "ipo"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "robust", "label_smoothing": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_dpo_equals_plain_trl(base, pairs, tmp_path, loss):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    adapter, metrics = ours(plan_of(base, "dpo", dpo=loss), pairs, tmp_path)
    assert metrics["cut-rows"] > 0
    model, tokenizer = loaded(base, AutoModelForCausalLM)
    columns = [
        {"prompt": messages(row["prompt"]), "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
        for row in pairs
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path / "plain"), max_length=LENGTH, **{**PLAIN, **loss}),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        peft_config=adapter_config("CAUSAL_LM"),
    )
    assert metrics["dropped-rows"] == len(pairs) - len(trainer.train_dataset) > 0
    agree(trainer, adapter, metrics)


def test_kto_equals_plain_trl(base, liked, tmp_path):
    """In the order that ours draws: TRL trains rows as they lie."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer

    settings = {"beta": 0.2, "desirable_weight": 1.3}
    adapter, metrics = ours(plan_of(base, "kto", kto=settings), liked, tmp_path)
    model, tokenizer = loaded(base, AutoModelForCausalLM)

    def tokens(row):
        asked = tokenizer.apply_chat_template(messages(row["prompt"]), add_generation_prompt=True)
        return len(asked["input_ids"])

    drawn = [row for row in liked if tokens(row) < LENGTH]
    assert metrics["dropped-rows"] == len(liked) - len(drawn) > 0
    random.Random(SEED).shuffle(drawn)
    columns = [
        {"prompt": messages(row["prompt"]), "completion": answer(row["completion"]), "label": row["label"]} for row in drawn
    ]
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(output_dir=str(tmp_path / "plain"), max_length=LENGTH, **{**PLAIN, **settings}),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        peft_config=adapter_config("CAUSAL_LM"),
    )
    agree(trainer, adapter, metrics)


def test_a_reward_model_equals_plain_trl(base, pairs, tmp_path):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, set_seed
    from trl import RewardConfig, RewardTrainer

    adapter, metrics = ours(plan_of(base, "reward"), pairs, tmp_path)
    set_seed(SEED)
    model, tokenizer = loaded(base, AutoModelForSequenceClassification, num_labels=1)
    columns = [
        {
            "chosen": messages(row["prompt"]) + answer(row["chosen"]),
            "rejected": messages(row["prompt"]) + answer(row["rejected"]),
        }
        for row in pairs
    ]
    trainer = RewardTrainer(
        model=get_peft_model(model, adapter_config("SEQ_CLS", modules_to_save=["score"], exclude_modules=["score"])),
        args=RewardConfig(output_dir=str(tmp_path / "plain"), max_length=LENGTH, **PLAIN),
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
    )
    assert metrics["dropped-rows"] == len(pairs) - len(trainer.train_dataset) > 0
    agree(trainer, adapter, metrics)


def test_regression_equals_the_plain_trainer(data, base, tmp_path):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    lines = (data / "classify" / "snips_test.jsonl").read_text().splitlines()[:40]
    rows = [{"text": (text := json.loads(line)["text"]), "label": len(text) / 50} for line in lines]
    rows[0]["label"] = 1  # a whole number is a number
    adapter, metrics = ours(plan_of(base, "regression"), rows, tmp_path)
    set_seed(SEED)
    model, tokenizer = loaded(base, AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    columns = [{"input_ids": tokenizer(row["text"])["input_ids"], "labels": float(row["label"])} for row in rows]
    trainer = Trainer(
        model=get_peft_model(model, adapter_config("SEQ_CLS", modules_to_save=["score"], exclude_modules=["score"])),
        args=TrainingArguments(output_dir=str(tmp_path / "plain"), **PLAIN),
        train_dataset=Dataset.from_list(columns),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    agree(trainer, adapter, metrics)


def test_packed_texts_are_what_trl_makes_of_them(data, base, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    texts = [json.loads(line)["text"][:1500] for line in (data / "text" / "wiki_en.jsonl").read_text().splitlines()[:4]]
    texts.append("A short one.")
    model, tokenizer = loaded(base, AutoModelForCausalLM)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_length=LENGTH, packing=True, packing_strategy="wrapped", **PLAIN),
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
    )
    plan = plan_of(base, "pretraining")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = encode(load_rows(path, plan), tokenizer, LENGTH, "pretraining")
    assert [row["input_ids"] for row in made.rows] == [row["input_ids"] for row in trainer.train_dataset]
    assert all(row["labels"] == row["input_ids"] for row in made.rows)
