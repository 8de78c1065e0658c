"""Preferences of people, learnt by a tiny decoder: pairs that it has never seen are told apart better than by chance."""

import numpy as np
import pytest

from protocol.plan import Plan
from strategies.base_model import find, load_tokenizer
from strategies.data.encode import encode
from strategies.data.formats import load as load_rows
from strategies.evaluation.measure import measure
from strategies.training import fit


@pytest.mark.slow
def test_dpo_tells_held_out_pairs_apart(data):
    """Oracle: of as many coin throws as there are pairs, bootstrapped, 19 in 20 samples are above one half.

    A bag of characters gets 70 % of these pairs right and more text does not help it, so much is not to be expected.
    """
    base = find(str(data / "models" / "stories260k-hf"))
    plan = Plan.model_validate(
        {
            "base_model": base.name,
            "objective": "dpo",
            "lora": {"r": 8, "lora_alpha": 16},
            "data": {"max_length": 768},
            "training": {"learning_rate": 3e-4, "batch_size": 8, "max_steps": 32},
        }
    )
    rows = load_rows(data / "pref" / "dpo_en.jsonl", plan)
    held_out, train = rows[::3], [row for at, row in enumerate(rows) if at % 3]
    assert measure(plan, base, held_out)["reward-accuracy"] == 0, "against itself a model tells nothing apart"
    found = measure(plan, base, held_out, fit(plan, base, train).adapter)
    pairs = len(encode(held_out, load_tokenizer(base), 768, "dpo").rows)
    won = np.arange(pairs) < round(found["reward-accuracy"] * pairs)
    drawn = np.random.default_rng(0).choice(won, (10_000, pairs)).mean(axis=1)
    assert np.quantile(drawn, 0.05) > 0.5, found
