"""The blocks of docs/edge.md, in their order."""

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import httpx
import pytest
from typer.testing import CliRunner

from client.node import Node, beside
from edge.runtime.adapting.learning import Settings
from fedge import app
from protocol.configuration import load

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "edge.md").read_text(), re.MULTILINE | re.DOTALL)


def blocks(language):
    return [body for kind, body in BLOCKS if kind == language]


def call(lines):
    """Runs each line: of fedge in this process, others (rows, copies) in a shell; what those of fedge told."""
    told = []
    for line in lines.splitlines():
        if not line.startswith("fedge "):
            subprocess.run(line, shell=True, check=True)  # noqa: S602 - the page's own lines
            continue
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        told.append(done.stdout)
    return told


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the page's first commands, and what they told."""
    folder = tmp_path_factory.mktemp("edge")
    (folder / "fees.yaml").write_text(blocks("yaml")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, call(blocks("bash")[0])


@pytest.fixture(scope="module")
def answered(made):
    """What the page's second commands told: checks, answers of the base and of the adapter, figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made[0])
        return call(blocks("bash")[1])


def test_the_documented_bundle_is_made_run_and_updated(made, answered, monkeypatch, capsys):
    folder, told = made
    monkeypatch.chdir(folder)
    assert "SHA256:" in told[1]
    assert "bank version 1 (q8)" in told[2]
    assert "adapter fees: lora, rank 4" in told[3]
    assert "as it was signed" in answered[0]
    assert "tokens/s" in answered[2]
    exec(blocks("python")[0], {})  # noqa: S102
    of_base, of_adapter, *_ = capsys.readouterr().out.splitlines()
    assert f"base: {of_base}\n  fees: {of_adapter}\n" in answered[1]
    assert of_base != of_adapter
    alone = "fedge edge run bundles/1 --key release.pub --adapter fees 'What is the fee of plan 7?'"
    assert call(alone) == [f"? What is the fee of plan 7?\n  fees: {of_adapter}\n"]
    assert call(alone.replace("--adapter fees", "")) == [f"? What is the fee of plan 7?\n  base: {of_base}\n"]
    _, added, _, carried, applied = call(blocks("bash")[2])
    assert "hours:" in added
    assert "replaced" not in added
    (again,) = call("fedge edge add bundles/2 bundles/3 --adapter hours=runs/fees/adapter --key release")
    assert "hours: replaced" in again
    found = re.search(r"updates/1-to-2: [\d,]+ of ([\d,]+) bytes, ([\d,]+) with manifest and signature", carried)
    whole, part = (int(number.replace(",", "")) for number in found.groups())
    assert part == sum(path.stat().st_size for path in (folder / "updates" / "1-to-2").rglob("*") if path.is_file())
    assert "hours.onnx_adapter" in carried
    assert part < whole / 2
    assert "version 2" in applied


@pytest.mark.slow
def test_the_documented_bundle_is_made_smaller(made, monkeypatch):
    monkeypatch.chdir(made[0])
    whole, small = call(blocks("bash")[3])
    size = {name: float(re.search(r"([\d.]+) MB", told)[1]) for name, told in (("whole", whole), ("small", small))}
    assert size["small"] < size["whole"] / 3


def test_the_documented_server_answers_the_documented_client(made, answered):
    """In processes of their own, as a reader has them."""
    folder, _ = made
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command, client = blocks("bash")[4].replace("8080", port), blocks("python")[1].replace("8080", port)
    with served(command, folder, port):
        done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=True)
        asked = blocks("bash")[5].replace("8080", port)
        curled = subprocess.run(asked, shell=True, capture_output=True, text=True, check=True) if which("curl") else None  # noqa: S602
    assert f"fees: {done.stdout}" in answered[1]
    assert curled is None or json.loads(curled.stdout)["choices"][0]["message"]["content"] == done.stdout[:-1]


@pytest.fixture
def device(trainable_bundle, tmp_path, monkeypatch):
    """The page's device: a bundle that can be trained as ``bundles/learner``, and the key that signed it."""
    bundle, key = trainable_bundle
    shutil.copytree(bundle, tmp_path / "bundles" / "learner")
    shutil.copy(key, tmp_path / "release.pub")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_documented_learner_is_made_and_learns(made, monkeypatch):
    folder, _ = made
    monkeypatch.chdir(folder)
    assert "learner version 1 (q8)" in call(containing("bash", "--trainable --adapter"))[0]
    rows = ({"prompt": f"When do we close on day {day}?", "answer": "At six."} for day in range(1, 31))
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learnt, status, answered, rolled_back = call(containing("bash", "adapt bundles/learner own.jsonl"))
    assert "20 steps" in learnt
    assert "version 1 is in use" in status
    assert "personal: At six." in answered
    assert "the bundle's own" in rolled_back


def test_the_documented_program_learns(device, capsys):
    exec(containing("python", "Device, adapt"), {})  # noqa: S102
    assert capsys.readouterr().out.startswith("1 better on held-back rows")


def test_the_documented_settings_of_learning_are_all_of_them_with_their_defaults(tmp_path):
    (tmp_path / "learn.yaml").write_text(containing("yaml", "# learn.yaml"))
    read = load(tmp_path / "learn.yaml", Settings)
    assert read == Settings()
    assert read.model_fields_set == set(Settings.model_fields)


def test_the_documented_settings_of_a_device_name_what_lies_beside_it(tmp_path):
    phone = tmp_path / "phone"
    phone.mkdir()
    (phone / "rows.jsonl").touch()
    (phone / "node.yaml").write_text(containing("yaml", "# phone/node.yaml"))
    (node,) = beside(phone / "node.yaml", (load(phone / "node.yaml", Node),))
    found = [path.resolve() for path in (node.train, node.device, node.device_key, node.device_own)]
    expected = [phone / "rows.jsonl", tmp_path / "bundles" / "learner", tmp_path / "release.pub", phone / "own"]
    assert found == [path.resolve() for path in expected]


def test_the_documented_feedback_is_kept_learnt_and_forgotten(device):
    folder = device
    keygen, command = containing("bash", "--feedback said --vault vault.key\n").splitlines()
    count, learn, wipe = containing("bash", "fedge edge feedback said").splitlines()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    call(keygen)
    with served(command.replace("8080", port), folder, port):
        client = containing("python", '"store": True').replace("8080", port)
        for day in range(1, 9):
            asked = client.replace("you close", f"you close on day {day}").replace("At six", f"At {day}")
            done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
            assert done.stdout == "corrected\n"
    assert call(count) == ["0 accepted, 8 corrected, 0 rejected, 1 clients\n"]
    assert b"At 7." not in (folder / "said" / "feedback.sealed").read_bytes()
    (learnt,) = call(learn)
    assert "8 rows to learn from" in learnt
    assert "version 1 is in use" in learnt
    assert "overwritten" in call(wipe)[0]
    assert call(count)[0].startswith("0 accepted, 0 corrected")


def containing(language, words):
    (found,) = (body for body in blocks(language) if words in body)
    return found


@contextmanager
def served(command, folder, port):
    """The page's server in a process of its own, from where it answers to its end."""
    executable = Path(sys.executable).parent / "fedge"
    server = subprocess.Popen([executable, *shlex.split(command)[1:]], cwd=folder, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not _is_there(port):
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        yield
    finally:
        server.terminate()
        server.wait(10)


def _is_there(port):
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False
