"""Rows packed into blocks train exactly what they train one by one; a base that would mix them is refused."""

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from protocol.configuration import parse
from protocol.errors import ConfigurationError, ModelError
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.encode import IGNORED
from strategies.data.formats import Conversation
from strategies.objectives.sft import check_apart, packed
from strategies.training import fit

LENGTH = 64
ROWS = [
    Conversation(({"role": "user", "content": f"Which room has number {n}?"},), "Room " + ", ".join(["one"] * (1 + n % 5)))
    for n in range(10)
]


def plan(*, more=(), **training):
    settings = {"learning_rate": 1.0, "optim": "sgd", "max_steps": 1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    content = {
        "base_model": "tiny",
        "lora": {"r": 4, "lora_alpha": 8},
        "data": {"max_length": LENGTH},
        "training": {**settings, "warmup_ratio": 0, **training},
    }
    return Plan.model_validate(content | dict(more))


def same_step(whole, together, rounding):
    assert together.metrics["train-loss"] == pytest.approx(whole.metrics["train-loss"], rel=rounding)
    for name in whole.adapter.factors:
        for factor in ("A", "B"):
            one, other = (getattr(adapter.factors[name], factor) for adapter in (whole.adapter, together.adapter))
            assert abs(one - other).max() <= rounding * max(abs(one).max(), 1e-3)


def blocks_of(lengths, size):
    rows = [{"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate(lengths, 1)]
    return packed(rows, size)


def test_every_token_lies_in_one_block_beside_its_row_and_no_block_is_too_long():
    """Oracle: bookkeeping. Only the first label of each row is left out, which had nothing before it to tell it from."""
    lengths = [5, 9, 3, 16, 1, 7, 7, 2]
    blocks = blocks_of(lengths, 16)
    found = []
    for block in blocks:
        assert len(block["input_ids"]) <= 16
        ends = np.cumsum(block["seq_lengths"])
        for ids, labels in zip(np.split(block["input_ids"], ends[:-1]), np.split(block["labels"], ends[:-1]), strict=True):
            assert len(set(ids)) == 1
            assert list(labels) == [IGNORED, *ids[1:]]
            found.append((ids[0], len(ids)))
    assert sorted(found) == list(enumerate(lengths, 1))
    assert len(blocks) == 4, "50 tokens need 4 blocks of 16"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_step_is_the_step_of_the_same_rows_unpacked(attention, monkeypatch):
    """Oracle: loss over all answer tokens of a step does not depend on how its rows lie in batches.

    Plain SGD at rate 1 makes the change the gradient itself. 1e-5 of its largest entry: float32 sums in another order.
    """
    from strategies import training

    def loaded(*arguments):
        model, tokenizer = load(*arguments)
        model.set_attn_implementation(attention)
        return model, tokenizer

    monkeypatch.setattr(training, "load", loaded)
    whole = fit(plan(batch_size=len(ROWS)), find("tiny"), ROWS)
    together = fit(plan(batch_size=len(ROWS), packing=True), find("tiny"), ROWS)
    same_step(whole, together, 1e-5)


def test_a_distilled_student_learns_the_same_packed():
    """The same oracle. Three steps: at the first, student and teacher agree. Each carries the rounding of the one before."""
    more = {"objective": "distillation", "distillation": {"teacher": {"base_model": "tiny"}, "hard_weight": 0.5}}
    whole, together = (
        fit(plan(more=more, batch_size=len(ROWS), max_steps=3, learning_rate=0.1, packing=packing), find("tiny"), ROWS)
        for packing in (False, True)
    )
    same_step(whole, together, 1e-4)


def test_packing_trains_in_fewer_steps_and_reads_held_out_rows_one_by_one():
    """The same evaluation loss at rate 0, packed or not: held-out rows stay as they are."""
    settings = {"max_steps": None, "num_train_epochs": 1, "batch_size": 2, "eval_steps": "epoch", "learning_rate": 1e-12}
    apart, together = (fit(plan(**settings, packing=packing), find("tiny"), ROWS, ROWS[:3]) for packing in (False, True))
    assert together.metrics["train-steps"] < apart.metrics["train-steps"] == 5
    assert together.metrics["eval-loss"] == pytest.approx(apart.metrics["eval-loss"], rel=1e-6)


def test_a_base_whose_positions_do_not_say_where_a_row_begins_is_refused():
    """ALiBi (Bloom) counts tokens itself."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="bloom base does not keep rows"):
        check_apart(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective": "pretraining"}, "packing is for objective sft or distillation"),
        ({"method": "prefix-tuning"}, "prefix-tuning"),
        ({"training": {"packing": True, "train_sampling_strategy": "group_by_length"}}, "nothing to group"),
    ],
)
def test_packing_without_a_meaning_is_refused(change, said):
    with pytest.raises(ConfigurationError, match=said):
        parse({"training": {"packing": True}, **change}, Plan, source="plan")
