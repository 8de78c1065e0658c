"""One base, loaded once, with adapters of every method: each answers as it does alone, and none reaches another or the base."""

import numpy as np
import pytest
import torch

import strategies.adapted
from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapters.serving import Served
from strategies.base_model import find
from strategies.generation import answer
from strategies.methods.registry import shape

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUESTIONS = ["Where is number 3?", "Who lives in house 12, and since when?"]
LORA = {"lora": {"target_modules": ["q_proj", "embed_tokens"]}}
PLANS = {
    "lora": LORA,
    "lora, other rank": {"lora": {"target_modules": ["down_proj"]}},
    "lora, whole norm": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}},
    "dora": {"lora": {"use_dora": True, "target_modules": ["v_proj"]}},
    "ia3": {"method": "ia3"},
    "prompt-tuning": {"method": "prompt-tuning", "prompt": {"num_virtual_tokens": 3}},
    "p-tuning-v2": {"method": "p-tuning-v2", "prompt": {"num_virtual_tokens": 4}},
    "full": {"method": "full"},
    "bitfit": {"method": "bitfit", "bitfit": {"add_missing": True}},
    "bottleneck": {"method": "bottleneck"},
}


def stored(folder, name, settings, seed=0, r=2, scale=0.1):
    rng = np.random.default_rng(seed)
    base, plan = find(name), Plan.model_validate({"base_model": name, **settings})

    def draw(*size):
        return np.float32(scale) * rng.standard_normal(size).astype(np.float32)

    known = shape(base, plan)
    factors = {module: Factors(draw(r, d_in), draw(d_out, r)) for module, (d_out, d_in) in known.modules.items()}
    dense = {name: draw(*size) + np.float32("norm" in name or "_l" in name[-6:]) for name, size in known.dense.items()}
    manifest = Manifest(base_digest=base.digest, kind="adapter", embeddings=known.embeddings)
    write_adapter(folder, Adapter(factors, dense), manifest, plan)
    return read_stored(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    home = tmp_path_factory.mktemp("adapters")
    return {name: stored(home / str(at), "tiny", PLANS[name], at, r=2 + at % 2) for at, name in enumerate(PLANS)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_adapter_answers_as_alone_in_any_order(adapters, precision, monkeypatch):
    """Oracle: a base loaded for each. In bf16 BitFit's biases and prompts are float32 beside what is shared."""
    plan, base = Plan(precision=precision), find("tiny")
    names = list(adapters) if precision == "fp32" else ["bitfit", "lora", "bottleneck"]
    loads = []
    load = strategies.adapted.load
    monkeypatch.setattr(strategies.adapted, "load", lambda *given: loads.append(1) or load(*given))
    served = Served(plan, base)
    before = served.answer(None, QUESTIONS, 8)
    for name in names:
        served.add(name, adapters[name])
    told = {name: served.answer(name, QUESTIONS, 8) for name in [*names, *reversed(names)]}
    assert served.answer(None, QUESTIONS, 8) == before == answer(plan, base, QUESTIONS, None, 8)
    assert len(loads) == 2, "one for the served base, one for the oracle"
    for name, stored in adapters.items():
        if name in names:
            assert told[name] == answer(stored.on(plan), base, QUESTIONS, stored.adapter, 8), name
    assert len({tuple(found) for found in told.values()}) > len(names) // 2


def test_the_base_lies_in_memory_once(adapters):
    """Every parameter of a view is the base's own tensor, but for what the adapter adds or changes."""
    served = Served(Plan(), find("tiny"))
    mine = {tensor.data_ptr() for tensor in served._model.parameters()}
    for name in ("lora", "dora", "ia3", "p-tuning-v2", "bottleneck"):
        served.add(name, adapters[name])
        there = {tensor.data_ptr() for tensor in served._views[name].parameters()}
        assert mine <= there, name
    served.add("full", adapters["full"])
    assert not mine & {tensor.data_ptr() for tensor in served._views["full"].parameters()}
    served.add("bitfit", adapters["bitfit"])
    assert mine <= {tensor.data_ptr() for tensor in served._views["bitfit"].parameters()}, "Llama's biases are all added"


def test_lora_adapters_of_several_ranks_answer_in_one_batch(adapters, tmp_path):
    """Oracle: one at a time. Rows are padded on the left; greedy tokens are the same unless two are equally likely."""
    served = Served(Plan(), find("tiny"))
    for at, settings in enumerate((LORA, PLANS["lora, other rank"])):
        served.add(f"./lora.{at}", stored(tmp_path / str(at), "tiny", settings, at, r=2 + at, scale=0.4))
    asked = [("./lora.0", QUESTIONS[1]), (None, QUESTIONS[0]), ("./lora.1", QUESTIONS[0]), ("./lora.0", QUESTIONS[0])]
    alone = [served.answer(name, [question], 8)[0] for name, question in asked]
    assert served.answer_together(asked, 8) == alone
    assert len(set(alone)) > 2
    served.add("dora", adapters["dora"])
    with pytest.raises(AdapterError, match="dora: no plain LoRA"):
        served.answer_together([*asked, ("dora", QUESTIONS[0])], 8)
    assert Served(Plan(), find("tiny")).answer_together([(None, QUESTIONS[0])], 8) == [alone[1]]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_base_is_shared_too(adapters, precision):
    plan = Plan.model_validate({"precision": precision, "method": "qlora"})
    base = find("tiny")
    served = Served(plan, base)
    for name in ("lora", "ia3"):
        served.add(name, adapters[name])
        used = adapters[name].on(plan)
        assert served.answer(name, QUESTIONS, 6) == answer(used, base, QUESTIONS, adapters[name].adapter, 6), name
    assert served.answer(None, QUESTIONS, 6) == answer(plan, base, QUESTIONS, None, 6)
    quantised = [tensor.data_ptr() for tensor in served._model.parameters() if tensor.dtype in (torch.uint8, torch.int8)]
    assert quantised
    assert set(quantised) <= {tensor.data_ptr() for tensor in served._views["lora"].parameters()}
