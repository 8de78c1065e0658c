"""Distillation: the soft loss by hand in float64, training as TRL's GKD on given answers, and what cannot be compared."""

import json

import numpy as np
import pytest
from chat_server import serving

from protocol.adapter import Adapter
from protocol.errors import DataError, HardwareError, ModelError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from protocol.writer_settings import EndpointSettings, SecondModel
from strategies import architecture
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.data.ai_feedback import made
from strategies.data.formats import Conversation, Prompt
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure
from strategies.hardware import override, probe
from strategies.narrowing import fitted, narrow
from strategies.objectives.distillation import soft_loss
from strategies.residents import resident_bytes
from strategies.training import fit
from strategies.writer import second_model

ASKED = [({"role": "user", "content": f"Which room has number {n}?"},) for n in range(24)]
ROWS = [Conversation(asked, f"Room {n} is upstairs.") for n, asked in enumerate(ASKED)]


def plan_of(base="tiny", training=None, **distillation):
    return Plan.model_validate(
        {
            "base_model": base,
            "objective": "distillation",
            "lora": {"r": 4, "lora_alpha": 8},
            "distillation": {"teacher": {"base_model": base}, **distillation},
            "training": {"learning_rate": 5e-3, "batch_size": 8, "max_steps": 2, **(training or {})},
        }
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_soft_loss_is_the_papers(temperature):
    """Oracle: T^2 sum_i p_i (log p_i - log q_i) over softmax(z / T) in float64. Padding of one of the two is left out."""
    import torch

    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (7, 11)), rng.normal(0, 3, (7, 13))

    def softmax(logits):
        powers = np.exp(logits / temperature)
        return powers / powers.sum(-1, keepdims=True)

    p, q = softmax(teacher[:, :11]), softmax(student)
    wanted = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    found = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    made = fit(plan_of(hard_weight=0.0), find("tiny"), ROWS)
    assert made.metrics["train-loss"] == pytest.approx(0, abs=1e-6)


def test_a_share_of_the_usual_loss_is_the_usual_loss():
    """With all of the weight on the rows' own answers the same weights come out as of sft; 1e-6 is float32's rounding."""
    hard = fit(plan_of(hard_weight=1.0), find("tiny"), ROWS)
    usual = Plan.model_validate({**plan_of().model_dump(include={"lora", "training"}), "objective": "sft"})
    plain = fit(usual, find("tiny"), ROWS)
    assert hard.metrics["train-loss"] == pytest.approx(plain.metrics["train-loss"], abs=1e-6)
    for name, pair in plain.adapter.factors.items():
        np.testing.assert_allclose(hard.adapter.factors[name].product(), pair.product(), atol=1e-6)


def test_distillation_equals_trls_gkd_on_given_answers(tmp_path):
    """Oracle: GKDTrainer with lmbda 0 (given answers), beta 0 (forward KL), which takes T = 1, and PEFT's LoRA alone."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    teacher = taught(tmp_path)
    settings = {"batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4, "seed": 7, "learning_rate": 1e-3}
    ours = fit(plan_of(training=settings, teacher=teacher, temperature=1.0, hard_weight=0.0), find("tiny"), ROWS)

    folder = str(find("tiny").folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    told = with_adapter(plan_of(), find("tiny"), stored(teacher["adapter"]))[0]
    set_seed(7)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), lora)

    def columns(row):
        before = tokenizer.apply_chat_template(list(row.prompt), tokenize=False, add_generation_prompt=True)
        asked = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(
            tokenizer.apply_chat_template([*row.prompt, {"role": "assistant", "content": row.answer}], tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        return {"input_ids": ids, "labels": [-100] * len(asked) + ids[len(asked) :]}

    def padded(rows):
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(row["input_ids"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=-100),
        }

    trainer = GKDTrainer(
        model=student,
        teacher_model=told,
        args=GKDConfig(
            output_dir=str(tmp_path / "plain"),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            learning_rate=1e-3,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            max_steps=4,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            save_strategy="no",
            seed=7,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
        ),
        data_collator=padded,
        train_dataset=Dataset.from_list([columns(row) for row in ROWS]),
        processing_class=tokenizer,
    )
    assert ours.metrics["train-loss"] == pytest.approx(trainer.train().training_loss, abs=1e-6)
    moved = 0.0
    for name, module in trainer.model.named_modules():
        if hasattr(module, "lora_A"):
            plain = module.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(ours.adapter.factors[name.removeprefix("base_model.model.")].product(), plain, atol=1e-6)
            moved = max(moved, np.abs(plain).max())
    assert moved > 1e-3, "what moves nothing proves nothing"


def taught(folder):
    """A teacher: the base after supervised fine-tuning on the rows."""
    base = find("tiny")
    plan = Plan.model_validate({"lora": {"r": 4, "lora_alpha": 8}, "training": {"learning_rate": 1e-2, "max_steps": 20}})
    trained = fit(plan, base, ROWS)
    manifest = Manifest(base_digest=base.digest, kind="global", r=4, federation="x", round=1, parent="", num_examples=1)
    write_adapter(folder / "teacher", trained.adapter, manifest, plan)
    return {"base_model": "tiny", "adapter": str(folder / "teacher")}


def stored(folder):
    from pathlib import Path

    from protocol.files import read_adapter

    return read_adapter(Path(folder))[0]


def test_a_student_comes_nearer_to_its_teacher_and_to_what_that_knows(tmp_path):
    teacher = taught(tmp_path)
    base, more = find("tiny"), {"max_steps": 20}
    for kind in ({"hard_weight": 0.0}, {"kind": "text"}):
        asked = {**teacher, "max_new_tokens": 16} if kind.get("kind") else teacher
        plan = plan_of(training=more, teacher=asked, **kind)
        rows = [Prompt(asked) for asked in ASKED] if kind.get("kind") else ROWS
        learnt = made(rows, plan, base, Adapter(), training=True).rows
        before, after = measure(plan, base, ROWS), measure(plan, base, ROWS, fit(plan, base, learnt).adapter)
        assert after["perplexity"] < 0.7 * before["perplexity"]


def test_rows_of_a_teacher_that_writes_have_its_answers_and_those_to_measure_keep_their_own():
    with serving(lambda request: request["messages"][-1]["content"].upper()) as chat:
        endpoint = EndpointSettings(base_url=chat.url, model="m").model_dump()
        plan = plan_of(teacher={"endpoint": endpoint}, kind="text")
        rows = [ROWS[0], Prompt(ROWS[1].prompt)]
        learnt = made(rows, plan, find("tiny"), Adapter(), training=True).rows
        held_out = made(rows, plan, find("tiny"), Adapter(), training=False).rows
    assert [row.answer for row in learnt] == ["WHICH ROOM HAS NUMBER 0?", "WHICH ROOM HAS NUMBER 1?"]
    assert [row.answer for row in held_out] == ["Room 0 is upstairs.", "WHICH ROOM HAS NUMBER 1?"]


def test_a_teacher_without_answers_is_told():
    with serving(lambda request: " ") as chat:
        endpoint = EndpointSettings(base_url=chat.url, model="m").model_dump()
        plan = plan_of(teacher={"endpoint": endpoint}, kind="text")
        with pytest.raises(DataError, match="answered none of 24 prompts"):
            made(ROWS, plan, find("tiny"), Adapter(), training=True)


def test_another_vocabulary_is_refused_with_the_way_out(data):
    other = {"base_model": str(data / "models" / "stories260k-hf")}
    with pytest.raises(ModelError, match="write kind: text"):
        fit(plan_of(teacher=other), find("tiny"), ROWS)


def test_prompts_are_read_for_a_teacher_that_writes_and_refused_elsewhere(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Which room?"}) + "\n" + json.dumps({"input_text": "a", "target_text": "b"}) + "\n")
    first, second = load_rows(path, plan_of(kind="text"))
    assert isinstance(first, Prompt)
    assert isinstance(second, Conversation)
    with pytest.raises(DataError, match="line 1: fields prompt"):
        load_rows(path, plan_of())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distillation": None}, "needs a teacher"),
        ({"objective": "sft"}, "distillation is for objective distillation"),
        ({"distillation": {"teacher": {"base_model": "tiny"}, "kind": "text", "hard_weight": 0.3}}, "no soft loss"),
        ({"distillation": {"teacher": {"base_model": "tiny", "max_new_tokens": 3}}}, "teacher writes nothing"),
        ({"distillation": {"teacher": {"endpoint": {"base_url": "http://h", "model": "m"}}}}, "write kind: text"),
    ],
)
def test_what_a_distillation_would_not_look_at_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Plan.model_validate({**plan_of().model_dump(), **change})


def test_a_teachers_weights_take_their_room_and_one_that_only_writes_leaves_before():
    """Oracle: the loaded model's own tensors, four bytes each."""
    model, _ = second_model(SecondModel(base_model="tiny"))
    wanted = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert resident_bytes(plan_of()) == wanted
    assert resident_bytes(plan_of(kind="text")) == 0
    narrowed = narrow(plan_of())
    machine = override(probe(), gpu_memory="1GB")
    known = architecture.read(find("tiny").folder)
    assert fitted(narrowed, known, machine, taken_bytes=wanted) == narrowed
    with pytest.raises(HardwareError):
        fitted(narrowed, known, machine, taken_bytes=10**9)
