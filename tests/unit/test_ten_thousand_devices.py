"""The benchmark of ten thousand devices, made small: everybody is accounted for, and the judge's rows are nobody else's."""

import argparse

import pytest

from benchmarks.ten_thousand_devices import HELD_OUT, ROWS_EACH, divided, rooms, run


@pytest.mark.parametrize("devices", [20, 1000])
def test_rows_that_are_held_out_are_no_devices_and_enough_are_left(devices):
    rows = rooms(devices * ROWS_EACH + 2 * HELD_OUT)
    own, held_out = divided(rows)
    questions = [row["input_text"] for row in rows]
    assert len(set(questions)) == len(questions)
    assert not {row["input_text"] for row in own} & {row["input_text"] for row in held_out}
    assert len(held_out) == HELD_OUT
    assert len(own) >= devices * (ROWS_EACH - 1)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a bundle is made first
def test_a_hundred_devices_learn_and_each_question_has_one_end(tmp_path, capsys):
    told = run(argparse.Namespace(devices=100, rounds=3, cohort=8, profile="q8", data=None), tmp_path)
    ends = told["ends"]
    assert ends["asked"] == 3 * 10 == told["merged"] + sum(ends.values()) - ends["asked"]
    before, after = told["held_out_loss"]
    assert after < 0.5 * before
    assert len(capsys.readouterr().out.splitlines()) == 4
