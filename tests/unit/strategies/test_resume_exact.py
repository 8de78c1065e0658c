"""A training that died goes on to the bit: the oracle is the same training that nothing interrupted."""

import json
import shutil
from pathlib import Path

import pytest

from protocol.plan import PROMPTS, Plan
from strategies.base_model import find
from strategies.data.formats import Conversation, Feedback, LabelledText, Preference, Prompt
from strategies.training import fit

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STEPS, DIED = 7, 4  # of three steps an epoch: in the midst of the second


def asked(n):
    return ({"role": "user", "content": f"what is the fee of plan {n}?"},)


ROWS = {
    "sft": [Conversation(asked(n), f"it is {n} crowns") for n in range(12)],
    "classification": [LabelledText(f"text number {n}", n % 2) for n in range(12)],
    "dpo": [Preference(asked(n), f"{n} crowns", "nothing") for n in range(12)],
    "kto": [Feedback(asked(n), f"{n} crowns", n % 2 == 0) for n in range(12)],
    "reward": [Preference(asked(n), f"{n} crowns", "nothing") for n in range(12)],
    "rl": [Prompt(asked(n)) for n in range(6)],
}


def plan(method="lora", objective="sft", training=(), **more):
    content = {
        "method": method,
        "objective": objective,
        "lora": {"r": 4, "lora_dropout": 0.1},
        "data": {"max_length": 48, "labels": ["a", "b"] if objective == "classification" else None},
        "training": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": STEPS, "save_steps": 1, "save_total_limit": 99}
        | {"seed": 3, "neftune_noise_alpha": 5.0}
        | dict(training),
    }
    return Plan.model_validate(content | more)


def trained(wanted, folder, **more):
    rows = ROWS[wanted.objective]
    return fit(wanted, find(wanted.base_model), rows, rows[:4], folder=folder, **more)


def die(folder: Path, after: int) -> None:
    """What a kill leaves: nothing of later steps but a folder that is half written."""
    for path in folder.glob("checkpoint-*"):
        step = int(path.name.partition("-")[2])
        if step == after + 1:
            (path / "sealed.json").unlink()
            (path / "trained.pt").write_bytes(b"half")
        elif step > after:
            shutil.rmtree(path)


def assert_goes_on_to_the_bit(wanted, folder, caplog, after=DIED, **more):
    whole = trained(wanted, folder, **more)
    die(folder, after)
    caplog.clear()
    resumed = trained(wanted, folder, **more)
    assert f"after step {after}" in caplog.text
    assert resumed.adapter.digest() == whole.adapter.digest()
    seconds = "train-seconds"
    assert {k: v for k, v in resumed.metrics.items() if k != seconds} == {
        k: v for k, v in whole.metrics.items() if k != seconds
    }


OTHERS = ("full", "freezing", "adalora", "ia3", "bitfit", "bottleneck", *PROMPTS)
SETTINGS = {
    "bitfit": {"bitfit": {"add_missing": True}},
    "freezing": {"freezing": {"frozen_share": 0.9, "thaw_every": 3}},
    "ia3": {"ia3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}},
}


QUICK = ("lora", "prefix-tuning")  # factors, and a network behind what is kept of it


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name not in QUICK)]
)
def test_every_method_goes_on_to_the_bit_in_the_midst_of_an_epoch(tmp_path, caplog, method):
    assert_goes_on_to_the_bit(plan(method, **SETTINGS.get(method, {})), tmp_path, caplog)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("classification", "kto", "reward")]


@pytest.mark.parametrize("objective", ["dpo", *SLOW])
def test_every_objective_goes_on_to_the_bit(tmp_path, caplog, objective):
    assert_goes_on_to_the_bit(plan(objective=objective, training={"neftune_noise_alpha": None}), tmp_path, caplog)


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "after", [3, pytest.param(6, marks=pytest.mark.slow)]
)  # in the midst of two steps on the same answers; where the second epoch begins
def test_reinforcement_learning_goes_on_to_the_bit(tmp_path, monkeypatch, caplog, algorithm, after):
    (tmp_path / "rewards_here.py").write_text("def length(prompts, answers):\n    return [float(len(a)) for a in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    rl = {"algorithm": algorithm, "reward_functions": ["rewards_here:length"], "num_generations": 2, "num_iterations": 2}
    wanted = plan(objective="rl", training={"neftune_noise_alpha": None}, rl=rl | {"max_completion_length": 4})
    assert_goes_on_to_the_bit(wanted, tmp_path / "run", caplog, after=after)


def test_batches_of_rows_of_like_length_go_on_to_the_bit(tmp_path, caplog):
    """Their order is drawn anew each epoch, from a generator of its own."""
    own = {"train_sampling_strategy": "group_by_length", "neftune_noise_alpha": None}
    assert_goes_on_to_the_bit(plan(training=own), tmp_path, caplog)


def test_accumulation_8_bit_moments_and_the_end_of_an_epoch(tmp_path, caplog):
    wanted = plan(training={"batch_size": 2, "gradient_accumulation_steps": 3, "optim": "adamw_8bit", "max_steps": 5})
    assert_goes_on_to_the_bit(wanted, tmp_path, caplog, after=2)


def test_early_stopping_ends_where_it_would_have_ended(tmp_path, caplog):
    """With a rate of next to nothing no evaluation gains after the first: patience, the best and the end are part of it."""
    patient = {"eval_steps": 1, "early_stopping_patience": 3, "learning_rate": 1e-12, "weight_decay": 0.1, "save_steps": None}
    wanted = plan(training=patient | {"max_steps": 20})
    whole = trained(wanted, tmp_path)
    steps = whole.metrics["train-steps"]
    assert steps < 20
    assert_goes_on_to_the_bit(wanted, tmp_path, caplog, after=2)
    assert_goes_on_to_the_bit(wanted, tmp_path, caplog, after=int(steps))


def test_a_prefix_ends_with_the_best_of_its_network_too(tmp_path):
    """What is taken out is what the best checkpoint's network makes; PEFT's own files hold the prefix alone."""
    from protocol.files import read_stored

    evaluated = {"eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 5.0, "neftune_noise_alpha": None}
    wanted = plan("prefix-tuning", training=evaluated | {"lr_scheduler_type": "constant"})
    others = [Conversation(asked(n), "XQZJ WKVY") for n in range(4)]  # the more is learnt of the rows, the less likely
    made = fit(wanted, find("tiny"), ROWS["sft"], others, folder=tmp_path)
    seals = {path.parent: json.loads(path.read_text())["score"] for path in tmp_path.glob("checkpoint-*/sealed.json")}
    best = max(seals, key=seals.get)
    assert best.name != f"checkpoint-{STEPS}", "or there would be nothing to go back from"
    (name,) = made.adapter.dense
    assert (read_stored(best).adapter.dense[name] == made.adapter.dense[name]).all()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog):
    whole = trained(plan(), tmp_path)
    newest = tmp_path / f"checkpoint-{STEPS}" / "trained.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert trained(plan(), tmp_path).adapter.digest() == whole.adapter.digest()
    assert f"checkpoint-{STEPS} is damaged" in caplog.text
    assert f"after step {STEPS - 1}" in caplog.text


def test_another_plan_or_other_rows_begin_anew_and_say_so(tmp_path, caplog):
    trained(plan(training={"max_steps": 2}), tmp_path / "a")
    wanted = plan(training={"max_steps": 2, "learning_rate": 2e-2})
    assert trained(wanted, tmp_path / "a").adapter.digest() == trained(wanted, tmp_path / "b").adapter.digest()
    assert "another plan, other data or another start" in caplog.text
    assert "going on" not in caplog.text
    assert (tmp_path / "a" / "before" / "checkpoint-2").is_dir()
    caplog.clear()
    fit(wanted, find("tiny"), ROWS["sft"][1:], folder=tmp_path / "a")
    assert "another plan, other data or another start" in caplog.text


def kept(folder):
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_without_evaluations_the_newest_checkpoints_stay(tmp_path):
    trained(plan(training={"save_total_limit": 2, "save_steps": 2}), tmp_path)
    assert kept(tmp_path) == [6, 7], "the end is kept too"


def test_the_best_checkpoints_by_evaluation_stay_and_training_ends_with_the_best(tmp_path):
    evaluated = {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 3, "learning_rate": 5e-2}
    made = trained(plan(training=evaluated), tmp_path)
    history = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    best = sorted(losses, key=losses.get)
    assert kept(tmp_path) == sorted({*best[:3], STEPS})

    import torch

    held = torch.load(tmp_path / f"checkpoint-{best[0]}" / "trained.pt", weights_only=True)["parameters"]
    at = next(name for name in held if name.endswith("q_proj.lora_A.default.weight"))
    module = at.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
    assert (held[at].numpy() == made.adapter.factors[module].A).all()


def test_an_adapter_of_a_checkpoint_can_be_used(tmp_path):
    from protocol.files import read_stored

    trained(plan(), tmp_path)
    assert read_stored(tmp_path / f"checkpoint-{STEPS}").adapter.ranks()


def test_epochs_can_be_evaluated_and_kept(tmp_path):
    trained(plan(training={"eval_steps": "epoch", "save_steps": "epoch", "max_steps": 6}), tmp_path)
    assert kept(tmp_path) == [3, 6]
