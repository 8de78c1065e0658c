"""Several processes train one model: the oracle is one process with the same batches, put together."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from protocol.configuration import load
from protocol.errors import ConfigurationError
from protocol.files import read_adapter
from protocol.plan import Plan
from simulations.single import train_alone
from strategies.job import Job
from strategies.training import can_train

HERE = Path(sys.executable).parent
ROWS = [{"input_text": f"what is the fee of plan {n}?", "target_text": f"it is {n} crowns" * (n % 3 + 1)} for n in range(16)]


def job(folder, name, **training):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"learning_rate": 5e-3, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "seed": 2} | training
    data = {"train": str(rows), "evaluate": str(rows), "max_length": 64}
    content = {"lora": {"r": 4}, "data": data, "training": settings, "output": f"runs/{name}"}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(command, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def in_two(path):
    return [HERE / "torchrun", "--standalone", "--nproc-per-node", "2", HERE / "fedge", "train", path, "--json"]


def losses(folder):
    newest = max(folder.glob("local/round-0001/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_two_processes_are_one_with_batches_twice_as_large(tmp_path, monkeypatch):
    """Sums are taken in another order: 1e-6 of each; AdamW's steps carry it to the weights, a thousandth of their moves."""
    told = run(in_two(job(tmp_path, "two", batch_size=2)), tmp_path)
    monkeypatch.chdir(tmp_path)
    alone = job(tmp_path, "one", batch_size=4)
    train_alone(load(alone, Job).beside(alone))  # here: a third process would import everything once more
    two, one = (tmp_path / "runs" / name for name in ("two", "one"))
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert len(losses(one)) == 6
    adapters = [read_adapter(folder / "adapter")[0] for folder in (two, one)]
    for module, pair in adapters[1].factors.items():
        moved = np.abs(pair.product()).max()
        assert np.abs(adapters[0].factors[module].product() - pair.product()).max() <= 1e-3 * moved
    report = json.loads(told.stdout.strip())  # one line: one process tells
    assert report["training"]["train-loss"] == pytest.approx(np.mean(losses(one)), abs=2e-5)
    assert len((two / "events.jsonl").read_text().splitlines()) == len((one / "events.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_two_processes_go_on_together(tmp_path):
    """In the midst of the second epoch: the order of rows that both share must be there again. Sums of two are repeatable."""
    path = job(tmp_path, "two", batch_size=2, max_steps=7, save_steps=1, save_total_limit=9)
    run(in_two(path), tmp_path)
    folder = tmp_path / "runs" / "two"
    whole = read_adapter(folder / "adapter")[0]
    (folder / "stage.json").unlink()
    for step in (6, 7):
        shutil.rmtree(folder / "local" / "round-0001" / f"checkpoint-{step}", ignore_errors=True)
    told = run(in_two(path), tmp_path)
    assert "after step 5" in told.stderr
    assert read_adapter(folder / "adapter")[0].digest() == whole.digest()


@pytest.mark.slow
def test_a_mistake_ends_all_processes_at_once(tmp_path):
    path = job(tmp_path, "wrong", batch_size=2)
    path.write_text(path.read_text().replace("rows.jsonl", "nowhere.jsonl"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(in_two(path), cwd=tmp_path, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode != 0
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "runs" / "wrong").exists()


@pytest.mark.parametrize(
    ("training", "processes", "said"),
    [
        ({"deepspeed": {}}, "2", "the package deepspeed is not installed; install it, or take training.fsdp"),
        ({"fsdp": True}, "1", "divides the weights over several processes, and this is one; start it with accelerate launch"),
        ({"proximal_mu": 0.1}, "2", "training.proximal_mu is for federations"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, training, processes, said):
    if importlib.util.find_spec("deepspeed") and "deepspeed" in training:
        pytest.skip("deepspeed is installed")
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ConfigurationError) as refused:
        can_train(Plan.model_validate({"training": training}))
    assert said in str(refused.value)
