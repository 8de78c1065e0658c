"""Held-out figures of every objective: the oracles are plain transformers, PEFT and numpy, one row at a time in float64."""

import json
import math
import random

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import CHAT_TEMPLATE, find
from strategies.data.formats import Feedback, PlainText, Preference, Prompt, ScoredText
from strategies.evaluation.measure import measure
from strategies.methods import registry
from strategies.writer import continuations

NAMES = ["Tim", "Lily", "Ben", "Sam", "Mia", "Tom", "Ann"]
PROMPTS = [({"role": "user", "content": f"Where is {name}?"},) for name in NAMES]
# Some preferred answers are long, some short.
GOOD = [f"{name} is in the park with a big dog." if at % 3 else "Who knows?" for at, name in enumerate(NAMES)]
BAD = [f"Ask {name}." if at % 3 else f"One day {name} went to the sea with mom." for at, name in enumerate(NAMES)]
PAIRS = [Preference(*row) for row in zip(PROMPTS, GOOD, BAD, strict=True)]


@pytest.fixture(scope="module")
def base(data):
    return str(data / "models" / "stories260k-hf")


def plan_of(base, objective, **more):
    content = {"base_model": base, "objective": objective, "lora": {"r": 4, "lora_alpha": 8}, "training": {"batch_size": 4}}
    return Plan.model_validate({**content, **more})


def drawn(plan, seed=0):
    rng = np.random.default_rng(seed)
    shape = registry.shape(find(plan.base_model), plan)
    factors = {
        name: Factors(
            (0.1 * rng.standard_normal((4, d_in))).astype(np.float32),
            (0.1 * rng.standard_normal((d_out, 4))).astype(np.float32),
        )
        for name, (d_out, d_in) in shape.modules.items()
    }
    return Adapter(factors, {name: rng.standard_normal(size).astype(np.float32) for name, size in shape.dense.items()})


def plain(base, plan, adapter, folder):
    """The base, and the base with the adapter, by transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    kind = AutoModelForCausalLM if plan.task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    settings = {} if plan.task_type == "CAUSAL_LM" else {"num_labels": 1}
    manifest = Manifest(base_digest="0" * 64, kind="global", r=4, federation="x", round=1, parent="", num_examples=1)
    write_adapter(folder / "adapter", adapter, manifest, plan)
    models = [kind.from_pretrained(base, dtype="float32", **settings).eval() for _ in range(2)]
    for model in models:
        model.config.pad_token_id = tokenizer.pad_token_id
    return models[0], PeftModel.from_pretrained(models[1], str(folder / "adapter")).eval(), tokenizer


def likely(model, tokenizer, prompt, answer):
    import torch

    before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}])["input_ids"]
    with torch.no_grad():
        table = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(table[at - 1, whole[at]]) for at in range(len(before), len(whole)))


def scored(model, ids):
    import torch

    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def nll(margins):
    return float(np.mean([math.log1p(math.exp(-margin)) for margin in margins]))


def test_dpo_compares_what_the_policy_and_its_reference_find_likely(base, tmp_path):
    plan = plan_of(base, "dpo", dpo={"beta": 0.3})
    adapter = drawn(plan)
    before, after, tokenizer = plain(base, plan, adapter, tmp_path)
    margins = [
        0.3
        * (
            (likely(after, tokenizer, prompt, good) - likely(before, tokenizer, prompt, good))
            - (likely(after, tokenizer, prompt, bad) - likely(before, tokenizer, prompt, bad))
        )
        for prompt, good, bad in zip(PROMPTS, GOOD, BAD, strict=True)
    ]
    found = measure(plan, find(base), PAIRS, adapter)
    assert found["loss"] == pytest.approx(nll(margins), abs=1e-4)
    assert found["reward-margin"] == pytest.approx(np.mean(margins), abs=1e-3)
    assert found["reward-accuracy"] == np.mean(np.array(margins) > 0)
    assert 0 < found["reward-accuracy"] < 1, "an adapter for which the three could not be told apart proves nothing"


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_model_against_itself_wins_half_of_its_pairs(base, with_reference):
    plan = plan_of(base, "dpo")
    adapter = drawn(plan) if with_reference else None
    found = measure(plan, find(base), PAIRS, adapter, adapter or Adapter())
    assert found == {"loss": pytest.approx(math.log(2)), "reward-accuracy": 0.0, "reward-margin": 0.0}


def test_the_reference_may_be_an_adapter_of_its_own(base):
    """Oracle: of two models each is the other's reference with the opposite sign."""
    plan = plan_of(base, "dpo")
    one, two = drawn(plan, 1), drawn(plan, 2)
    there, back = measure(plan, find(base), PAIRS, one, two), measure(plan, find(base), PAIRS, two, one)
    assert there["reward-margin"] == pytest.approx(-back["reward-margin"], abs=1e-6)
    assert there["reward-margin"] != 0


def test_kto_weighs_each_answer_against_the_mean_distance(base, tmp_path):
    plan = plan_of(base, "kto", kto={"beta": 0.2, "desirable_weight": 1.5, "undesirable_weight": 0.5})
    adapter = drawn(plan)
    rows = [Feedback(prompt, answer, liked=at % 3 == 0) for at, (prompt, answer) in enumerate(zip(PROMPTS, GOOD, strict=True))]
    before, after, tokenizer = plain(base, plan, adapter, tmp_path)

    def ratio(prompt, answer):
        return likely(after, tokenizer, prompt, answer) - likely(before, tokenizer, prompt, answer)

    order = list(rows)
    random.Random(plan.training.seed).shuffle(order)
    z_0 = max(0.0, np.mean([ratio(row.prompt, order[at - 1].answer) for at, row in enumerate(order)]))
    ratios = [ratio(row.prompt, row.answer) for row in rows]
    losses = [
        1.5 / (1 + math.exp(0.2 * (r - z_0))) if row.liked else 0.5 / (1 + math.exp(0.2 * (z_0 - r)))
        for r, row in zip(ratios, rows, strict=True)
    ]
    found = measure(plan, find(base), rows, adapter)
    assert found["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    liked = [0.2 * r for r, row in zip(ratios, rows, strict=True) if row.liked]
    others = [0.2 * r for r, row in zip(ratios, rows, strict=True) if not row.liked]
    assert found["reward-desirable"] == pytest.approx(np.mean(liked), abs=1e-3)
    assert found["reward-undesirable"] == pytest.approx(np.mean(others), abs=1e-3)


def test_a_reward_model_is_right_where_it_scores_the_preferred_answer_higher(base, tmp_path):
    plan = plan_of(base, "reward")
    adapter = drawn(plan)
    _, model, tokenizer = plain(base, plan, adapter, tmp_path)

    def score(prompt, answer):
        return scored(model, tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}])["input_ids"])

    margins = [score(prompt, good) - score(prompt, bad) for prompt, good, bad in zip(PROMPTS, GOOD, BAD, strict=True)]
    found = measure(plan, find(base), PAIRS, adapter)
    assert found == {"loss": pytest.approx(nll(margins), abs=1e-4), "accuracy": np.mean(np.array(margins) > 0)}


def test_regression_is_measured_as_numpy_does(data, base, tmp_path):
    plan = plan_of(base, "regression")
    adapter = drawn(plan)
    texts = [json.loads(line)["text"] for line in (data / "classify" / "snips_test.jsonl").read_text().splitlines()[:9]]
    rows = [ScoredText(text, len(text) / 20) for text in texts]
    _, model, tokenizer = plain(base, plan, adapter, tmp_path)
    made = np.array([scored(model, tokenizer(text)["input_ids"]) for text in texts])
    wanted = np.array([row.score for row in rows])
    found = measure(plan, find(base), rows, adapter)
    assert found["mse"] == pytest.approx(np.mean((made - wanted) ** 2), rel=1e-4)
    assert found["mae"] == pytest.approx(np.mean(np.abs(made - wanted)), rel=1e-4)
    assert found["pearson"] == pytest.approx(np.corrcoef(made, wanted)[0, 1], abs=1e-4)
    assert measure(plan, find(base), [ScoredText(text, 1.0) for text in texts], adapter)["pearson"] == 0


def test_pretraining_is_measured_on_every_token_of_its_blocks(data, base):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = [json.loads(line)["text"] for line in (data / "text" / "stories_selfgen_en.jsonl").read_text().splitlines()[:3]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    line = [token for text in texts for token in tokenizer(text + tokenizer.eos_token)["input_ids"]]
    blocks = [line[at : at + 100] for at in range(0, len(line), 100)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    losses = []
    with torch.no_grad():
        for block in (block for block in blocks if len(block) > 1):
            table = model(torch.tensor([block])).logits[0].double().log_softmax(-1)
            losses += [-float(table[at - 1, block[at]]) for at in range(1, len(block))]
    found = measure(plan_of(base, "pretraining", data={"max_length": 100}), find(base), [PlainText(text) for text in texts])
    assert found == {
        "loss": pytest.approx(np.mean(losses), abs=1e-4),
        "perplexity": pytest.approx(math.exp(np.mean(losses)), rel=1e-4),
    }


def test_rl_measures_the_reward_of_drawn_answers_and_their_distance(base, monkeypatch, tmp_path):
    (tmp_path / "rule_of_this_test.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"reward_functions": ["rule_of_this_test:length"], "max_completion_length": 12, "temperature": 0.8}
    plan = plan_of(base, "rl", rl=settings)
    rows, adapter = [Prompt(prompt) for prompt in PROMPTS], drawn(plan)
    alone, moved = measure(plan, find(base), rows), measure(plan, find(base), rows, adapter)
    assert alone["kl"] == 0
    assert moved["kl"] > 0
    assert moved == measure(plan, find(base), rows, adapter), "the same seed draws the same answers"
    assert 0 < alone["reward"] <= 12 * 20
    assert measure(plan, find(base), rows, adapter, adapter)["kl"] == 0


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_distance_of_a_policy_is_its_exact_divergence_but_for_the_draw(base, monkeypatch, tmp_path, temperature):
    """Oracle: the sum over the whole vocabulary at each place of the same answers, of plain models, at the draw's temperature.

    What is drawn differs from it by a martingale, whose variance the same tables give: four standard errors are allowed.
    """
    import torch

    (tmp_path / "rule_of_this_test.py").write_text("def length(prompts, answers):\n    return [len(a) for a in answers]\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"reward_functions": ["rule_of_this_test:length"], "max_completion_length": 12, "temperature": temperature}
    plan = plan_of(base, "rl", rl=settings)
    adapter, rows = drawn(plan), [Prompt(prompt) for prompt in PROMPTS * 10]
    reference, policy, tokenizer = plain(base, plan, adapter, tmp_path)
    prompts = [tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True)["input_ids"] for row in rows]
    answers = continuations(
        policy, tokenizer, prompts, temperature=temperature, max_new_tokens=12, batch_size=4, seed=plan.training.seed
    )
    nats = variance = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            own, other = (
                (model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
                for model in (policy, reference)
            )
        ratio = own - other
        exact = (own.exp() * ratio).sum(-1)
        nats += float(exact.sum())
        variance += float((own.exp() * (ratio - exact[:, None]) ** 2).sum())
    tokens = sum(map(len, answers))
    found = measure(plan, find(base), rows, adapter)["kl"]
    assert nats / tokens > 0.1
    assert found == pytest.approx(nats / tokens, abs=4 * math.sqrt(variance) / tokens)
