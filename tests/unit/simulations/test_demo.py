"""The demonstration: facts that only one institution knows, asked in words that nobody trained, a model of at most 4 MB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simulations.demo import prepare
from simulations.institutions import INSTITUTIONS, rows
from simulations.scenario import nodes_of, read_scenario
from strategies.base_model import find

NAMES = [institution.name for institution in INSTITUTIONS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_question_was_trained_and_every_answer_was(name, seed):
    trained, asked = rows(name, "train", seed), rows(name, "test", seed)
    assert not {row["input_text"] for row in trained} & {row["input_text"] for row in asked}
    assert {row["target_text"] for row in asked} <= {row["target_text"] for row in trained}


def test_no_institution_trains_on_a_question_of_another():
    asked = [{row["input_text"] for split in ("train", "test") for row in rows(name, split)} for name in NAMES]
    assert len(set().union(*asked)) == sum(len(own) for own in asked)


def test_institutions_speak_english_and_chinese():
    for name in NAMES:
        chinese = [row for row in rows(name, "train") if any("\u4e00" <= sign <= "\u9fff" for sign in row["input_text"])]
        assert 0 < len(chinese) < len(rows(name, "train"))


def test_the_demo_is_a_scenario_that_can_be_read(tmp_path):
    scenario = read_scenario(prepare(tmp_path))
    assert [node.name for node in nodes_of(scenario)] == NAMES
    assert all(node.train.is_file() and node.evaluate.is_file() for node in scenario.nodes)


def test_the_embedded_model_is_a_llama_of_at_most_4_mb_with_its_tokenizer():
    base = find("tiny")
    assert json.loads((base.folder / "config.json").read_text())["model_type"] == "llama"
    assert sum(file.stat().st_size for file in base.folder.iterdir()) <= 4 * 10**6
    assert (base.folder / "tokenizer.json").is_file()


def test_the_script_that_made_the_embedded_model_runs_and_repeats_itself(tmp_path):
    for run in ("a", "b"):
        command = [sys.executable, "-m", "simulations.pretrain_tiny_model", "--out", str(tmp_path / run), "--steps", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3])
        assert done.returncode == 0, done.stderr[-2000:]
    first, second = (tmp_path / run / "model.safetensors" for run in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What ``fedge demo --edge`` tells."""
    output = tmp_path_factory.mktemp("demo") / "demo"
    command = [str(Path(sys.executable).parent / "fedge"), "demo", "--edge", "--json", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_the_demo_is_as_good_as_it_says(demo):
    """Issue: at least 15 points better than local-only adapters on average, within 5 points of centralised."""
    means = demo["mean"]
    assert means["federated"] >= means["local_mean"] + 0.15
    assert means["federated"] >= means["centralised"] - 0.05


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_the_demos_adapter_answers_from_its_bundle_as_in_pytorch(demo):
    """Issue 6: each institution's accuracy through 8 bits, by answers written out, is within 1 point of PyTorch's."""
    accuracy = demo["edge"]["accuracy"]
    assert accuracy.keys() == set(NAMES)
    for found in accuracy.values():
        assert found["bundle"] == pytest.approx(found["pytorch"], abs=0.01)
