"""Every block of docs/mixtures.md does what the page says."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedge import app

TEXT = (Path(__file__).parents[2] / "docs" / "mixtures.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    questions = [(f"What is the fee of plan {n}?", f"{n} crowns") for n in range(24)]
    answered = [{"input_text": q, "target_text": a} for q, a in questions]
    liked = [
        {"prompt": q, "completion": a if n % 2 else "I do not know.", "label": n % 2 == 1} for n, (q, a) in enumerate(questions)
    ]
    write(tmp_path / "fees.jsonl", answered)
    for name in ("rooms", "rooms-test"):
        write(tmp_path / f"{name}.jsonl", answered[:6])
    write(tmp_path / "feedback.jsonl", liked[:16])
    write(tmp_path / "earlier.jsonl", liked[16:])
    for name in ("general", "probe"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"The bank opens at {n} and closes."} for n in range(8)])
    for kind, body in BLOCKS:
        if kind == "yaml":
            (tmp_path / body.splitlines()[0].removeprefix("# ")).write_text(body)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(*command):
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_the_commands_train_tasks_and_then_go_on_from_feedback(folder):
    first, second = (trained(*shlex.split(line)[1:]) for kind, body in BLOCKS if kind == "bash" for line in body.splitlines())
    assert {"loss", "fees/loss", "rooms/loss"} <= first["evaluation"].keys()
    assert "forgetting-after" in second["training"]
    assert "loss" in second["evaluation"]
    assert (folder / "runs/feedback/adapter/adapter_model.safetensors").is_file()


def test_the_guarded_job_tells_what_it_lost(folder):
    told = trained("train", "guarded.yaml")["training"]
    assert {"forgetting-before", "forgetting-after", "forgetting-step", "forgetting-stopped"} <= told.keys()


def test_the_documented_shares_are_the_closed_forms():
    """100 of 10 100 rows; numbers as the page has them."""
    for temperature, said in ((1, "1.0 %"), (2, "9.1 %"), (5, "28 %")):
        share = 100 ** (1 / temperature) / (100 ** (1 / temperature) + 10_000 ** (1 / temperature))
        assert f"{100 * share:.2g} %" == said or f"{100 * share:.1f} %" == said
        assert said in re.sub(r"\s+", " ", TEXT)
