"""The blocks of docs/adapters.md about what comes after training, in their order."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedge import app

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "adapters.md").read_text().partition("## After training")[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def blocks(language):
    return [body for kind, body in BLOCKS if kind == language]


def call(lines):
    told = []
    for line in lines.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        told.append(done.stdout)
    return told


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_documented_adapters_are_merged_extracted_combined_served_and_published(tmp_path, monkeypatch):
    rows = [{"input_text": f"What is the fee of plan {n}?", "target_text": f"{n} crowns"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fees.yaml").write_text(blocks("yaml")[0])
    after, registry = blocks("bash")
    assert "svd of 2 adapters, rank 8" in call(after)[3]
    exec(blocks("python")[0], {})  # noqa: S102
    told = call(registry)
    assert "fees: 1, 2 (latest 2, production 1)" in told[3]
    assert "removed: none" in told[-1]
    assert "fees@1 stays: tag production" in told[-1]
    assert (tmp_path / "runs/fetched/adapter_model.safetensors").read_bytes() == (
        tmp_path / "runs/fees/adapter/adapter_model.safetensors"
    ).read_bytes()
