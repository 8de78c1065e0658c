"""Stages of one job: each goes on from the one before, what is done stays, what died goes on to the bit."""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

import fedge
from protocol.configuration import parse
from protocol.errors import ConfigurationError
from protocol.files import read_adapter
from simulations.single import train_alone
from strategies.job import Job


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def content(tmp_path):
    """A job of two stages, as its YAML file holds it."""
    questions = [f"what is the fee of plan {n}?" for n in range(16)]
    answers = [{"input_text": q, "target_text": f"it is {n} crowns"} for n, q in enumerate(questions)]
    pairs = [{"prompt": q, "chosen": f"{n} crowns", "rejected": "nothing"} for n, q in enumerate(questions)]
    return {
        "lora": {"r": 4, "lora_dropout": 0.1},
        "data": {"max_length": 64},
        "training": {"learning_rate": 5e-3, "batch_size": 4, "max_steps": 3, "seed": 1},
        "output": str(tmp_path / "run"),
        "stages": [
            {"data": {"train": write(tmp_path / "answers.jsonl", answers)}},
            {"objective": "dpo", "data": {"train": write(tmp_path / "pairs.jsonl", pairs)}, "training": {"max_steps": 2}},
        ],
    }


def job_of(content):
    return parse(content, Job, source="job")


def adapter(folder):
    return read_adapter(Path(folder) / "adapter")[0]


def test_stages_are_laid_over_what_they_have_in_common(content):
    first, second = job_of(content).jobs()
    assert (first.objective, first.training.max_steps, first.training.batch_size) == ("sft", 3, 4)
    assert (second.objective, second.training.max_steps, second.training.batch_size) == ("dpo", 2, 4)
    assert second.data.max_length == 64
    assert [stage.output.name for stage in (first, second)] == ["1-sft", "2-dpo"]
    assert (first.start, second.start) == (None, first.output / "adapter")


def test_a_job_of_two_stages_is_two_jobs_of_which_the_second_starts_from_the_first(content, tmp_path):
    record = train_alone(job_of(content))
    assert record.accepted["local"]["train-steps"] == 2
    common = {key: value for key, value in content.items() if key not in ("stages", "output")}
    for number, stage in enumerate(content["stages"], 1):
        alone = common | stage | {"data": common["data"] | stage["data"], "output": str(tmp_path / f"alone-{number}")}
        alone["training"] = common["training"] | stage.get("training", {})
        if number == 2:
            alone["start"] = str(tmp_path / "alone-1" / "adapter")
        train_alone(job_of(alone))
    run = tmp_path / "run"
    assert adapter(run / "1-sft").digest() == adapter(tmp_path / "alone-1").digest()
    assert adapter(run / "2-dpo").digest() == adapter(tmp_path / "alone-2").digest() == adapter(run).digest()
    assert adapter(run / "1-sft").digest() != adapter(run).digest()


def trained_when(run):
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/stage.json")}


def test_what_is_done_is_not_trained_again_and_what_changed_is(content, tmp_path, caplog):
    said = []
    first = train_alone(job_of(content), say=said.append)
    before = trained_when(tmp_path / "run")
    assert train_alone(job_of(content), say=said.append) == first
    assert trained_when(tmp_path / "run") == before
    assert sum("trained already" in line for line in said) == 2
    content["stages"][1]["training"]["max_steps"] = 1
    train_alone(job_of(content))
    assert trained_when(tmp_path / "run")["1-sft"] == before["1-sft"]
    assert "2-dpo was begun with another plan, other data or another start; it begins anew" in caplog.text
    assert "1-sft" not in caplog.text
    rows = tmp_path / "answers.jsonl"
    rows.write_text(rows.read_text().replace("it is 3 crowns", "it is 33 crowns"))
    train_alone(job_of(content))
    assert trained_when(tmp_path / "run")["1-sft"] > before["1-sft"], "the rows are others"
    again = tmp_path / "again"
    train_alone(job_of(content | {"output": str(again)}))
    assert adapter(again).digest() == adapter(tmp_path / "run").digest(), "as if it had never been otherwise"


def test_the_reward_stage_of_a_job_rewards_its_reinforcement(content, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"what is the fee of plan {n}?"} for n in range(8)])
    pairs = content["stages"][1]["data"]
    rl = {"reward_model": "stage:reward", "num_generations": 2, "max_completion_length": 4}
    content["stages"] = [
        content["stages"][0],
        {"objective": "reward", "data": pairs},
        {"objective": "rl", "data": {"train": prompts}, "rl": rl, "training": {"max_steps": 1}},
    ]
    first, second, third = job_of(content).jobs()
    assert (second.start, third.start) == (None, first.output / "adapter")
    assert third.rl.reward_model == str(second.output / "adapter")
    train_alone(job_of(content))
    assert adapter(tmp_path / "run").digest() == adapter(tmp_path / "run" / "3-rl").digest()


def test_a_later_stage_of_less_rank_keeps_what_the_first_learnt(content, tmp_path):
    """The oracle: a stage of rank 1 takes one direction out and puts another in, and leaves the three others as they are."""
    import numpy as np

    content["stages"][1]["lora"] = {"r": 1}
    train_alone(job_of(content))
    first, last = adapter(tmp_path / "run" / "1-sft"), adapter(tmp_path / "run")
    for module, pair in first.factors.items():
        learnt, now = pair.product(), last.factors[module].product()
        moved = np.linalg.svd(now - learnt, compute_uv=False)
        assert moved[0] > 0
        assert moved[2] < 1e-5 * moved[0], "float32"
        assert np.linalg.svd(now, compute_uv=False)[3] > 1e-4 * np.linalg.norm(now, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "ia3"}, "stages.1.method is ia3, and the adapter of stage 0, from which it goes on, is lora's"),
        ({"base_model": "other"}, "stages.1.base_model is another"),
        ({"lora": {"target_modules": ["q_proj"]}}, "stages.1.lora.target_modules are others"),
        ({"data": {"train": None}}, "stages.1.data.train is missing"),
        ({"objective": "rl", "rl": {"reward_model": "stage:reward"}}, "names the reward stage, and there is none before it"),
        ({"trainin": {}}, "stages.1.trainin: unknown key; did you mean 'training'?"),
    ],
)
def test_stages_that_cannot_follow_each_other_are_refused(content, change, said):
    content["stages"][1] |= change
    with pytest.raises(ConfigurationError) as refused:
        job_of(content)
    assert said in str(refused.value)


def test_what_is_wrong_with_the_common_part_is_told_once(content):
    content["training"]["learning_rat"] = 1
    content["stages"][1]["dpo"] = {"beta": -1}
    with pytest.raises(ConfigurationError) as refused:
        job_of(content)
    assert refused.value.problems == (
        "training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "stages.1.dpo.beta: input should be greater than 0 (found -1)",
    )


def forked(folder):
    """The command in a process of its own; a fork, so that only this one pays for importing the libraries."""
    import trl

    assert trl.SFTTrainer
    assert trl.DPOTrainer
    child = os.fork()
    if child:
        return child
    code = 1
    try:  # the child must never come back into pytest
        sys.stdout = sys.stderr = (folder / "told.txt").open("a", buffering=1)
        logging.getLogger().addHandler(logging.StreamHandler())
        os.chdir(folder)
        sys.argv = ["fedge", "train", "job.yaml"]
        fedge.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def ended(child, seconds):
    """Whether it ended well within so many seconds; if it did not end it is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (found := os.waitpid(child, os.WNOHANG)) != (0, 0):
            assert os.waitstatus_to_exitcode(found[1]) == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_job_ends_with_the_same_weights_to_the_bit(content, tmp_path):
    """kill -9 at moments drawn evenly from the length of an uninterrupted run."""
    content["training"] |= {"max_steps": 20, "save_steps": 2}
    content["stages"][1]["training"] = {"max_steps": 12}

    def place(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.yaml").write_text(yaml.safe_dump(content | {"output": "run"}))
        return folder

    oracle, begun = place("oracle"), time.monotonic()
    assert ended(forked(oracle), 300)
    whole = time.monotonic() - begun
    draw, killed, went_on = random.Random(8), 0, []
    while killed < 10:
        folder = place(f"killed-{killed}")
        while not ended(forked(folder), draw.uniform(0, whole) if killed < 10 else 300):
            killed += 1
        for stage in ("1-sft", "2-dpo", ""):
            assert adapter(folder / "run" / stage).digest() == adapter(oracle / "run" / stage).digest()
        told = (folder / "told.txt").read_text()
        went_on += [line for line in told.splitlines() if "going on from" in line or "trained already" in line]
    assert any("1-sft/local" in line for line in went_on), "or nothing would be shown of a first stage's checkpoints"
    assert any("2-dpo/local" in line for line in went_on), "of a second stage's"
    assert any("1-sft is trained already" in line for line in went_on)
