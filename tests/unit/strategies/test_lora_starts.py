"""Where factors begin: parts of the base that are no change, frozen directions, one factor alone."""

import json

import numpy as np
import pytest

from protocol.adapter import Adapter, Factors
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import lora
from strategies.methods.registry import shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]


def plan_of(start="default", precision="fp32", **more):
    return Plan.model_validate(
        {
            "base_model": "tiny",
            "precision": precision,
            "method": "qlora" if precision in ("nf4", "int8") else "lora",
            "lora": {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": start, **more},
            "training": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 3},
        }
    )


def begun(plan):
    """A model whose factors have begun as the plan says, what they began with, and its plain base."""
    import torch

    base = find(plan.base_model)
    torch.manual_seed(0)
    model = lora.attach(load(base, plan)[0], plan)
    return model, lora.begin(model, plan, base), load(base, plan)[0]


def weights(model):
    return {name: module.weight for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))}


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def leading(weight, rank):
    u, s, vt = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# Starts that are a part of the base ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "near"), [("pissa", 1 + 1e-6), ("pissa_niter_16", 1.01)])
def test_pissa_begins_with_the_leading_directions_of_the_base_and_changes_nothing(start, near):
    """What is left is no more than the singular values beyond the rank (Eckart and Young); a randomised SVD comes near."""
    model, taken, base = begun(plan_of(start))
    assert taken.keys() == weights(base).keys()
    for name, weight in weights(base).items():
        whole = weight.detach().double().numpy()
        s = np.linalg.svd(whole, compute_uv=False)
        assert np.linalg.norm(whole - taken[name].product()) <= near * np.sqrt((s[3:] ** 2).sum())
        held = model.get_submodule(f"base_model.model.{name}").get_base_layer().weight
        assert (held == weight).all(), "the base itself must stay as published"
    assert np.allclose(logits(model), logits(base), atol=1e-4)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_pissa_on_a_quantised_base_begins_with_what_is_held_and_changes_nothing(precision):
    model, taken, base = begun(plan_of("pissa", precision))
    assert taken
    # bitsandbytes rounds the inputs of an int8 layer: equal inputs give equal outputs, and these differ by fp32 rounding.
    assert np.allclose(logits(model), logits(base), atol=1e-3 if precision == "nf4" else 0.05)


@pytest.mark.parametrize("start", ["pissa", "loftq"])
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_start_that_was_not_trained_is_no_change(start, precision):
    model, taken, _ = begun(plan_of(start, precision))
    for module, pair in lora.extract(model, taken).factors.items():
        scale = np.abs(taken[module].product()).max() if taken else 1.0
        assert np.abs(pair.product()).max() <= 1e-6 * scale
        assert pair.r == (6 if taken else 3)


def test_loftq_makes_up_for_the_leading_directions_of_what_quantisation_lost():
    """Oracle: the residual is that of the best approximation of ``W - Q``, whose singular values come from numpy."""
    plan = plan_of("loftq", "nf4")
    model, taken, _ = begun(plan)
    whole = weights(load(find("tiny"), plan_of())[0])
    for name, weight in whole.items():
        held = lora._weight(model.get_submodule(f"base_model.model.{name}"))
        lost = (weight - held).detach().double().numpy()
        s = np.linalg.svd(lost, compute_uv=False)
        left = np.linalg.norm(lost - taken[name].product())
        assert left == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-4)
        assert left < 0.999 * np.linalg.norm(lost)


def test_loftq_with_as_many_directions_as_the_weights_have_is_the_full_base_again():
    def away(start):
        return float((logits(begun(plan_of(start, "nf4", r=128, target_modules="all-linear"))[0]) - full).norm())

    full = logits(load(find("tiny"), plan_of())[0])
    assert away("loftq") < 1e-4 * away("default")


def test_loftq_leaves_a_layer_alone_that_is_not_quantised():
    """The output layer is held in full: both factors zero would never learn."""
    model, taken, _ = begun(plan_of("loftq", "nf4", target_modules=["q_proj", "lm_head"]))
    assert "lm_head" not in taken
    assert lora.extract(model, taken).factors["lm_head"].A.any()


def test_loftq_on_a_full_base_is_the_ordinary_start():
    model, taken, _ = begun(plan_of("loftq"))
    assert not taken
    assert all(not pair.B.any() for pair in lora.extract(model).factors.values())


@pytest.mark.parametrize("kind", ["conv1d", "embedding", "narrow"])
def test_pissa_knows_every_kind_of_layer(kind):
    """GPT-2's layers hold their weights transposed; embeddings begin as always; a layer may be narrower than the rank."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    targets = {"conv1d": ["c_attn", "c_fc"], "embedding": ["wte", "c_attn"], "narrow": ["c_proj"]}[kind]
    plan = plan_of("pissa", r=12 if kind == "narrow" else 3, target_modules=targets)
    plain = GPT2LMHeadModel(config).eval()
    wanted = logits(plain)
    model = lora.attach(plain, plan)
    taken = lora.begin(model, plan, find("tiny"))
    assert {name.rpartition(".")[2] for name in taken} == {target for target in targets if target != "wte"}
    for name, pair in taken.items():
        weight = model.get_submodule(f"base_model.model.{name}").get_base_layer().weight
        assert np.abs(pair.product() - leading(weight.T, pair.r)).max() <= 1e-6
    assert np.allclose(logits(model), wanted, atol=1e-5)


def test_a_gaussian_start_is_pefts():
    import torch
    from peft import LoraConfig, get_peft_model

    plan = plan_of("gaussian")
    ours, taken, plain = begun(plan)
    torch.manual_seed(0)
    peft = get_peft_model(
        plain,
        LoraConfig(
            r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM"
        ),
    )
    assert not taken
    found = {name: p for name, p in peft.named_parameters() if "lora_A" in name}
    assert all((p == found[name]).all() for name, p in ours.named_parameters() if "lora_A" in name)


# What trains -----------------------------------------------------------------------------------------------------------


def drawn(plan, rank, seed=0):
    rng = np.random.default_rng(seed)
    modules = shape(find("tiny"), plan).modules
    return Adapter(
        {
            name: Factors(
                A=rng.standard_normal((rank, d_in)).astype(np.float32) / 8,
                B=rng.standard_normal((d_out, rank)).astype(np.float32) / 8,
            )
            for name, (d_out, d_in) in modules.items()
        }
    )


@pytest.mark.parametrize(("trains", "still", "precision"), [("A", "B", "fp32"), ("B", "A", "nf4")])
def test_the_factor_that_does_not_train_comes_back_to_the_bit(trains, still, precision):
    plan = plan_of(precision=precision, lora_alpha=3)  # scaling 1: B comes back in the units it was sent in
    start = drawn(plan, 3)
    trained = fit(plan, find("tiny"), ROWS, start=start, trains=trains).adapter
    for module, pair in trained.factors.items():
        assert np.array_equal(getattr(pair, still), getattr(start.factors[module], still))
        assert not np.array_equal(getattr(pair, trains), getattr(start.factors[module], trains))


def test_a_fresh_pair_trains_beside_all_of_a_frozen_adapter():
    """Oracle: plain PEFT on a base into which the adapter was merged, with the same draws."""
    import torch

    plan, base = plan_of(), find("tiny")
    start = drawn(plan, 5)
    fresh = fit(plan, base, ROWS, start=start, fresh=True).adapter
    assert all(pair.r == 3 for pair in fresh.factors.values())
    whole = lora.attach(load(base, plan)[0], plan_of(r=5))
    lora.load(whole, start)
    merged = whole.merge_and_unload()
    plain, again = lora.attach(merged, plan), lora.attach(load(base, plan)[0], plan)
    lora.load(plain, fresh)
    lora.load(again, start, fresh=True)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(plain.get_parameter(name))
    assert np.allclose(logits(again), logits(plain), atol=1e-4)
    assert max(float(np.abs(pair.product()).max()) for pair in fresh.factors.values()) > 1e-5


def test_modules_to_save_train_whole_and_move():
    plan, base = plan_of(modules_to_save=["embed_tokens"]), find("tiny")
    trained = fit(plan, base, ROWS).adapter
    (name,) = trained.dense
    before = load(base, plan)[0].get_parameter(name).detach().numpy()
    assert 0 < np.abs(trained.dense[name] - before).max() < 0.1


def test_a_plan_of_shapes_and_starts_survives_json():
    plan = plan_of("pissa", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, use_rslora=True, modules_to_save=["norm"])
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan
