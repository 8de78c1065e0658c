"""What is measured where nobody names a file, and what is said of rows that have trained."""

import json

import pytest

from protocol.configuration import parse
from protocol.plan import Plan
from strategies.data.card import CARD, digest
from strategies.data.prepared import prepare
from strategies.evaluation.source import doubts, of_file, of_plan


def write(path, numbers):
    rows = [{"input_text": f"What is the fee of plan {n}?", "target_text": f"{n} crowns"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.jsonl", range(20))


def plan_of(train, **data):
    return parse({"data": {"train": str(train), "evaluate_fraction": 0.25, **data}}, Plan, source="plan")


def adapter(folder, plan, training, held_out):
    folder.mkdir()
    told = {"objective": plan.objective, "digest": {"training": digest(training), "held_out": digest(held_out)}}
    (folder / CARD).write_text(json.dumps(told))
    return folder


def test_without_a_file_the_very_rows_are_measured_that_training_held_out(train):
    plan = plan_of(train)
    source = of_plan(plan)
    assert (tuple(source.rows), source.held_out) == (prepare(plan, train).held_out, True)
    assert len(source.rows) == 5
    assert source.name == "train.jsonl (held-out share)"


def test_of_several_tasks_each_ones_file_or_share_is_measured(train, tmp_path):
    own = write(tmp_path / "own.jsonl", range(100, 103))
    tasks = {"a": {"train": str(train)}, "b": {"train": str(train), "evaluate": str(own)}}
    plan = parse({"data": {"tasks": tasks, "evaluate_fraction": 0.25}}, Plan, source="plan")
    assert len(of_plan(plan).rows) == 5 + 3


def test_rows_that_trained_are_counted_and_unseen_ones_raise_no_doubt(train, tmp_path):
    plan = plan_of(train)
    held_out = {row.answer for row in prepare(plan, train).held_out}
    numbers = [*[n for n in range(20) if f"{n} crowns" not in held_out][:3], 500, 501]
    (said,) = doubts(of_file(plan, write(tmp_path / "mixed.jsonl", numbers)), plan, [])
    assert said.startswith("3 of 5 rows of mixed.jsonl are training rows")
    assert not list(doubts(of_file(plan, write(tmp_path / "new.jsonl", [500, 501])), plan, []))
    assert not list(doubts(of_plan(plan), plan, []))


def test_a_data_card_tells_of_what_the_job_no_longer_does(train, tmp_path):
    plan = plan_of(train)
    made = prepare(plan, train)
    good = adapter(tmp_path / "good", plan, made.training, made.held_out)
    other = adapter(tmp_path / "other", plan, made.held_out, made.training)
    (said,) = doubts(of_plan(plan), plan, [good, other])
    assert str(other) in said
    assert "other held-out rows" in said
    elsewhere = plan_of(write(tmp_path / "elsewhere.jsonl", range(900, 910)))
    (said,) = doubts(of_file(plan, write(tmp_path / "copy.jsonl", range(20))), elsewhere, [adapter_of_all(tmp_path, plan)])
    assert "trained on these very rows" in said


def adapter_of_all(tmp_path, plan):
    rows = of_file(plan, tmp_path / "copy.jsonl").rows
    return adapter(tmp_path / "all", plan, rows, [])
