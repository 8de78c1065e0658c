"""BitFit: the biases of three builds by lists that are written out here; nothing else moves; what goes in comes out."""

import numpy as np
import pytest
import torch
from small_bases import LAYERS, logits, saved

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import bitfit
from strategies.methods.registry import METHODS, shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
HEAD = {"classifier.weight": (2, 32), "classifier.bias": (2,)}


def gpt2():
    inside = {"ln_1": 32, "attn.c_attn": 96, "attn.c_proj": 32, "ln_2": 32, "mlp.c_fc": 128, "mlp.c_proj": 32}
    layers = {f"transformer.h.{n}.{name}.bias": (width,) for n in range(LAYERS) for name, width in inside.items()}
    return layers | {"transformer.ln_f.bias": (32,)}


def bert():
    attention = dict.fromkeys(["self.query", "self.key", "self.value", "output.dense", "output.LayerNorm"], 32)
    inside = {f"attention.{name}": width for name, width in attention.items()}
    inside |= {"intermediate.dense": 48, "output.dense": 32, "output.LayerNorm": 32}
    layers = {f"bert.encoder.layer.{n}.{name}.bias": (width,) for n in range(LAYERS) for name, width in inside.items()}
    return layers | {"bert.embeddings.LayerNorm.bias": (32,), "bert.pooler.dense.bias": (32,)} | HEAD


def llama():
    """Added ones: of every linear layer but the output layer."""
    inside = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16, "self_attn.o_proj": 32}
    inside |= {"mlp.gate_proj": 48, "mlp.up_proj": 48, "mlp.down_proj": 32}
    return {f"model.layers.{n}.{name}.bias": (width,) for n in range(LAYERS) for name, width in inside.items()}


BIASES = {"gpt2": gpt2(), "bert": bert(), "llama": llama()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in BIASES}


def plan_of(name, **more):
    task = {"objective": "classification", "data": {"labels": ["a", "b"]}} if name.endswith("bert") else {}
    return Plan.model_validate(
        {"base_model": name, "method": "bitfit", "bitfit": {"add_missing": name.endswith("llama")}, **task, **more}
    )


def attached(plan):
    torch.manual_seed(0)
    return bitfit.attach(load(find(plan.base_model), plan)[0], plan)


def plain(plan):
    torch.manual_seed(0)
    return load(find(plan.base_model), plan)[0]


@pytest.mark.parametrize("kind", BIASES)
def test_biases_and_head_train_and_travel_and_nothing_else(bases, kind):
    plan = plan_of(bases[kind])
    found = shape(find(bases[kind]), plan)
    assert found.dense == BIASES[kind]
    assert found.head == (HEAD.keys() if kind == "bert" else set())
    assert not found.modules
    model = attached(plan)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == BIASES[kind].keys()
    assert METHODS["bitfit"].extract(model).dense.keys() == BIASES[kind].keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", BIASES)
def test_attaching_changes_nothing_and_what_trains_is_float32(bases, kind, precision):
    plan = plan_of(bases[kind], precision=precision)
    model = attached(plan)
    assert {str(tensor.dtype) for tensor in bitfit.dense(model).values()} == {"torch.float32"}
    held = load(find(plan.base_model), plan)[0]
    assert {p.dtype for n, p in model.named_parameters() if "bias" not in n and "classifier" not in n} <= {held.dtype}
    if kind != "bert" or precision == "fp32":  # a head in float32 rounds its logits less than one in 16 bits
        assert torch.equal(logits(model), logits(plain(plan)))
    else:
        assert torch.allclose(logits(model), logits(plain(plan)), atol=0.02)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_what_is_loaded_predicts_as_the_base_with_these_biases(bases, kind):
    plan = plan_of(bases[kind])
    rng = np.random.default_rng(0)
    adapter = Adapter({}, {name: rng.standard_normal(size).astype(np.float32) for name, size in BIASES[kind].items()})
    model, by_hand = attached(plan), plain(plan)
    METHODS["bitfit"].load(model, adapter)
    with torch.no_grad():
        for name, tensor in adapter.dense.items():
            by_hand.get_parameter(name).copy_(torch.from_numpy(tensor))
    assert torch.equal(logits(model), logits(by_hand))
    assert METHODS["bitfit"].extract(model).digest() == adapter.digest()


def test_added_biases_are_added_to_what_their_layer_computes(bases):
    plan = plan_of(bases["llama"])
    model, by_hand = attached(plan), plain(plan)
    name = "model.layers.1.mlp.up_proj"
    bias = np.random.default_rng(0).standard_normal(48).astype(np.float32)
    METHODS["bitfit"].load(model, Adapter({}, {f"{name}.bias": bias}))
    by_hand.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + torch.from_numpy(bias))
    assert torch.allclose(logits(model), logits(by_hand), atol=1e-5)  # a sum in another order


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_moves_the_biases_and_leaves_the_base_to_the_bit(bases, precision):
    training = {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 3}
    plan = plan_of(bases["llama"], precision=precision, training=training)
    trained = fit(plan, find(bases["llama"]), ROWS)
    assert all(np.abs(tensor).max() > 1e-3 for tensor in trained.adapter.dense.values())
    assert trained.metrics["trainable-parameters"] == sum(width for (width,) in BIASES["llama"].values())


def test_steps_below_what_a_16_bit_bias_can_tell_are_not_lost(bases):
    """Ten steps of 1e-4 on biases near 0.1, whose neighbours in bfloat16 are 2**-11 = 5e-4 away: each would round away."""
    training = {"learning_rate": 1e-4, "batch_size": 8, "max_steps": 10, "lr_scheduler_type": "constant"}
    plan = plan_of(bases["gpt2"], precision="bf16", training=training)
    before = METHODS["bitfit"].extract(attached(plan)).dense
    after = fit(plan, find(bases["gpt2"]), ROWS).adapter.dense
    away = np.concatenate([np.abs(after[name] - before[name]) for name in before])
    assert 2e-4 < np.median(away) < 1.1e-3


def test_a_base_without_biases_is_told_so(bases):
    plan = plan_of(bases["llama"], bitfit={"add_missing": False})
    with pytest.raises(ModelError, match=r"llama: this base has no biases .* write bitfit\.add_missing: true"):
        shape(find(bases["llama"]), plan)


def test_an_adapter_of_another_base_is_refused(bases):
    model = attached(plan_of(bases["gpt2"]))
    with pytest.raises(AdapterError, match=r"model\.layers\.0"):
        METHODS["bitfit"].load(model, Adapter({}, {"model.layers.0.mlp.up_proj.bias": np.zeros(48, np.float32)}))
    with pytest.raises(AdapterError, match=r"found shape \(31,\), expected \(32,\)"):
        METHODS["bitfit"].load(model, Adapter({}, {"transformer.ln_f.bias": np.zeros(31, np.float32)}))
    with pytest.raises(AdapterError, match=r"1 modules are not in this model"):
        METHODS["bitfit"].load(model, Adapter({"transformer.wte": Factors(np.zeros((2, 3)), np.zeros((3, 2)))}))
