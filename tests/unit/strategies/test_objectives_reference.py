"""What dpo, kto and rl stay near: the base under an adapter that is switched off, or the model of the stage before."""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.errors import ModelError
from protocol.files import write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.base_model import CHAT_TEMPLATE, find, load
from strategies.data.encode import encode
from strategies.data.formats import Feedback, Preference
from strategies.methods import registry
from strategies.objectives.reference import prepare, told
from strategies.training import fit

NAMES = ["Tim", "Lily", "Ben", "Sam", "Mia", "Tom", "Ann", "Max"]
PAIRS = [
    Preference(({"role": "user", "content": f"Where is {name}?"},), f"{name} is in the park with a dog.", "Who knows?")
    for name in NAMES
]


@pytest.fixture(scope="module")
def base(data):
    return str(data / "models" / "stories260k-hf")


def plan_of(base, objective="dpo", r=4, **more):
    training = {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 3, "logging_steps": 1, **more.pop("training", {})}
    lora = {"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"], **more.pop("lora", {})}
    return Plan.model_validate({"base_model": base, "objective": objective, "lora": lora, "training": training, **more})


def drawn(plan, rank, size=0.05, seed=0):
    rng = np.random.default_rng(seed)
    modules = registry.shape(find(plan.base_model), plan).modules
    return Adapter(
        {
            name: Factors(
                (size * rng.standard_normal((rank, d_in))).astype(np.float32),
                (size * rng.standard_normal((d_out, rank))).astype(np.float32),
                2.0,
            )
            for name, (d_out, d_in) in modules.items()
        }
    )


def attached(plan, adapter=None):
    """A model that trains, as ``fit`` makes it."""
    import torch

    torch.manual_seed(0)
    method, base = registry.method_of(plan), find(plan.base_model)
    model = method.attach(load(base, plan)[0], plan)
    method.load(model, adapter or Adapter())
    if adapter is None:
        method.begin(model, plan, base)
    return model.eval()


def log_probs(model, tokenizer, row, answer):
    """Oracle: one row at a time, no padding, softmax in float64."""
    import torch

    before = tokenizer.apply_chat_template(list(row.prompt), add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*row.prompt, {"role": "assistant", "content": answer}])["input_ids"]
    with torch.no_grad():
        likely = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(likely[at - 1, whole[at]]) for at in range(len(before), len(whole)))


@pytest.mark.parametrize("start", ["default", "pissa"])
@pytest.mark.parametrize("rank", [None, 2, 9])
def test_with_its_adapter_switched_off_the_model_is_the_base(base, start, rank):
    """Also where directions beyond the rank are frozen in place, and where the factors began with a part of the base."""
    import torch

    plan = plan_of(base, lora={"init_lora_weights": start})
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain = load(find(base), plan)[0](ids).logits
        model = attached(plan, rank and drawn(plan, rank))
        if rank:
            assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, plain)


def test_what_is_frozen_stays_frozen_when_the_adapter_is_switched_off_and_on(base):
    plan = plan_of(base)
    model = attached(plan)
    registry.method_of(plan).train_only(model, "B")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prepare(model)
    with model.disable_adapter():
        pass
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert any(before.values())


def test_an_adapter_on_the_output_layer_is_refused(base):
    """TRL multiplies with that layer's weight itself, so that its adapter would be no part of the loss."""
    plan = plan_of(base, lora={"target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(ModelError, match="output layer"):
        fit(plan, find(base), PAIRS)


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_factor_that_is_not_to_train_does_not_move(base, trains):
    plan, start = plan_of(base), drawn(plan_of(base), 4)
    made = fit(plan, find(base), PAIRS, start=start, reference=Adapter(), trains=trains).adapter
    for module, pair in start.factors.items():
        moved = made.factors[module]
        assert np.array_equal(moved.A, pair.A) == (trains == "B")
        assert np.allclose(moved.scaling * moved.B, pair.scaling * pair.B, atol=1e-7) == (trains == "A")


def test_the_reference_is_read_answer_by_answer(base):
    plan = plan_of(base)
    model, tokenizer = load(find(base), plan)
    rows = encode(PAIRS, tokenizer, 512, "dpo").rows
    for row, made in zip(PAIRS, told(rows, model, plan, tokenizer.pad_token_id), strict=True):
        assert made["ref_chosen_logps"] == pytest.approx(log_probs(model, tokenizer, row, row.chosen), abs=1e-3)
        assert made["ref_rejected_logps"] == pytest.approx(log_probs(model, tokenizer, row, row.rejected), abs=1e-3)


@pytest.mark.parametrize("rank", [2, 9])
def test_a_training_that_begins_with_an_adapter_stays_near_it(base, rank):
    """Before the first step policy and reference are one, so the loss is log 2; near the base it is not."""
    plan = plan_of(base, training={"max_steps": 1})
    start = drawn(plan, rank, size=0.2)
    near = fit(plan, find(base), PAIRS, start=start).metrics["train-loss"]
    far = fit(plan, find(base), PAIRS, start=start, reference=Adapter()).metrics["train-loss"]
    assert near == pytest.approx(math.log(2), abs=1e-5)
    assert abs(far - math.log(2)) > 1e-2


def test_near_the_base_the_loss_is_that_of_the_two_models(base):
    """Oracle: eq. 7 of the paper from plain transformers and PEFT; one step over all pairs."""
    plan = plan_of(base, training={"max_steps": 1, "batch_size": len(PAIRS)})
    start = drawn(plan, 4, size=0.2)
    loss = fit(plan, find(base), PAIRS, start=start, reference=Adapter()).metrics["train-loss"]
    assert loss == pytest.approx(oracle(base, start), abs=1e-5)


def oracle(base, start):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    before = [[log_probs(plain, tokenizer, row, answer) for answer in (row.chosen, row.rejected)] for row in PAIRS]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(base_digest="0" * 64, kind="global", r=4, federation="x", round=1, parent="", num_examples=1)
        write_adapter(Path(folder) / "adapter", start, manifest, plan_of(base))
        model = PeftModel.from_pretrained(plain, str(Path(folder) / "adapter")).eval()
    after = [[log_probs(model, tokenizer, row, answer) for answer in (row.chosen, row.rejected)] for row in PAIRS]
    margins = [0.1 * ((a - b) - (c - d)) for (a, c), (b, d) in zip(after, before, strict=True)]
    return float(np.mean([math.log1p(math.exp(-margin)) for margin in margins]))


def test_kto_begins_at_a_half_near_its_start(base):
    """Before the first step every implied reward and ``z_0`` are 0, and 1 - sigma(0) is a half."""
    rows = [Feedback(row.prompt, row.chosen, liked=bool(at % 2)) for at, row in enumerate(PAIRS)]
    plan = plan_of(base, "kto", training={"max_steps": 1})
    near = fit(plan, find(base), rows, start=drawn(plan, 9, size=0.2)).metrics["train-loss"]
    assert near == pytest.approx(0.5, abs=1e-5)


def test_held_out_pairs_are_told_of_the_reference_too(base):
    plan = plan_of(base, training={"eval_steps": 1, "max_steps": 1, "learning_rate": 1e-12})
    metrics = fit(plan, find(base), PAIRS[:4], PAIRS[4:], start=drawn(plan, 9, size=0.2)).metrics
    assert metrics["eval-loss"] == pytest.approx(math.log(2), abs=1e-5)
