"""AdaLoRA: the allocation is plain PEFT's, the budget is reached, and what travels is the LoRA adapter that it says it is."""

import numpy as np
import pytest
import torch
from small_bases import logits, saved

from protocol.adapter import Adapter, Factors
from protocol.configuration import parse
from protocol.errors import AdapterError, ConfigurationError, ModelError
from protocol.federation import Federation
from protocol.plan import Plan
from protocol.product_space import at_rank
from strategies.base_model import find, load
from strategies.data.formats import Conversation, LabelledText
from strategies.methods import adalora, lora
from strategies.methods.registry import shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in ("llama", "gpt2", "bert")}


def plan_of(name, r=4, training=None, precision="fp32", adalora=None, **settings):
    task = {"objective": "classification", "data": {"labels": LABELS}} if name.endswith("bert") else {}
    section = {"r": r, "lora_alpha": 16, **settings}
    content = {"base_model": name, "method": "adalora", "lora": section, "precision": precision, "adalora": adalora or {}}
    return Plan.model_validate({**content, "training": training or {}, **task})


def attached(plan):
    torch.manual_seed(0)
    return adalora.attach(load(find(plan.base_model), plan)[0], plan)


def drawn(modules, rank, seed=0):
    """An adapter as a server sends it: the directions of each module ordered."""
    rng = np.random.default_rng(seed)
    made = {}
    for module, (d_out, d_in) in modules.items():
        pair = Factors(A=0.3 * rng.standard_normal((rank, d_in)), B=0.3 * rng.standard_normal((d_out, rank)))
        ordered = at_rank(pair, rank)
        made[module] = Factors(ordered.A.astype(np.float32), ordered.B.astype(np.float32))
    return Adapter(made)


# What PEFT does ------------------------------------------------------------------------------------------------------------


def test_a_training_is_plain_pefts_with_the_same_allocation(bases, tmp_path):
    """The oracle is PEFT's own recipe: its penalty in the model's loss, and its allocator called after every optimizer step."""
    from peft import AdaLoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    steps, name = 10, bases["bert"]
    rows = [LabelledText(f"{['one', 'two', 'three'][n % 3]} {n}", n % 3) for n in range(24)]
    training = {"learning_rate": 2e-2, "batch_size": 8, "max_steps": steps, "seed": 7, "weight_decay": 0.01}
    settings = {"init_ratio": 2.0, "tinit_ratio": 0.2, "tfinal_ratio": 0.3, "orth_reg_weight": 0.1, "delta_t": 2}
    plan = plan_of(name, r=2, training=training, adalora=settings, target_modules=["query", "dense"], lora_dropout=0.1)
    ours = fit(plan, find(name), rows).adapter

    set_seed(7)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3, dtype="float32")
    config = AdaLoraConfig(
        target_r=2, init_r=4, tinit=2, tfinal=3, deltaT=2, total_step=steps, orth_reg_weight=0.1, lora_alpha=16,
        lora_dropout=0.1, target_modules=["query", "dense"], exclude_modules=r"classifier(\..*)?", task_type="SEQ_CLS",
    )  # fmt: skip
    model = get_peft_model(model, config)

    class Allocate(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            model.base_model.update_and_allocate(state.global_step)

    encoded = [{**tokenizer(row.text), "labels": row.label} for row in rows]
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            learning_rate=2e-2,
            per_device_train_batch_size=8,
            max_steps=steps,
            warmup_steps=0.1,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            seed=7,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Allocate()],
    ).train()
    kept = {}
    for module, pair in ours.factors.items():
        layer = model.get_submodule(f"base_model.model.{module}")
        plain = layer.get_delta_weight("default").detach().double().numpy()
        assert np.abs(pair.product() - plain).max() <= 1e-6
        kept[module] = int((layer.lora_E["default"] != 0).sum())
    assert max(np.abs(pair.product()).max() for pair in ours.factors.values()) > 1e-3
    assert ours.ranks() == {module: max(1, rank) for module, rank in kept.items()}
    assert len(set(kept.values())) > 1, "an allocation that treats all alike proves nothing"
    assert sum(kept.values()) == 2 * len(kept)


@pytest.mark.parametrize("steps", [3, 15])
@pytest.mark.parametrize("ratios", [{}, {"tinit_ratio": 0.9, "tfinal_ratio": 0.9}, {"tinit_ratio": 0.0, "tfinal_ratio": 0.0}])
def test_the_budget_is_reached_however_short_the_training(bases, steps, ratios):
    """``lora.r`` a module in the mean; of directions that are exactly as important, more than needed go (PEFT's threshold)."""
    settings = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": steps}
    plan = plan_of(bases["llama"], r=2, training=settings, adalora=ratios, target_modules=["q_proj", "down_proj"])
    trained = fit(plan, find(bases["llama"]), ROWS).adapter
    on = [int(np.count_nonzero(np.abs(pair.A).max(1))) for pair in trained.factors.values()]
    assert sum(on) == 2 * len(on)
    assert max(on) <= plan.update_rank == 3


def test_two_steps_are_too_few_to_learn_what_matters_and_train_all_directions(bases):
    plan = plan_of(bases["llama"], r=2, training={"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2})
    trained = fit(plan, find(bases["llama"]), ROWS).adapter
    assert set(trained.ranks().values()) == {3}


def test_the_pull_towards_orthogonal_factors_acts_where_trl_computes_the_loss_too(bases):
    """One step of plain descent with and without the pull differs by the rate times the pull's gradient.

    That is ``weight / n * 2 P (P.T P - 1) / |P.T P - 1|`` over the ``n`` factors of all modules, in float64 from the start.
    """
    rate, weight = 0.1, 0.5
    settings = {"learning_rate": rate, "max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1e6}

    def trained(weight):
        plan = plan_of(bases["llama"], r=2, training=settings, adalora={"orth_reg_weight": weight}, target_modules=["q_proj"])
        return fit(plan, find(bases["llama"]), ROWS).adapter.factors, plan

    (pulled, plan), (free, _) = trained(weight), trained(1e-12)
    begun = {module: adalora._triplet(layer)[0] for module, layer in lora.layers(attached(plan)).items()}
    assert pulled.keys() == begun.keys()
    for module, parameter in begun.items():
        p = parameter.detach().double().numpy()
        away = p.T @ p - np.eye(p.shape[1])
        gradient = weight / (2 * len(begun)) * 2 * p @ away / np.linalg.norm(away)
        assert np.abs(gradient).max() > 1e-3
        assert np.abs(free[module].B - pulled[module].B - rate * gradient).max() <= 1e-7


# What travels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 6, 9], ids=["lower than init_r", "init_r", "higher, partly frozen"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_loaded_adapter_answers_as_the_plain_lora_that_it_is(bases, kind, rank):
    plan = plan_of(bases[kind])
    adapter = drawn(shape(find(bases[kind]), plan).modules, rank)
    model = attached(plan)
    adalora.load(model, adapter)
    plain_plan = plan.model_copy(update={"method": "lora", "lora": plan.lora.with_rank(rank)})
    torch.manual_seed(0)
    plain = lora.attach(load(find(bases[kind]), plain_plan)[0], plain_plan)
    lora.load(plain, adapter)
    assert not torch.allclose(logits(model), logits(attached(plan)), atol=1e-2)
    assert torch.allclose(logits(model), logits(plain), atol=1e-4)


@pytest.mark.parametrize("rank", [2, 6])
def test_what_is_loaded_is_held_as_its_svd_and_comes_out_again(bases, rank):
    plan = plan_of(bases["llama"])
    modules = shape(find(bases["llama"]), plan).modules
    adapter, model = drawn(modules, rank), attached(plan)
    adalora.load(model, drawn(modules, 6, seed=1))  # what was there before must be gone
    adalora.load(model, adapter)
    for module, layer in lora.layers(model).items():
        p, e, q = (half.detach().double().numpy() for half in adalora._triplet(layer))
        s = np.linalg.svd(adapter.factors[module].product(), compute_uv=False)[:rank]
        unit = 16 / (6 + 1e-5)
        assert np.allclose(unit * e[:rank, 0], s, rtol=1e-5)
        assert not e[rank:].any()
        assert np.abs(p[:, :rank].T @ p[:, :rank] - np.eye(rank)).max() <= 1e-5
        assert np.abs(q[:rank] @ q[:rank].T - np.eye(rank)).max() <= 1e-5
    made = adalora.extract(model)
    for module, pair in made.factors.items():
        assert pair.r == rank
        assert np.abs(pair.product() - adapter.factors[module].product()).max() <= 1e-5


def test_directions_that_were_switched_off_leave_no_module_with_fewer_than_were_sent(bases):
    """A server counts a change from the directions that it sent; what is missing would count as untouched (client/round)."""
    settings = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 6}
    plan = plan_of(bases["llama"], r=2, training=settings)
    start = drawn(shape(find(bases["llama"]), plan).modules, 3)
    trained = fit(plan, find(bases["llama"]), ROWS, start=start).adapter
    assert set(trained.ranks().values()) == {3}
    on = [int(np.count_nonzero(np.abs(pair.A).max(1))) for pair in trained.factors.values()]
    assert sum(on) == 2 * len(on)


def test_a_fresh_start_freezes_all_that_was_sent(bases):
    plan = plan_of(bases["llama"])
    adapter = drawn(shape(find(bases["llama"]), plan).modules, 4)
    fresh, whole = attached(plan), attached(plan)
    adalora.load(fresh, adapter, fresh=True)
    adalora.load(whole, adapter)
    assert torch.allclose(logits(fresh), logits(whole), atol=1e-4)
    assert not any(pair.A.any() for pair in adalora.extract(fresh).factors.values())


# Refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}, {"use_rslora": True}])
def test_settings_that_it_decides_itself_are_refused(setting):
    with pytest.raises(ConfigurationError, match=rf"lora\.{next(iter(setting))}: adalora shares the ranks out itself"):
        parse({"method": "adalora", "lora": setting}, Plan, source="test")


def test_a_rank_that_no_update_may_have_is_refused():
    with pytest.raises(ConfigurationError, match=r"lora\.r 800: adalora begins with rank 1200, more than 1024"):
        parse({"method": "adalora", "lora": {"r": 800}}, Plan, source="test")


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "rolora", "hetlora"])
def test_rules_that_merge_a_and_b_apart_are_refused(rule):
    content = {"plan": {"method": "adalora"}, "aggregation": {"rule": rule}}
    with pytest.raises(ConfigurationError, match=rf"{rule} merges A and B apart.*take rule product-delta"):
        parse(content, Federation, source="test")


def test_embeddings_are_refused(bases):
    with pytest.raises(ModelError, match=r"lora\.target_modules: Target module Embedding.* is not supported"):
        attached(plan_of(bases["llama"], target_modules=["embed_tokens", "q_proj"]))


def test_an_adapter_of_another_base_is_refused(bases):
    model = attached(plan_of(bases["gpt2"]))
    with pytest.raises(AdapterError, match=r"found shape \(32, 96\), expected \(96, 32\)"):
        adalora.load(model, Adapter({"transformer.h.0.attn.c_attn": Factors(np.zeros((2, 96)), np.zeros((32, 2)))}))
    with pytest.raises(AdapterError, match=r"1 modules are not in this model"):
        adalora.load(model, Adapter({"model.layers.0.mlp": Factors(np.zeros((2, 96)), np.zeros((32, 2)))}))
