"""Every kind of layer, scaling and pattern is one product in our convention: the oracle is PEFT's own weight change.

``get_delta_weight`` has the shape of the base's weight: ``(d_out, d_in)`` of a Linear, ``(d_in, d_out)`` of a Conv1D and of an
embedding, whose input is a token's number.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.adapter import Adapter, Factors
from protocol.errors import ModelError
from protocol.plan import Plan
from strategies.methods import lora
from strategies.methods.registry import shape

LABELS = ["a", "b", "c"]
VOCABULARY = 40


def gpt2():
    """Conv1D layers of unequal width (attention 16 to 48, MLP 16 to 64 and back) and two embeddings.

    Untied: PEFT trains and answers with a changed embedding alone, but its merge would change a tied output layer too.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False)).eval()


def llama(dtype="float32"):
    """Linear layers of unequal width, an embedding and a norm, untied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    return made.to(getattr(torch, dtype))


def plan_of(**content):
    return Plan.model_validate({"lora": {"r": 4, "lora_alpha": 6, **content}})


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.arange(3, 23)[None]).logits


def filled(model, seed=0):
    """The model with random numbers in every trainable parameter, and what is in it now."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 8)
    return lora.extract(model)


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


KINDS = {
    "linear": (llama, {"target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "every conv1d": (gpt2, {"target_modules": "all-linear"}),
    "embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"]}),
    "embedding and linear": (llama, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
}
SHAPES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"c_attn": 2, "q_proj": 2, r"h\.1\.mlp\.c_fc": 1, "wte": 3, "embed_tokens": 3}},
    "alphas": {"alpha_pattern": {"c_attn": 20, "q_proj": 20, "wte": 9}},
    "both, rslora": {
        "rank_pattern": {"c_attn": 2, "q_proj|v_proj": 1},
        "alpha_pattern": {"c_attn": 20, "q_proj|v_proj": 3},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("base", "targets"), KINDS.values(), ids=KINDS.keys())
def test_the_product_of_what_comes_out_is_pefts_change_of_the_weight(base, targets, shape):
    model = lora.attach(base(), plan_of(**targets, **shape))
    adapter, layers = filled(model), peft_layers(model)
    assert adapter.factors.keys() == layers.keys()
    for name, layer in layers.items():
        change = layer.get_delta_weight("default").detach().double().numpy()
        held_transposed = type(layer.get_base_layer()).__name__ in ("Conv1D", "Embedding")
        product = adapter.factors[name].product()
        # float32 on PEFT's side
        assert np.abs((product.T if held_transposed else product) - change).max() <= 1e-6 * max(np.abs(change).max(), 1)


@pytest.mark.parametrize("rank", [2, 4, 9], ids=["lower", "equal", "higher, partly frozen"])
@pytest.mark.parametrize(("base", "targets"), KINDS.values(), ids=KINDS.keys())
def test_what_is_loaded_answers_as_the_base_with_pefts_merged_weights(base, targets, rank):
    """A model merged by PEFT itself, at the adapter's own rank and without frozen directions, is the oracle."""
    merged = lora.attach(base(), plan_of(**{**targets, "r": rank}))
    adapter = filled(merged)
    model = lora.attach(base(), plan_of(**targets, rank_pattern={"c_attn": 1, "embed_tokens": 3, "wte": 2}))
    lora.load(model, adapter)
    assert not np.allclose(logits(base()), logits(model), atol=1e-2), "an adapter that changes nothing proves nothing"
    assert np.allclose(logits(model), logits(merged.merge_and_unload()), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_loaded_comes_out_again_to_the_bit_of_the_products(shape):
    model = lora.attach(gpt2(), plan_of(target_modules=["wte", "c_attn", "c_fc"], **shape))
    adapter = filled(model)
    lora.load(model, adapter)
    again = lora.extract(model)
    assert again.digest() == adapter.digest()


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 6),
    rslora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(["q_proj", "k_proj", r".*\.1\.mlp\.down_proj"]), st.integers(1, 4)),
    alphas=st.booleans(),
    alphas_alone=st.dictionaries(st.sampled_from(["q_proj", "v_proj"]), st.floats(0.5, 40)),
)
def test_another_rank_keeps_the_length_of_every_modules_steps(rank, rslora, ranks, alphas, alphas_alone):
    """Steps are as long as ``scaling * sqrt(r)``: read from PEFT's layers before and after, whatever pattern decided them."""
    import torch

    alpha_pattern = dict(zip(ranks, (3.0, 17.0, 0.7), strict=False)) if alphas and ranks else {} if ranks else alphas_alone
    before = plan_of(
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        use_rslora=rslora,
        rank_pattern=ranks,
        alpha_pattern=alpha_pattern,
    )
    after = before.model_copy(update={"lora": before.lora.with_rank(rank)})
    Plan.model_validate(after.model_dump())
    with torch.device("meta"):
        old, new = (peft_layers(lora.attach(llama(), plan)) for plan in (before, after))
    for name, layer in old.items():
        steps = [one.scaling["default"] * one.r["default"] ** 0.5 for one in (layer, new[name])]
        assert steps[1] == pytest.approx(steps[0], rel=1e-12)
        own = next((r for key, r in ranks.items() if name.endswith(key.removeprefix(r".*\.").replace("\\", ""))), None)
        assert new[name].r["default"] == (rank if own is None else min(own, rank))


# Modules that train whole ---------------------------------------------------------------------------------------------


def test_a_module_to_save_is_a_dense_tensor_that_goes_in_and_comes_out():
    plan = plan_of(target_modules=["q_proj"], modules_to_save=["embed_tokens", "model.norm"])
    model = lora.attach(llama(), plan)
    made = filled(model)
    assert {name: tensor.shape for name, tensor in made.dense.items()} == {
        "model.embed_tokens.weight": (VOCABULARY, 16),
        "model.norm.weight": (16,),
    }
    other = lora.attach(llama(), plan)
    lora.load(other, made)
    assert lora.extract(other).digest() == made.digest()
    assert np.allclose(logits(other), logits(model.merge_and_unload()), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_that_train_whole_are_held_in_fp32_and_get_gradients(dtype):
    import torch

    model = lora.attach(
        llama(dtype), plan_of(target_modules=["q_proj"], modules_to_save=["embed_tokens", "model.norm"])
    ).train()
    ids = torch.arange(3, 23)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    kept = lora.dense(model)
    assert {str(tensor.dtype) for tensor in kept.values()} == {"torch.float32"}
    assert all(float(tensor.grad.abs().max()) > 0 for tensor in kept.values())


def test_what_trains_whole_gets_no_factors_beside():
    model = lora.attach(llama(), plan_of(target_modules="all-linear", modules_to_save=["layers.1.mlp"]))
    made = lora.extract(model)
    assert {name for name in made.factors if "mlp" in name} == {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert made.dense.keys() == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}


def test_a_module_to_save_that_the_base_lacks_is_refused_with_those_that_it_has():
    with pytest.raises(ModelError, match=r"modules_to_save.*wte.*embed_tokens"):
        lora.attach(llama(), plan_of(modules_to_save=["wte"]))


# Classifiers with more than one new part --------------------------------------------------------------------------------


def classifier(kind, folder):
    """A base without any head on disk: what a hub holds of DistilBERT and DeBERTa, with the tokenizer of the tiny model."""
    import torch
    from transformers import AutoModel, AutoTokenizer, DebertaV2Config, DistilBertConfig

    from strategies.base_model import find

    torch.manual_seed(0)
    shape = {"vocab_size": len(AutoTokenizer.from_pretrained(find("tiny").folder))}
    if kind == "distilbert":
        config = DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, **shape)
    else:
        config = DebertaV2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, pooler_hidden_size=16, **shape
        )
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(find("tiny").folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "dense"),
    [
        ("distilbert", {"pre_classifier.weight": (16, 16), "pre_classifier.bias": (16,)}),
        ("deberta", {"pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)}),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_every_new_part_of_a_classifier_trains_whole_and_is_sent(kind, dense, precision, tmp_path):
    from strategies.base_model import find, load

    name = classifier(kind, tmp_path / kind)
    plan = Plan.model_validate(
        {
            "base_model": name,
            "objective": "classification",
            "precision": precision,
            "method": "qlora" if precision == "nf4" else "lora",
            "lora": {"r": 2},
            "data": {"labels": LABELS},
        }
    )
    model = lora.attach(load(find(name), plan)[0], plan)
    made = lora.extract(model)
    wanted = dense | {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert {tensor: value.shape for tensor, value in made.dense.items()} == wanted
    assert not any(module.startswith(("pre_classifier", "pooler", "classifier")) for module in made.factors)
    found = shape(find(name), plan)
    assert found.modules == {module: pair.shape for module, pair in made.factors.items()}
    assert found.dense == wanted


def test_a_part_of_the_head_is_no_module_to_save(tmp_path):
    from strategies.base_model import find

    name = classifier("distilbert", tmp_path / "base")
    content = {"base_model": name, "objective": "classification", "data": {"labels": LABELS}}
    plan = Plan.model_validate(content | {"lora": {"modules_to_save": ["classifier"]}})
    with pytest.raises(ModelError, match=r"classifier is of the head, which trains whole anyway"):
        shape(find(name), plan)


def test_an_embedding_of_another_shape_is_refused():
    from protocol.errors import AdapterError

    model = lora.attach(gpt2(), plan_of(target_modules=["wte"]))
    turned = Factors(np.zeros((2, 16), np.float32), np.zeros((VOCABULARY, 2), np.float32))
    with pytest.raises(AdapterError, match=rf"found .*\({VOCABULARY}, 16\).* expected .*\(16, {VOCABULARY}\)"):
        lora.load(model, Adapter({"transformer.wte": turned}))
