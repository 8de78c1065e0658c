"""What the plan says about training reaches the Hugging Face Trainer: checkpoints, logs, early stopping, mixed precision."""

import json

import pytest

from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.formats import Conversation
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(24)]


def plan(**training):
    settings = {"learning_rate": 5e-3, "batch_size": 8, "max_steps": 6, "logging_steps": 1, **training}
    return Plan.model_validate({"base_model": "tiny", "lora": {"r": 4, "lora_alpha": 8}, "training": settings})


def test_checkpoints_and_tensorboard_logs_are_kept_in_the_folder(tmp_path):
    fit(plan(save_steps=2, save_total_limit=2, tensorboard=True), find("tiny"), ROWS, folder=tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(plan(save_steps=2), find("tiny"), ROWS)
    assert list(tmp_path.iterdir()) == []


def test_training_stops_early_when_held_out_loss_rises_and_keeps_the_best(tmp_path):
    contradicting = [Conversation(row.prompt, "Nowhere at all, ask the porter.") for row in ROWS]
    settings = plan(max_steps=40, eval_steps=2, early_stopping_patience=2, learning_rate=2e-2, lr_scheduler_type="constant")
    trained = fit(settings, find("tiny"), ROWS, contradicting, folder=tmp_path)
    assert trained.metrics["train-steps"] < 40
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    state = json.loads((last / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_metric"] == pytest.approx(min(losses))


def test_accumulation_of_small_batches_is_one_large_batch():
    """Oracle: the mean gradient does not depend on how a batch is cut, where every row has equally many answer tokens."""
    same = [Conversation(row.prompt, "Room.") for row in ROWS]
    whole = fit(plan(max_steps=3, batch_size=24), find("tiny"), same).adapter
    parts = fit(plan(max_steps=3, batch_size=8, gradient_accumulation_steps=3), find("tiny"), same).adapter
    for name, pair in whole.factors.items():
        assert abs(pair.product() - parts.factors[name].product()).max() < 1e-4


@pytest.mark.parametrize("change", [{"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_bf16_and_checkpointing_train_nearly_the_same_adapter(change):
    plain, other = (fit(plan(**settings), find("tiny"), ROWS).metrics["train-loss"] for settings in ({}, change))
    assert other == pytest.approx(plain, rel=0.05)
