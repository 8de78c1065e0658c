"""docs/deployment.md, block by block: a real SuperLink and SuperNodes, or Ray, give the adapter of an in-process run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from client.node import Node, read_nodes
from protocol.adapter import Adapter
from protocol.configuration import load
from protocol.federation import Federation
from protocol.files import read_adapter
from simulations.federation import federate

pytestmark = [pytest.mark.deployment, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "deployment.md"
FENCE = re.compile(r"^## (.+?)$|^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SIMULATION = "The same on Flower's simulation engine"


def blocks() -> dict[str, list[str]]:
    """The document's commands by heading; a numbered heading by its number alone."""
    found: dict[str, list[str]] = {}
    heading = ""
    for title, block in FENCE.findall(DOCUMENT.read_text(encoding="utf-8")):
        heading = re.sub(r"^(\d+)\..*", r"\1", title) or heading
        if block:
            found.setdefault(heading, []).append(block)
    return found


class Terminals:
    """A reader's terminals: each runs the settings first, then a block; all are ended by their process ids."""

    def __init__(self, settings: str, env: dict[str, str], logs: Path) -> None:
        self._settings, self._env, self._logs = settings, env, logs
        self._started: dict[str, psutil.Popen] = {}

    def run(self, block: str, seconds: float = 60.0) -> str:
        """Runs a block to its end and returns what it printed."""
        name = f"run-{len(self._started)}"
        process = self.start(name, block)
        try:
            code = process.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            pytest.fail(f"still running after {seconds:g} s: {block}\n{self.story()}")
        assert code == 0, f"exit code {code}: {block}\n{self.story()}"
        return self.log(name)

    def start(self, name: str, block: str) -> psutil.Popen:
        """Starts a block that runs until it is ended."""
        with (self._logs / name).open("wb") as log:
            self._started[name] = psutil.Popen(
                ["bash", "-euc", f"{self._settings}\n{block}"],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self._started[name]

    def until_up(self, seconds: float = 60.0) -> None:
        """Waits until something listens on $PORT."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(self._env["PORT"]))) == 0:
                    return
            time.sleep(0.2)
        pytest.fail(f"nothing listens on the SuperLink's port after {seconds:g} s\n{self.story()}")

    def log(self, name: str) -> str:
        return (self._logs / name).read_text(encoding="utf-8", errors="replace")

    def story(self) -> str:
        return "\n".join(f"----- {name}\n{self.log(name)[-4000:]}" for name in self._started)

    def close(self) -> None:
        # A SuperLink puts its helpers into sessions of their own: take them by their parents, while those live.
        family = []
        for process in self._started.values():
            if process.is_running():
                family += [process, *process.children(recursive=True)]
        for process in family:
            _signal(process, "terminate")
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            _signal(process, "kill")
        _, alive = psutil.wait_procs(alive, timeout=10)
        assert not alive


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    names = ("PORT", "BANK_PORT", "CLINIC_PORT", "THIRD_PORT")
    env = {name: value for name, value in os.environ.items() if name not in ("FLWR_HOME", "http_proxy", "HTTP_PROXY")}
    env |= dict(zip(names, map(str, free_ports(len(names))), strict=True))
    env |= {
        "WORK": str(tmp_path),
        "VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    (tmp_path / "logs").mkdir()
    terminals = Terminals(blocks()["1"][0], env, tmp_path / "logs")
    try:
        yield terminals
    finally:
        terminals.close()


def test_a_superlink_and_two_supernodes_train_the_adapter_of_an_in_process_run(tmp_path: Path, terminals: Terminals) -> None:
    commands = blocks()
    for step in ("2", "3", "6"):
        terminals.run(commands[step][0])
    terminals.start("superlink", commands["4"][0])
    for name, block in zip(("bank", "clinic"), commands["5"], strict=True):
        terminals.start(name, block)
    terminals.until_up()

    log = terminals.run(commands["7"][0], seconds=240)

    assert "round 2: merged 2 update(s)" in log, terminals.story()
    shown = terminals.run(commands["8"][0])
    assert "finished:completed" in re.sub(r"\s", "", shown), shown
    offers = json.loads((tmp_path / "result" / "federation.json").read_text())["offers"]
    assert {name: (offer["precision"], offer["r"]) for name, offer in offers.items()} == {
        "bank": ("fp32", 16),
        "clinic": ("nf4", 8),
    }
    terminals.run(commands[SIMULATION][0])
    assert difference(tmp_path) <= 1e-6


@pytest.mark.slow
def test_flower_s_own_simulation_trains_the_same_adapter_as_the_in_process_grid(tmp_path: Path, terminals: Terminals) -> None:
    pytest.importorskip("ray", reason='pip install "flwr[simulation]"')
    commands = blocks()
    for step in ("2", "3", "6"):
        terminals.run(commands[step][0])
    nodes, superlink, run = commands[SIMULATION]
    terminals.run(nodes)
    terminals.start("superlink", superlink)
    terminals.until_up()

    log = terminals.run(run, seconds=300)

    assert "round 2: merged 2 update(s)" in log, terminals.story()
    assert difference(tmp_path) <= 1e-6


@pytest.mark.slow
def test_a_supernode_that_is_killed_while_it_trains_costs_no_more_than_the_deadline(
    tmp_path: Path, terminals: Terminals
) -> None:
    deadline_seconds = 60
    commands = blocks()
    for step in ("2", "3", "6"):
        terminals.run(commands[step][0])
    described = tmp_path / "federation.yaml"
    deadline = f"rounds:\n  timeout_seconds: {deadline_seconds}\n"
    described.write_text(described.read_text().replace("rounds:\n", deadline))
    terminals.start("superlink", commands["4"][0])
    bank, clinic = commands["5"]
    third = (
        clinic.replace("clinic/flwr", "third/flwr")
        .replace("CLINIC_PORT", "THIRD_PORT")
        .replace('name=\\"clinic', 'name=\\"third')
    )
    nodes = {name: terminals.start(name, block) for name, block in (("bank", bank), ("clinic", clinic), ("third", third))}
    terminals.until_up()
    run = terminals.start("run", commands["7"][0])

    kill_at_second_message(nodes["clinic"])

    assert run.wait(timeout=300) == 0, terminals.story()
    first, second = (json.loads((tmp_path / f"result/rounds/000{n}/round.json").read_text()) for n in (1, 2))
    # At the deadline Flower gives the node up too, two heartbeats after the last: either may be told first.
    assert first["silent"].keys() == {"clinic"}, terminals.story()
    assert any(said in first["silent"]["clinic"] for said in ("no reply within", "Node Unavailable")), terminals.story()
    assert sorted(first["accepted"]) == ["bank", "third"]
    assert first["seconds"] < deadline_seconds + 10
    assert "clinic" not in second["accepted"]
    assert len(second["accepted"]) == 2


# How often a node has been asked when a stage of a secure sum begins: it joins, trains, shares, masks …
SHARE, MASK, CONFIRM, OPEN = 3, 4, 5, 9  # the last of the second sum, what it opens in the end


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("messages", "killed", "in_the_sum"),
    [
        (SHARE, 1, ["bank", "clinic", "court"]),
        (MASK, 1, ["bank", "clinic", "court"]),
        (CONFIRM, 1, []),  # of four nodes too few would stay beside those that hide it in the second sum
        (OPEN, 1, ["bank", "clinic", "court", "school"]),
        # Two of four are fewer than two thirds.
        *((stage, 2, []) for stage in (SHARE, MASK, CONFIRM, OPEN)),
    ],
    ids=[f"{stage}-{count}" for count in ("one", "two") for stage in ("share", "mask", "confirm", "open")],
)
def test_a_secure_sum_through_a_superlink_does_without_a_node_that_is_killed(
    tmp_path: Path, terminals: Terminals, messages: int, killed: int, in_the_sum: list[str]
) -> None:
    """Oracle: the same round in the open, in this process, over the nodes that are in the sum."""
    commands = blocks()
    terminals.run(commands["2"][0])
    terminals.run(commands["6"][0])
    names = ("bank", "clinic", "court", "school")
    lines = []
    for name in names:
        home = tmp_path / name
        home.mkdir()
        rows = [{"input_text": f"Which room has number {n}?", "target_text": f"{name} {n}."} for n in range(8)]
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        terminals.run(f'ssh-keygen -q -t ed25519 -N "" -C "" -f "$WORK/{name}/identity"')
        lines.append(f"{name}: {(home / 'identity.pub').read_text().strip()}\n")
    terminals.run('ssh-keygen -q -t ed25519 -N "" -C "" -f "$WORK/identity"')
    lines.append(f"consortium: {{key: {(tmp_path / 'identity.pub').read_text().strip()}, role: coordinator}}\n")
    (tmp_path / "enrolled.yaml").write_text("".join(lines))
    described = tmp_path / "federation.yaml"
    text = described.read_text().replace("count: 2", "count: 1\n  retries: 0\n  timeout_seconds: 240")
    text = text.replace("minimum_nodes: 2", "minimum_nodes: 3")
    text += f"trust: {{enrolled: {tmp_path}/enrolled.yaml, identity: {tmp_path}/identity}}\n"
    described.write_text(f"{text}secure_sum: {{enabled: true, timeout_seconds: 90}}\n")
    terminals.start("superlink", commands["4"][0])
    ports = dict(zip(names, free_ports(4), strict=True))
    nodes = {}
    for name in names:
        config = f'name=\\"{name}\\" train=\\"$WORK/{name}/rows.jsonl\\" max-rank=4 trial=false only-summed=true '
        config += f'identity=\\"$WORK/{name}/identity\\" enrolled=\\"$WORK/enrolled.yaml\\"'
        nodes[name] = terminals.start(
            name,
            f'FLWR_HOME="$WORK/{name}/flwr" flower-supernode --insecure --superlink "127.0.0.1:$PORT" --port {ports[name]} '
            f'--node-config "{config}"',
        )
    terminals.until_up()
    deadline = time.monotonic() + 60
    while terminals.run("flwr supernode list consortium").count("online") < len(names) and time.monotonic() < deadline:
        time.sleep(1)
    run = terminals.start("run", commands["7"][0])

    kill_at_message([nodes[name] for name in names[-killed:]], messages)

    code = run.wait(timeout=600)
    if not in_the_sum:
        assert "nothing is revealed" in terminals.log("run"), terminals.story()
        assert not (tmp_path / "result" / "rounds").exists()
        return
    assert code == 0, terminals.story()
    assert (tmp_path / "result" / "rounds").exists(), terminals.story()
    record = json.loads((tmp_path / "result/rounds/0001/round.json").read_text())
    assert sorted(record["accepted"]) == in_the_sum, terminals.story()
    content = load(described, Federation).model_dump(mode="json", exclude={"secure_sum", "trust"}) | {
        "output": tmp_path / "in-process"
    }
    own = [Node(name=name, train=tmp_path / name / "rows.jsonl", max_rank=4) for name in in_the_sum]
    expected = products(federate(Federation.model_validate(content), own).adapter)
    found = products(read_adapter(tmp_path / "result" / "adapter")[0])
    assert found.keys() == expected.keys()
    assert max(np.abs(product).max() for product in expected.values()) > 1e-4, "nothing was trained"
    for module, product in expected.items():
        assert np.abs(found[module] - product).max() <= 1e-7  # of four nodes each rounds to steps of 1.9e-8


def kill_at_second_message(supernode: psutil.Popen) -> None:
    """Kills a SuperNode and its own once the process of its second message runs: the first asks it to join, then it trains."""
    kill_at_message([supernode], 2)


def kill_at_message(supernodes: Sequence[psutil.Popen], number: int) -> None:
    """Kills each SuperNode and its own once the process of one of its messages runs."""
    seen: list[set[int]] = [set() for _ in supernodes]
    left = set(range(len(supernodes)))
    deadline = time.monotonic() + 500
    while left and time.monotonic() < deadline:
        for at in sorted(left):
            node = supernodes[at]
            seen[at] |= {one.pid for one in node.children(recursive=True) if "clientapp" in " ".join(_command(one))}
            if len(seen[at]) == number:
                for process in (node, *node.children(recursive=True)):
                    _signal(process, "kill")
                left.discard(at)
        time.sleep(0.02)
    if left:
        pytest.fail(f"SuperNodes were asked {[len(seen[at]) for at in sorted(left)]} times, and not {number}")


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def difference(tmp_path: Path) -> float:
    """Largest absolute difference between the deployed adapter and that of an in-process run of the same files."""
    federation = load(tmp_path / "federation.yaml", Federation).model_copy(update={"output": tmp_path / "in-process"})
    expected = products(federate(federation, read_nodes(tmp_path / "nodes.yaml")).adapter)
    found = products(read_adapter(tmp_path / "result" / "adapter")[0])
    assert found.keys() == expected.keys()
    assert max(np.abs(product).max() for product in found.values()) > 1e-4, "nothing was trained"
    return max(float(np.abs(found[name] - expected[name]).max()) for name in found)


def products(adapter: Adapter) -> dict[str, np.ndarray]:
    """Each module's change of the weight, and the dense tensors, in fp64."""
    changes = {module: pair.product() for module, pair in adapter.factors.items()}
    return changes | {name: tensor.astype(np.float64) for name, tensor in adapter.dense.items()}


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now; all are held at once, so that no two are the same."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _signal(process: psutil.Process, how: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, how)()
