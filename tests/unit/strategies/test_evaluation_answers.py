"""Batched answers, times, turns on one base: the oracle is plain transformers, one prompt at a time on a fresh model."""

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.evaluation import latency
from strategies.evaluation.turns import each
from strategies.methods import registry
from strategies.writer import continuations

PROMPTS = [
    "Once",
    "Once upon a time",
    "Tim had a big red ball and he",
    "The dog",
    "Lily and her mom went to the park to play. One day",
]
METHODS = {
    "lora": {"method": "lora", "lora": {"r": 4}},
    "ia3": {"method": "ia3"},
    "prompt-tuning": {"method": "prompt-tuning", "prompt": {"num_virtual_tokens": 5}},
    "p-tuning-v2": {"method": "p-tuning-v2", "prompt": {"num_virtual_tokens": 5}},
    "bottleneck": {"method": "bottleneck"},
    "bitfit": {"method": "bitfit", "bitfit": {"add_missing": True}},
}


@pytest.fixture(scope="module")
def stories(data):
    return str(data / "models" / "stories260k-hf")


def plan_of(stories, name, **more):
    return Plan.model_validate({"base_model": stories, **METHODS[name], **more})


def drawn(plan, seed=0):
    """An adapter that changes what the base says."""
    rng = np.random.default_rng(seed)
    shape = registry.shape(find(plan.base_model), plan)

    def tensor(*size):
        return (0.2 * rng.standard_normal(size)).astype(np.float32)

    factors = {name: Factors(tensor(4, d_in), tensor(d_out, 4)) for name, (d_out, d_in) in shape.modules.items()}
    lift = 1.0 if plan.method == "ia3" else 0.0
    return Adapter(factors, {name: tensor(*size) + np.float32(lift) for name, size in shape.dense.items()})


def one_by_one(model, ids, longest):
    import torch

    made = []
    for prompt in ids:
        batch = torch.tensor([prompt])
        with torch.inference_mode():
            told = model.generate(batch, attention_mask=torch.ones_like(batch), do_sample=False, max_new_tokens=longest)
        made.append(told[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("name", ["base", *METHODS])
def test_answers_in_batches_are_those_of_plain_transformers_one_by_one(stories, name):
    plan = plan_of(stories, name if name in METHODS else "lora")
    model, tokenizer = with_adapter(plan, find(stories), drawn(plan) if name in METHODS else None)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = one_by_one(model, ids, 16)
    assert len({tuple(answer) for answer in expected}) > 2, "answers that are all alike would prove little"
    for size in (3, 16):
        assert continuations(model, tokenizer, ids, max_new_tokens=16, batch_size=size) == expected


def test_an_answer_ends_with_its_end_and_is_no_longer_than_allowed(stories):
    """Oracle: the end is made the token that plain decoding gives third."""
    model, tokenizer = with_adapter(plan_of(stories, "lora"), find(stories), None)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    plain = one_by_one(model, ids, 8)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(plain[0][2])
    made = continuations(model, tokenizer, ids, max_new_tokens=8, batch_size=4)
    assert made[0] == plain[0][: plain[0].index(plain[0][2]) + 1]
    assert all(answer == full[: len(answer)] for answer, full in zip(made, plain, strict=True))
    assert max(map(len, made)) <= 8


def test_models_in_turn_are_those_that_are_loaded_afresh_to_the_bit(stories):
    """Also after an adapter that cannot be taken off the base again."""
    import torch

    base = find(stories)
    contestants = {"base": (plan_of(stories, "lora"), None)}
    for at, name in enumerate(["lora", "ia3", "bottleneck", "lora", "bitfit", "prompt-tuning", "lora"]):
        plan = plan_of(stories, name)
        contestants[f"{name}-{at}"] = (plan, drawn(plan, at))
    contestants["base again"] = contestants["base"]
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    met = []
    for who, plan, model, _ in each(contestants, base):
        fresh = with_adapter(plan, base, contestants[who][1])[0]
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits), who
        met.append(who)
    assert met == list(contestants)


def test_a_quantised_base_takes_one_adapter_after_the_other(stories):
    """As above: the base first, since an adapter makes what is not quantised float32."""
    import torch

    base, plan = find(stories), plan_of(stories, "lora", method="qlora", precision="nf4")
    contestants = {"base": (plan, None), "one": (plan, drawn(plan, 1)), "two": (plan, drawn(plan, 2))}
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    for who, _, model, _ in each(contestants, base):
        fresh = with_adapter(plan, base, contestants[who][1])[0]
        with torch.inference_mode():
            assert torch.equal(model(input_ids=ids).logits, fresh(input_ids=ids).logits), who


def test_a_base_is_loaded_once_for_adapters_that_come_off_it(stories, monkeypatch):
    loads = []
    from strategies import adapted

    load = adapted.load
    monkeypatch.setattr(adapted, "load", lambda *given: loads.append(given) or load(*given))
    plan = plan_of(stories, "lora")
    contestants = {"base": (plan, None), "one": (plan, drawn(plan, 1)), "two": (plan, drawn(plan, 2))}
    assert [who for who, *_ in each(contestants, find(stories))] == ["base", "one", "two"]
    assert len(loads) == 1


def test_times_add_up_to_the_time_that_generating_takes(stories):
    """Oracle: the clock around the call; what is not in the two figures is the little that is done before and after."""
    import time

    model, tokenizer = with_adapter(plan_of(stories, "lora"), find(stories), None)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]] * 3
    begin = time.perf_counter()
    found = latency.figures(model, tokenizer, ids, new_tokens=24)
    taken = time.perf_counter() - begin
    first, rate = found["time-to-first-token"].value, found["tokens-per-second"].value
    # Of nine prompts eight are timed, after a warm-up.
    assert 0 < 8 * (first + 23 / rate) < taken
    assert len(found["tokens-per-second"].rows) == 9
    assert found["time-to-first-token"].better == "lower"
