"""Simulated nodes remember in the federation's folder: a coded run goes on to the same bit, one that is new finds nothing."""

import _thread
import json
import signal
import threading
import time

import pytest
from typer.testing import CliRunner

import fedge
from client.node import Node
from protocol.federation import Federation
from simulations.federation import STATE, federate

ROUNDS = 2


@pytest.fixture
def nodes(tmp_path):
    made = []
    for name, rank in (("bank", 8), ("clinic", 4)):
        rows = [{"input_text": f"Where is desk {at} of the {name}?", "target_text": f"Room {at * 7}."} for at in range(12)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(Node(name=name, train=path, evaluate=path, max_rank=rank))
    return made


def published(output, **rounds):
    plan = {
        "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "data": {"max_length": 64},
        "training": {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2, "warmup_ratio": 0.0},
    }
    rounds = {"count": ROUNDS, "wire": "int4", "wire_down": "int4", "evaluate_every": 0} | rounds
    return Federation.model_validate({"name": "fed", "plan": plan, "rounds": rounds, "output": str(output)})


def die_after(number):
    def watch(record):
        if record.round == number:
            raise KeyboardInterrupt

    return watch


def test_a_coded_simulation_that_died_ends_with_the_same_adapter_to_the_bit_without_any_setting(nodes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        federate(published(tmp_path / "died"), nodes, die_after(1))
    resumed = federate(published(tmp_path / "died"), nodes)
    whole = federate(published(tmp_path / "whole"), nodes)
    assert [record.round for record in resumed.rounds] == [2]
    assert resumed.adapter.digest() == whole.adapter.digest()
    assert resumed.rounds[0].bytes_sent == whole.rounds[1].bytes_sent, "nothing had to be sent whole once more"


def test_nodes_of_a_run_that_begins_anew_remember_nothing_of_the_one_before(nodes, tmp_path):
    stale = tmp_path / "run" / STATE / "0002" / "stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("x")
    with pytest.raises(KeyboardInterrupt):
        federate(published(tmp_path / "run"), nodes, die_after(1))
    assert not stale.exists()
    stale.write_text("x")
    federate(published(tmp_path / "run"), nodes)
    assert stale.exists(), "this one went on"


def test_a_node_that_names_a_place_of_its_own_remembers_there(nodes, tmp_path):
    placed = [nodes[0].model_copy(update={"state": tmp_path / "mine"}), nodes[1]]
    federate(published(tmp_path / "run", count=1), placed)
    assert (tmp_path / "mine").is_dir()
    assert [path.name for path in (tmp_path / "run" / STATE).iterdir()] == ["0002"]


def test_a_simulation_over_plain_wires_leaves_no_memory(nodes, tmp_path):
    federate(published(tmp_path / "run", count=1, wire="fp32", wire_down="fp32"), nodes)
    assert not (tmp_path / "run" / STATE).exists()


@pytest.fixture
def _heeds_ctrl_c():
    """A shell that starts a suite in the background has all that it starts ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeds_ctrl_c")
def test_a_simulation_that_is_stopped_by_hand_says_how_it_goes_on(nodes, tmp_path):
    scenario = {
        "federation": json.loads(published(tmp_path / "run", count=50).model_dump_json()),
        "nodes": [json.loads(node.model_dump_json(exclude_none=True)) for node in nodes],
    }
    (tmp_path / "scenario.yaml").write_text(json.dumps(scenario))

    def interrupt():
        while not (tmp_path / "run" / "rounds" / "0001").exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    stopped = CliRunner().invoke(fedge.app, ["simulate", str(tmp_path / "scenario.yaml")])
    assert stopped.exit_code == 130
    assert "the same command goes on after the last round" in stopped.output
