"""Which rows train side by side: the closed form of the temperature, what is read in which order, and the replayed share."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.plan import Plan
from strategies.data.formats import Conversation, PlainText, load
from strategies.data.mixture import drawn, general_plan, mixed, proportions

SIZES = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)


def plan(seed=0, **data):
    return Plan.model_validate({"data": data, "training": {"seed": seed}})


@given(SIZES, st.floats(0.2, 100))
def test_proportions_are_the_closed_form(sizes, temperature):
    """Oracle: n^(1/T) / sum (Raffel et al. 2020, section 3.5.2) by powers; float64 keeps 12 digits through a logarithm."""
    powers = [size ** (1 / temperature) for size in sizes]
    assert proportions(sizes, temperature) == pytest.approx([power / math.fsum(powers) for power in powers], rel=1e-12)


@given(SIZES)
def test_temperature_one_is_by_size_and_a_large_one_is_even(sizes):
    """At T = 10^9 a ratio of sizes of 10^9 becomes one of exp(21e-9)."""
    assert proportions(sizes, 1.0) == pytest.approx([size / sum(sizes) for size in sizes], rel=1e-12)
    assert proportions(sizes, 1e9) == pytest.approx([1 / len(sizes)] * len(sizes), rel=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e6])
def test_tasks_are_drawn_in_the_closed_forms_proportions(temperature):
    """Chi-square test of 20 000 draws in three tasks; its 99.9 % quantile with two degrees of freedom is 13.82.

    The oracle is the formula, worked out here. Without temperature (that of T = 1) the test must fail for the others.
    """
    sizes, count = [8000, 1000, 125], 20_000
    found = Counter(task for task, _ in drawn(sizes, temperature, count, seed=11))
    observed = np.array([found[task] for task in range(3)])

    def distance(t):
        powers = np.array(sizes, dtype=float) ** (1 / t)
        expected = count * powers / powers.sum()
        return float(((observed - expected) ** 2 / expected).sum())

    assert distance(temperature) < 13.82
    if temperature > 1:
        assert distance(1.0) > 100


def test_the_seed_fixes_the_draw():
    assert drawn([50, 5], 2.0, 200, seed=3) == drawn([50, 5], 2.0, 200, seed=3)
    assert drawn([50, 5], 2.0, 200, seed=3) != drawn([50, 5], 2.0, 200, seed=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.5, 20), st.integers(0, 200), st.integers(0, 99))
def test_each_row_of_a_task_is_read_once_before_any_is_read_again(sizes, temperature, count, seed):
    found = Counter(drawn(sizes, temperature, count, seed))
    for task, size in enumerate(sizes):
        times = [found[task, row] for row in range(size)]
        assert max(times) - min(times) <= 1


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.05, 0.9), st.integers(0, 300), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_general_rows_have_their_share_and_no_own_row_is_left_out(own, general, share, wanted, seed):
    """Each own row once (or once a pass); the general rows' share to within one row, each once before any comes again."""
    made = mixed(
        {"": range(own)}, [-1 - n for n in range(general)], plan(seed, replay="general.jsonl", replay_share=share), wanted
    )
    rows, beside = [n for n in made if n >= 0], [n for n in made if n < 0]
    assert set(rows) == set(range(own))
    assert max(Counter(rows).values()) - min(Counter(rows).values()) <= 1
    assert abs(len(beside) - share * len(made)) <= 1
    times = Counter(beside)
    assert max(times.values()) - min(times.get(-1 - n, 0) for n in range(general)) <= 1
    assert len(made) >= wanted - 1


def test_one_task_alone_is_its_rows_as_they_are():
    assert mixed({"": [3, 1, 2]}, [], plan(), wanted=50) == [3, 1, 2]


def test_general_rows_are_shuffled_among_the_others():
    """Pretraining packs rows in their order; a block of general rows at the end would be learnt last."""
    made = mixed({"": range(100)}, [-1] * 100, plan(replay="general.jsonl", replay_share=0.5))
    assert 20 < sum(n < 0 for n in made[:100]) < 80


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_beside_answers_general_rows_may_be_plain_text(tmp_path):
    texts = written(tmp_path / "texts.jsonl", [{"text": "Once upon a time."}])
    answers = written(tmp_path / "answers.jsonl", [{"input_text": "Who?", "target_text": "Tom."}])
    assert isinstance(load(texts, general_plan(texts, plan()))[0], PlainText)
    assert isinstance(load(answers, general_plan(answers, plan()))[0], Conversation)
    scored = Plan.model_validate({"objective": "regression"})
    assert general_plan(texts, scored) == scored


def test_a_text_among_answers_is_learnt_whole_and_closed():
    """Oracle: the tokenizer; a text too long is cut, and counted."""
    from strategies.base_model import find, load_tokenizer
    from strategies.data.encode import encode

    tokenizer = load_tokenizer(find("tiny"))
    rows = [
        PlainText("Once upon a time."),
        Conversation(({"role": "user", "content": "Who?"},), "Tom."),
        PlainText("x y " * 99),
    ]
    made = encode(rows, tokenizer, 20)
    text, answer, long = made.rows
    assert text["input_ids"] == text["labels"]
    assert tokenizer.decode(text["input_ids"]).endswith(f"time.{tokenizer.eos_token}")
    assert -100 in answer["labels"]
    assert len(long["input_ids"]) == len(long["labels"]) == 20
    assert made.cut == 1
