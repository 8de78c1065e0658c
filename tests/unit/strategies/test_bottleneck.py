"""Bottlenecks: where they are placed in many architectures, that they begin as nothing, and what they compute."""

import json

import numpy as np
import pytest
import torch
from small_bases import LAYERS, WIDTH, logits, saved

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import Plan
from strategies.base_model import find, load
from strategies.data.formats import Conversation
from strategies.methods import bottleneck
from strategies.methods.layers import ends, stack
from strategies.methods.registry import METHODS, shape
from strategies.training import fit

ROWS = [Conversation(({"role": "user", "content": f"Which room has number {n}?"},), f"Room {n}.") for n in range(16)]
ENDS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "bert": ("bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.output.dense"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, folder / kind) for kind in ENDS}


def plan_of(name, precision="fp32", **settings):
    task = {"objective": "classification", "data": {"labels": ["a", "b"]}} if name.endswith("bert") else {}
    section = {"reduction_factor": 4, **settings}
    return Plan.model_validate(
        {"base_model": name, "method": "bottleneck", "bottleneck": section, "precision": precision, **task}
    )


def attached(plan, seed=0):
    torch.manual_seed(seed)
    return bottleneck.attach(load(find(plan.base_model), plan)[0], plan)


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    return Adapter(
        {}, {name: 0.3 * rng.standard_normal(tuple(p.shape)).astype(np.float32) for name, p in bottleneck.dense(model).items()}
    )


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("kind", ENDS)
def test_networks_stand_where_the_paper_places_them_with_the_shapes_it_gives_them(bases, kind, placement):
    found = shape(find(bases[kind]), plan_of(bases[kind], placement=placement))
    places = ENDS[kind] if placement == "houlsby" else ENDS[kind][1:]
    parts = {"down.weight": (8, WIDTH), "down.bias": (8,), "up.weight": (WIDTH, 8), "up.bias": (WIDTH,)}
    wanted = {
        f"{place.format(number)}.bottleneck.{part}": size
        for place in places
        for number in range(LAYERS)
        for part, size in parts.items()
    }
    head = {"classifier.weight": (2, WIDTH), "classifier.bias": (2,)} if kind == "bert" else {}
    assert found.dense == wanted | head
    assert found.head == head.keys()
    model = attached(plan_of(bases[kind], placement=placement))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == found.dense.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("kind", ENDS)
def test_attaching_changes_nothing_and_what_trains_is_float32(bases, kind, precision):
    plan = plan_of(bases[kind], precision)
    model = attached(plan)
    torch.manual_seed(0)
    plain = load(find(bases[kind]), plan)[0]
    assert {str(tensor.dtype) for tensor in bottleneck.dense(model).values()} == {"torch.float32"}
    # A head in float32, and with k-bit preparation norms too, round less than in the base's 16 bits.
    assert torch.allclose(logits(model), logits(plain), atol=0.02 if precision == "bf16" and kind == "bert" else 0)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kind", ENDS)
def test_a_network_computes_the_papers_formula_at_its_place(bases, kind, activation):
    """The oracle adds ``up(f(down(h)))`` by hooks of its own to the plain base, with functions written out."""
    plan = plan_of(bases[kind], activation=activation)
    model = attached(plan)
    adapter = drawn(model)
    METHODS["bottleneck"].load(model, adapter)
    function = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "silu": lambda x: x / (1 + torch.exp(-x)),
    }[activation]
    torch.manual_seed(0)
    plain = load(find(bases[kind]), plan)[0]

    def adding(place):
        part = {name: torch.from_numpy(adapter.dense[f"{place}.bottleneck.{name}"]) for name in ("down.weight", "up.weight")}
        bias = {name: torch.from_numpy(adapter.dense[f"{place}.bottleneck.{name}"]) for name in ("down.bias", "up.bias")}

        def add(module, inputs, h):
            inside = function(h @ part["down.weight"].T + bias["down.bias"])
            return h + inside @ part["up.weight"].T + bias["up.bias"]

        return add

    for place in ENDS[kind]:
        for number in range(LAYERS):
            plain.get_submodule(place.format(number)).register_forward_hook(adding(place.format(number)))
    with torch.no_grad():
        for name in adapter.dense.keys() & {"classifier.weight", "classifier.bias"}:
            plain.get_parameter(name).copy_(torch.from_numpy(adapter.dense[name]))
    assert not torch.allclose(logits(model), logits(attached(plan)), atol=1e-2)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert METHODS["bottleneck"].extract(model).digest() == adapter.digest()


def test_nodes_begin_alike_whatever_their_base_has_drawn_before(bases):
    """Networks are averaged from the first round on, when nobody is sent a start: an fp32 node and an nf4 one must agree."""
    made = [
        METHODS["bottleneck"].extract(attached(plan_of(bases["bert"], precision))).dense
        for precision in ("fp32", "nf4", "bf16")
    ]
    names = [name for name in made[0] if "bottleneck" in name]
    assert all(np.array_equal(made[0][name], other[name]) for other in made[1:] for name in names)
    other = METHODS["bottleneck"].extract(attached(plan_of(bases["bert"]), seed=1)).dense
    assert not np.array_equal(made[0][names[0]], other[names[0]])
    down = np.concatenate([made[0][name].ravel() for name in names if name.endswith("down.weight")])
    assert 0.018 < down.std() < 0.022
    assert not any(made[0][name].any() for name in names if not name.endswith("down.weight"))


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_training_moves_every_network(bases, precision):
    plan = plan_of(bases["llama"], precision)
    plan = plan.model_copy(
        update={"training": plan.training.model_copy(update={"learning_rate": 1e-2, "batch_size": 8, "max_steps": 4})}
    )
    trained = fit(plan, find(bases["llama"]), ROWS)
    before = METHODS["bottleneck"].extract(attached(plan)).dense
    assert all(not np.array_equal(tensor, before[name]) for name, tensor in trained.adapter.dense.items())


@pytest.mark.parametrize("precision", ["int8"])
def test_checkpoints_hold_what_trains_and_the_best_one_comes_back(bases, precision, tmp_path):
    """Held-out answers contradict the rows, so the best checkpoint is the first; the frozen base is in none of them."""
    contradicting = [Conversation(row.prompt, "Nowhere at all, ask the porter.") for row in ROWS]
    training = {"learning_rate": 2e-2, "batch_size": 8, "max_steps": 6, "eval_steps": 2, "early_stopping_patience": 2}
    plan = Plan.model_validate(plan_of(bases["llama"], precision).model_dump() | {"training": training})
    trained = fit(plan, find(bases["llama"]), ROWS, contradicting, folder=tmp_path)
    files = {path.parent.name: torch.load(path)["parameters"] for path in tmp_path.glob("checkpoint-*/trained.pt")}
    assert all(tensors.keys() == trained.adapter.dense.keys() for tensors in files.values())
    best = json.loads((max(tmp_path.glob("checkpoint-*")) / "trainer_state.json").read_text())["best_model_checkpoint"]
    for name, tensor in files[best.rpartition("/")[2]].items():
        assert np.array_equal(trained.adapter.dense[name], tensor.numpy())


# Other architectures -------------------------------------------------------------------------------------------------------


def others():
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        BloomConfig,
        DistilBertConfig,
        FalconConfig,
        Gemma2Config,
        GPTNeoXConfig,
        OPTConfig,
        PhiConfig,
        Qwen3Config,
        RobertaConfig,
    )

    few = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    gated = few | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    opt = few | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 1}
    distil = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
    decoder, encoder = AutoModelForCausalLM, AutoModel
    return {
        "qwen3": (decoder, Qwen3Config(**gated), "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        "gemma2": (decoder, Gemma2Config(**gated), "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"),
        "phi": (decoder, PhiConfig(**few, intermediate_size=24), "model.layers.1.self_attn.dense", "model.layers.1.mlp.fc2"),
        "opt": (decoder, OPTConfig(**opt), "model.decoder.layers.1.self_attn.out_proj", "model.decoder.layers.1.fc2"),
        "neox": (
            decoder,
            GPTNeoXConfig(**few, intermediate_size=24),
            "gpt_neox.layers.1.attention.dense",
            "gpt_neox.layers.1.mlp.dense_4h_to_h",
        ),
        "bloom": (
            decoder,
            BloomConfig(**few),
            "transformer.h.1.self_attention.dense",
            "transformer.h.1.mlp.dense_4h_to_h",
        ),
        "falcon": (
            decoder,
            FalconConfig(**few),
            "transformer.h.1.self_attention.dense",
            "transformer.h.1.mlp.dense_4h_to_h",
        ),
        "roberta": (
            encoder,
            RobertaConfig(**few, intermediate_size=24, pad_token_id=1),
            "encoder.layer.1.attention.output.dense",
            "encoder.layer.1.output.dense",
        ),
        "distilbert": (
            encoder,
            DistilBertConfig(**distil),
            "transformer.layer.1.attention.out_lin",
            "transformer.layer.1.ffn.lin2",
        ),
    }


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi", "opt", "neox", "bloom", "falcon", "roberta", "distilbert"])
def test_layers_are_found_by_structure(kind):
    auto, config, attention, mlp = others()[kind]
    with torch.device("meta"):
        model = auto.from_config(config)
    layers = stack(model)
    assert len(layers) == 2
    assert ends(model, layers[1]) == (attention, mlp)


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "t5"])
def test_a_base_that_is_built_otherwise_is_refused(kind):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MambaConfig, MixtralConfig, T5Config

    few = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    experts = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_local_experts": 2}
    auto, config = {
        "mixtral": (AutoModelForCausalLM, MixtralConfig(**few, **experts)),
        "mamba": (AutoModelForCausalLM, MambaConfig(**few, state_size=4)),
        "t5": (AutoModelForSeq2SeqLM, T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=2)),
    }[kind]
    with torch.device("meta"):
        model = auto.from_config(config)
    with pytest.raises(ModelError, match=r"expected 1; use method lora|is not one attention and one MLP"):
        bottleneck.attach(model, Plan(method="bottleneck"))


def test_an_adapter_of_another_base_is_refused(bases):
    model = attached(plan_of(bases["gpt2"]))
    name = "transformer.h.0.mlp.c_proj.bottleneck.down.bias"
    with pytest.raises(AdapterError, match=r"found shape \(4,\), expected \(8,\)"):
        METHODS["bottleneck"].load(model, Adapter({}, {name: np.zeros(4, np.float32)}))
    with pytest.raises(AdapterError, match=r"1 modules are not in this model"):
        METHODS["bottleneck"].load(model, Adapter({"transformer.wte": Factors(np.zeros((2, 3)), np.zeros((3, 2)))}))
