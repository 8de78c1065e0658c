"""Linear probes: that each sees what can be read at its layer, by constructions whose answer is known."""

import random

import numpy as np
import pytest
import torch

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import LabelledText
from strategies.probing import mean_states, plot, probe

PLAN = {"base_model": "tiny", "objective": "classification", "data": {"labels": ["a", "b"]}}
WORDS = ("the", "room", "has", "a", "red", "door", "and", "one", "small", "window", "near", "some", "old", "chair")


def texts(count, seed, told):
    """Of random words; the label is told by one word, or by nothing."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(count):
        label = drawn.randrange(2)
        words = drawn.choices(WORDS, k=8) + ([("apple", "river")[label]] if told else [])
        drawn.shuffle(words)
        rows.append(LabelledText(" ".join(words), label))
    return rows


def test_what_one_word_tells_can_be_read_from_the_embeddings():
    plan = Plan.model_validate(PLAN)
    found = probe(plan, find("tiny"), texts(200, 0, told=True), texts(100, 1, told=True))
    assert found.layers[0].accuracy >= 0.95
    assert found.best == 0
    assert found.frozen_share == 0
    assert found.rows == (200, 100)


def test_labels_that_nothing_tells_are_guessed_at_every_layer():
    """Of 7 layers each stays within four standard errors of one half: by chance one in 2 000 runs would not."""
    plan = Plan.model_validate(PLAN)
    found = probe(plan, find("tiny"), texts(200, 0, told=False), texts(200, 1, told=False))
    assert all(abs(one.accuracy - 0.5) < 4 * np.sqrt(0.25 / 200) for one in found.layers)


def test_a_probe_reads_the_mean_of_a_row_s_hidden_states_at_each_layer():
    """The oracle is plain transformers, a row at a time: no padding, no batch."""
    plan, rows = Plan.model_validate(PLAN), texts(11, 1, told=True)
    model, tokenizer = load(find("tiny"), plan)
    found = mean_states(model, tokenizer, [row.text for row in rows], plan)
    for at, row in enumerate(rows):
        with torch.inference_mode():
            states = model(**tokenizer(row.text, return_tensors="pt"), output_hidden_states=True).hidden_states
        wanted = np.stack([state[0].mean(0).numpy() for state in states])
        np.testing.assert_allclose(found[:, at], wanted, rtol=1e-4, atol=1e-4)


def test_a_plot_is_a_picture_and_one_label_is_refused():
    pytest.importorskip("matplotlib")
    plan = Plan.model_validate(PLAN)
    found = probe(plan, find("tiny"), texts(60, 0, told=True), texts(20, 1, told=True))
    assert plot(found, "tiny").startswith(b"\x89PNG")
    with pytest.raises(DataError, match="fewer than 2 labels"):
        probe(plan, find("tiny"), [LabelledText("a room", 0)] * 9, texts(5, 1, told=True))
