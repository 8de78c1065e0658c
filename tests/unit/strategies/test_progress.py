"""How far a training is, for a person and for a file; and what is said of rows that do not fit."""

import json

import pytest

from protocol.plan import Plan
from strategies.base_model import find
from strategies.data.formats import Conversation
from strategies.progress import HISTORY, line
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(8)]


def plan(max_length=64, **training):
    settings = {"batch_size": 4, "max_steps": 5, "logging_steps": 2, "eval_steps": 4, **training}
    return Plan.model_validate({"lora": {"r": 2}, "data": {"max_length": max_length}, "training": settings})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"step": 20, "loss": 1.2345678, "learning_rate": 2e-4, "grad_norm": 3.0}, "step 20/60 loss 1.235 rate 2.0e-04"),
        ({"step": 20, "eval_loss": 3.5, "eval_entropy": 1.0}, "step 20/60 held-out loss 3.5"),
        ({"step": 20, "train_flos": 1.0}, ""),
    ],
)
def test_a_line_says_step_loss_and_rate(entry, said):
    assert line(entry, 60) == said


def test_the_curve_is_told_where_there_is_no_terminal_and_kept_whole_over_an_interruption(tmp_path, capsys):
    settings = plan(save_steps=2, save_total_limit=9)
    fit(settings, find("tiny"), ROWS, ROWS[:2], folder=tmp_path, progress=True)
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("step ")]
    steps = ["1/5", "2/5", "4/5", "4/5", "5/5", "5/5"]
    assert [one.split(" ")[1] for one in said] == steps, "first, every second, last, and two evaluations"
    whole = (tmp_path / HISTORY).read_text()
    entries = [json.loads(one) for one in whole.splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 4, 4, 5, 5]
    assert sum("eval_loss" in entry for entry in entries) == 2
    assert all("loss" in entry or "eval_loss" in entry for entry in entries)
    for path in tmp_path.glob("checkpoint-[45]"):
        (path / "sealed.json").unlink()
    fit(settings, find("tiny"), ROWS, ROWS[:2], folder=tmp_path)
    assert (tmp_path / HISTORY).read_text() == whole
    assert "step " not in capsys.readouterr().err, "nobody asked"
    assert not list(tmp_path.rglob("README.md")), "TRL's praises another model"


def test_rows_that_do_not_fit_are_told_with_the_longest_of_all(caplog):
    long = Conversation(ROWS[0].prompt, "very " * 60)
    fit(plan(max_steps=1), find("tiny"), [*ROWS, long])
    (said,) = [record.getMessage() for record in caplog.records if "data.max_length" in record.getMessage()]
    assert said.startswith("of 9 rows 1 cut at their end: data.max_length is 64 tokens, and the longest row has ")
    assert int(said.rsplit(" ", 1)[1]) > 64
    caplog.clear()
    fit(plan(max_steps=1), find("tiny"), ROWS)
    assert "data.max_length" not in caplog.text
