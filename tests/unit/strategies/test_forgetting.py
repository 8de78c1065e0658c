"""The check for forgetting: what it measures, when it stops, and that what is left is the last state within the bound."""

import json
import math

import numpy as np
import pytest

from protocol.errors import DataError
from protocol.plan import Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.formats import Conversation, PlainText
from strategies.data.mixture import probe_rows
from strategies.forgetting import guards
from strategies.generation import answer
from strategies.training import fit

PROBE = [PlainText("The bank opens at nine and closes at five."), PlainText("A vault has a lock and a key.")]
ROWS = [Conversation(({"role": "user", "content": f"{n}"},), "xyzzy " * 8) for n in range(16)]


def plan(rate=3e-3, steps=12, forgetting=None, **more):
    return Plan.model_validate(
        {
            "lora": {"r": 4, "lora_alpha": 16},
            "data": {"max_length": 64},
            "training": {"learning_rate": rate, "batch_size": 4, "max_steps": steps, "lr_scheduler_type": "constant"},
            "forgetting": {"max_rise": 0.2, "every": 2} if forgetting is None else forgetting,
            **more,
        }
    )


def on_tiny(used, probe=PROBE):
    return guards(used, probe, load_tokenizer(find("tiny")))


def test_there_is_no_guard_without_a_wish_or_without_a_probe():
    assert on_tiny(plan(), ()) == []
    assert on_tiny(Plan()) == []


def test_the_probes_loss_is_the_mean_over_its_tokens():
    """Oracle: transformers' own loss of each text, weighted by its tokens; of an answer only the answer's tokens count."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = find("tiny").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(find("tiny"))
    total = count = 0.0
    for text in PROBE:
        ids = torch.tensor([tokenizer(text.text + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    guard = on_tiny(plan())[0]
    model.train()
    assert guard.loss(model) == pytest.approx(total / count, abs=1e-5)  # the oracle is float32
    assert model.training
    answered = Conversation(({"role": "user", "content": "Where?"},), "In the vault.")
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the vault."}]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    before = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    begin = len(tokenizer(before, add_special_tokens=False)["input_ids"])
    labels = torch.tensor([[-100] * begin + whole[begin:]])
    with torch.no_grad():
        wanted = float(model.eval()(input_ids=torch.tensor([whole]), labels=labels).loss)
    assert on_tiny(plan(), [answered])[0].loss(model) == pytest.approx(wanted, abs=1e-5)


@pytest.fixture(scope="module")
def known():
    """Something that the base knows well: what it answers itself."""
    questions = ["What is the daily cash limit?", "Which room has number 3?", "Who opens the vault?"]
    answers = answer(Plan(), find("tiny"), questions, None, 24)
    return [Conversation(({"role": "user", "content": q},), a) for q, a in zip(questions, answers, strict=True)]


@pytest.fixture(scope="module")
def stopped(known):
    """A training whose only answer is a word that the base has never seen: what it knew goes fast."""
    import logging

    said: list[str] = []

    class Said(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    handler = Said()
    logging.getLogger("strategies.forgetting").addHandler(handler)
    try:
        return fit(plan(), find("tiny"), ROWS, probe=known), said
    finally:
        logging.getLogger("strategies.forgetting").removeHandler(handler)


def test_a_run_that_forgets_ends_with_the_last_state_within_the_bound(stopped, known):
    """Oracle: the same training without a guard, ended after the step that the guard says it kept: the same adapter."""
    trained, _ = stopped
    told = trained.metrics
    assert told["forgetting-stopped"] == 1.0
    kept = int(told["forgetting-step"])
    assert kept % 2 == 0
    assert 0 < kept < told["train-steps"] == kept + 2 < 12, "it looks every second step, and stops at the first beyond"
    assert told["forgetting-after"] <= told["forgetting-before"] + 0.2
    free = fit(plan(steps=kept, forgetting={"max_rise": 99, "every": 99}), find("tiny"), ROWS, probe=known)
    assert free.metrics["forgetting-after"] == told["forgetting-after"]
    for module, pair in trained.adapter.factors.items():
        np.testing.assert_array_equal(pair.B, free.adapter.factors[module].B)


def test_it_is_said_aloud(stopped):
    told, said = stopped[0].metrics, stopped[1]
    assert len(said) == 1
    assert f"after step {int(told['forgetting-step'])}" in said[0]
    assert "max_rise" in said[0]


def test_a_run_within_the_bound_is_not_touched():
    """The guard reads alone: the same weights to the bit as without one."""
    watched = fit(plan(steps=3, forgetting={"max_rise": 99, "every": 1}), find("tiny"), ROWS, probe=PROBE)
    free = fit(Plan.model_validate(plan(steps=3).model_dump() | {"forgetting": None}), find("tiny"), ROWS)
    assert watched.metrics["forgetting-stopped"] == 0.0
    assert watched.metrics["forgetting-step"] == 3.0
    assert not any(name.startswith("forgetting") for name in free.metrics)
    for module, pair in watched.adapter.factors.items():
        np.testing.assert_array_equal(pair.product(), free.adapter.factors[module].product())


def test_a_loss_that_is_no_number_is_beyond_any_bound(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find("tiny").folder)
    guard = on_tiny(plan(forgetting={"max_rise": 99}))[0]
    guard.begin(model, tmp_path / "kept.safetensors", 0)
    weight = next(iter(model.parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    assert not guard.look(model, 1)
    assert torch.equal(weight, before)


def test_a_run_that_is_taken_up_again_is_held_against_where_it_began(tmp_path):
    """Not against the checkpoint, or a run that dies often could forget everything, a bound at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model, file = AutoModelForCausalLM.from_pretrained(find("tiny").folder), tmp_path / "kept.safetensors"
    first = on_tiny(plan())[0]
    first.begin(model, file, 0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.05)
    began = first.figures["forgetting-before"]
    assert abs(first.loss(model) - began) > 1e-3
    again = on_tiny(plan())[0]
    again.begin(model, file, 7)
    assert again.figures["forgetting-before"] == began
    anew = on_tiny(plan())[0]
    anew.begin(model, file, 0)
    assert anew.figures["forgetting-before"] != began


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"objective": "regression"}, "a head in place of that"),
        ({"training": {"fsdp": True}}, "one process holds"),
        ({"forgetting": {"max_rise": 0}}, "max_rise"),
    ],
)
def test_a_guard_that_cannot_work_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Plan.model_validate({"forgetting": {}, **wrong})


def test_thawed_layers_go_back_too(tmp_path):
    """Parameters that did not train at the last look within the bound are in what it kept."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find("tiny").folder)
    thawing = plan(method="freezing", lora={}, freezing={"thaw_every": 1}, forgetting={"max_rise": 1e-3})
    guard = on_tiny(thawing)[0]
    model.requires_grad_(False)
    guard.begin(model, tmp_path / "kept.safetensors", 0)
    weight = next(iter(model.parameters())).requires_grad_(True)
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(3)
    assert not guard.look(model, 1)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_a_probe_is_read_as_text_or_as_answers_whatever_the_objective(tmp_path, objective):
    file = tmp_path / "probe.jsonl"
    file.write_text(json.dumps({"text": "Once."}) + "\n")
    assert probe_rows(file, plan(objective=objective)) == [PlainText("Once.")]
    file.write_text(json.dumps({"input_text": "Who?", "target_text": "Tom."}) + "\n")
    assert probe_rows(file, plan(objective=objective)) == [Conversation(({"role": "user", "content": "Who?"},), "Tom.")]
    with pytest.raises(DataError, match=r"probe\.jsonl"):
        probe_rows(tmp_path / "no" / "probe.jsonl", plan())


@pytest.mark.slow
def test_replay_keeps_most_of_what_a_decoder_knew(data):
    """stories260k learns GSM8K: with a fifth of its own stories it loses at most half of what it loses on stories without.

    Unseen stories and questions; what it learns is within 0.1 nats of what it learns without.
    """
    from benchmarks.forgetting import run

    base, without, beside = run(data, 40, (0.2,))
    assert without["stories"] - base["stories"] > 0.2, "nothing was lost, so nothing is shown"
    assert beside["stories"] - base["stories"] <= 0.5 * (without["stories"] - base["stories"])
    assert beside["gsm8k"] < without["gsm8k"] + 0.1 < base["gsm8k"] - 1
