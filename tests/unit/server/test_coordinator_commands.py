"""What a coordinator reads at the terminal: nothing cut at 80 columns, nothing counted twice, nothing changed by looking."""

import json
import os
import threading
import time

import numpy as np
import pytest
from typer.testing import CliRunner

import fedge
from protocol.adapter import Adapter, Factors
from protocol.federation import Federation
from protocol.manifest import Manifest
from server.events import EventLog
from server.ledger import Checkpoint, Kept, Ledger, RoundRecord

RUN = Federation(name="run")


@pytest.fixture
def coordinator(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        return CliRunner().invoke(fedge.app, ["coordinator", *map(str, arguments)], catch_exceptions=False)

    return call


def log(folder):
    made = EventLog(folder)
    folder.mkdir(exist_ok=True)
    made.open()
    return made


def round_of(number, adapter="", **facts):
    told = {"accepted": ["bank", "clinic"], "seconds": 100.0, "bytes_sent": 12_345_678_901, "bytes_received": 1}
    told |= {"merge": {"discarded_energy": 3.8123e-05, "effective_rank": 12.3456}}
    return {"event": "round", "number": number, "adapter": adapter} | told | facts


def test_a_line_of_a_round_is_whole_at_80_columns(tmp_path, coordinator):
    made = log(tmp_path)
    for number in (9, 10):
        for adapter in ("contracts", "legal"):
            made.note(
                **round_of(
                    number,
                    adapter,
                    refused={"law": "norm"},
                    dropped=["slow", "slower"],
                    evaluation={"bank": {"loss": 3.81234e-05, "perplexity": 12345.6, "accuracy": 0.98765}},
                )
            )
    lines = coordinator("rounds", tmp_path).output.splitlines()
    assert not [line for line in lines if "…" in line or len(line) > 80]
    told = [line.split() for line in lines]
    assert ["round", "adapter", "merged", "refused", "dropped", "cut", "off", "rank", "MB", "s"] in told
    assert ["10", "contracts", "2", "1", "2", "3.8e-05", "12.3", "12345.7", "100.0"] in told
    assert ["10", "legal", "0.9877", "3.812e-05", "1.235e+04"] in told


def test_columns_in_which_nothing_stands_are_left_out(tmp_path, coordinator):
    made = log(tmp_path)
    made.note("joined", 0, node="bank", method="lora", r=8)
    made.note(**round_of(1, stage="second", accepted=["bank"], evaluation={"bank": {"accuracy": 0.5, "num-examples": 40}}))
    told = [line.split() for line in coordinator("rounds", tmp_path).output.splitlines()]
    assert ["round", "stage", "merged", "cut", "off", "rank", "MB", "s"] in told
    told = [line.split() for line in coordinator("status", tmp_path).output.splitlines()]
    assert ["node", "method", "r", "rounds"] in told
    assert ["node", "accuracy", "rows"] in told
    assert ["bank", "0.5", "40"] in told
    assert ["│", "stage", "│", "second", "│"] in [[word for word in line if word] for line in told]


def test_the_seconds_of_a_round_count_once_however_many_adapters_share_them(tmp_path, coordinator):
    made = log(tmp_path)
    for number in (1, 2):
        made.note(**round_of(number, "legal", seconds=3.0))
        made.note(**round_of(number, "medical", seconds=4.0))
    assert json.loads(coordinator("status", tmp_path, "--json").output)["seconds"] == 8.0


def test_a_run_that_may_have_died_tells_how_long_ago_it_was_heard(tmp_path, coordinator):
    log(tmp_path).note(**round_of(1))
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    (tmp_path / "events.jsonl").write_text(json.dumps({**json.loads(line), "time": time.time() - 7200}) + "\n")
    assert "the last event was 7,20" in coordinator("status", tmp_path).output


def test_watching_begins_before_the_first_round_and_says_that_it_waits(tmp_path, coordinator):
    def begin():
        made = log(tmp_path / "run")
        made.note(**round_of(1))
        made.note("ended", 1, reason="every round is done")

    timer = threading.Timer(0.3, begin)
    timer.start()
    told = coordinator("watch", tmp_path / "run", "--every", "0.1")
    timer.join()
    assert "waiting for the first" in told.stderr
    assert "every round is done" in told.stdout
    assert told.stdout.endswith("\n")


@pytest.fixture
def died(tmp_path):
    """The folder of a run that died after its first round."""
    adapter = Adapter({"layers.0.q": Factors(np.ones((2, 5), np.float32), np.ones((4, 2), np.float32))})
    manifest = Manifest(base_digest="ab" * 32, kind="global", r=2, federation="run", round=1, num_examples=8)
    made = Ledger(tmp_path / "run", identity=RUN.identity())
    made.keep(Checkpoint(1, {"": Kept(RoundRecord(1), adapter, manifest, RUN.plan)}))
    made.describe({"federation": RUN.model_dump(mode="json")})
    return tmp_path / "run"


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_asking_how_a_run_goes_on_changes_nothing_and_starts_nothing(died, coordinator):
    before = everything(died)
    told = coordinator("resume", died).output
    assert told.startswith("goes on after round 1\n")
    assert "fedge simulate" in told
    assert f"fedge coordinator resume {died} --run CONNECTION" in told
    assert everything(died) == before


def test_going_on_runs_flwr_with_a_file_of_the_same_federation(died, coordinator, tmp_path, monkeypatch):
    """``flwr`` here writes down what it is given."""
    (tmp_path / "bin").mkdir()
    flwr = tmp_path / "bin" / "flwr"
    flwr.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/given\nexit 3\n')
    flwr.chmod(0o755)
    monkeypatch.setenv("PATH", f"{flwr.parent}{os.pathsep}{os.environ['PATH']}")
    assert coordinator("resume", died, "--run", "consortium", "--app", "checkout").exit_code == 3
    *command, option = (tmp_path / "given").read_text().splitlines()
    assert command == ["run", "checkout", "consortium", "--run-config"]
    assert option == f'federation="{died / "resume.yaml"}"'
