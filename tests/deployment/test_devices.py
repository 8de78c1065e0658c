"""Two nodes with PyTorch and two devices that have none, on a real SuperLink: three rounds, and each of the four has learnt."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from test_superlink import Terminals, blocks, free_ports, products, terminals

from client import device
from client import round as node_round
from client.memory import Memory
from client.node import Node
from protocol.adapter import Adapter
from protocol.configuration import load
from protocol.federation import Federation
from protocol.files import read_adapter
from protocol.records import Call, Received
from simulations.federation import federate

__all__ = ["terminals"]  # a fixture
pytestmark = [pytest.mark.deployment, pytest.mark.slow, pytest.mark.timeout(1200)]
ABSENT = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "trl", "accelerate", "datasets", "optimum")
# Python reads it before anything else in every process of a device, Flower's own too; what was refused is told in a file.
WITHOUT = f"""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
FEDERATION = """
name: mixed
output: {work}/result
plan:
  base_model: tiny
  lora: {{r: 4, lora_alpha: 8}}
  data: {{max_length: 64}}
  training: {{learning_rate: 1.0e-2, batch_size: 4, max_steps: 4}}
rounds: {{count: 3, minimum_nodes: 4, evaluate_every: 0}}
"""


def test_two_devices_without_torch_and_two_nodes_with_it_train_the_adapter_of_an_in_process_run(
    tmp_path: Path, terminals: Terminals, trainable_bundle: tuple[Path, Path]
) -> None:
    commands = blocks()
    terminals.run(commands["6"][0])
    (tmp_path / "federation.yaml").write_text(FEDERATION.format(work=tmp_path))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(WITHOUT)
    lacking = f'export PYTHONPATH="$WORK/without"\n! "{sys.executable}" -c "import torch" 2> "$WORK/lacks"\n'
    terminals.run(f'{lacking}grep -q "No module named .torch." "$WORK/lacks"')
    terminals.start("superlink", commands["4"][0])
    terminals.until_up(300)
    nodes = nodes_of(tmp_path, trainable_bundle)
    for node, port in zip(nodes, free_ports(4), strict=True):
        config = f'name=\\"{node.name}\\" train=\\"{node.train}\\" evaluate=\\"{node.evaluate}\\" trial=false'
        if node.device:
            config += f' device=\\"{node.device}\\" device-key=\\"{node.device_key}\\"'
        terminals.start(
            node.name,
            f"{lacking if node.device else ''}"
            f'FLWR_HOME="$WORK/{node.name}/flwr" flower-supernode --insecure --superlink "127.0.0.1:$PORT" --port {port} '
            f'--node-config "{config}"',
        )
    deadline = time.monotonic() + 300
    while (
        terminals.run("flwr supernode list consortium", seconds=120).count("online") < len(nodes)
        and time.monotonic() < deadline
    ):
        time.sleep(1)

    terminals.run(commands["7"][0], seconds=900)

    records = [json.loads((tmp_path / f"result/rounds/000{n}/round.json").read_text()) for n in (1, 2, 3)]
    everybody = sorted(node.name for node in nodes)
    assert [sorted(record["accepted"]) for record in records] == [everybody] * 3, terminals.story()
    adapter = read_adapter(tmp_path / "result" / "adapter")[0]
    for node in nodes:
        assert loss(node, adapter) < 0.6 * loss(node, Adapter())
    federation = load(tmp_path / "federation.yaml", Federation).model_copy(update={"output": tmp_path / "in-process"})
    expected, found = products(federate(federation, nodes).adapter), products(adapter)
    assert found.keys() == expected.keys()
    assert max(np.abs(product).max() for product in found.values()) > 1e-4, "nothing was trained"
    assert max(float(np.abs(found[name] - expected[name]).max()) for name in found) <= 1e-6


def nodes_of(folder: Path, trainable_bundle: tuple[Path, Path]) -> list[Node]:
    """Each with the rooms of its own house."""
    made = []
    for at, name in enumerate(("bank", "clinic", "phone", "kiosk")):
        (folder / name).mkdir()
        for file, numbers in (("train", range(10)), ("held", range(10, 13))):
            rows = [
                {"input_text": f"Which room of the {name} has number {n}?", "target_text": f"Room {n}, floor {at}."}
                for n in numbers
            ]
            (folder / name / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        own = {"device": trainable_bundle[0], "device_key": trainable_bundle[1]} if at > 1 else {}
        made.append(Node(name=name, train=folder / name / "train.jsonl", evaluate=folder / name / "held.jsonl", **own))
    return made


def loss(node: Node, adapter: Adapter) -> float:
    """On the rows that it holds out, as it measures itself."""
    plan = load(node.train.parent.parent / "federation.yaml", Federation).plan if node.train else None
    assert plan
    call = Call(federation="mixed", round=3, rounds=3, plan=plan, r=4, digest=adapter.digest())
    work = device if node.device else node_round
    return float(work.evaluate(Received(call, adapter), node, Memory(RecordDict(), "mixed", None))[0]["loss"])
