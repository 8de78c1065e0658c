"""A merged model answers as base and adapter do, in plain transformers; what has no place in the weights is refused."""

import json

import numpy as np
import pytest
import torch
from small_bases import saved
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, BaseMismatchError, ModelError
from protocol.files import read_stored, write_adapter
from protocol.manifest import Manifest
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.adapters.merge import merge
from strategies.base_model import find
from strategies.methods.registry import shape

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    home = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, home / kind) for kind in ("llama", "gpt2", "bert")}


def drawn(base, plan, seed=0, r=3):
    """Numbers of a plan's own shapes, around one where it scales."""
    rng = np.random.default_rng(seed)

    def draw(*size):
        return 0.2 * rng.standard_normal(size).astype(np.float32)

    known = shape(base, plan)
    factors = {module: Factors(draw(r, d_in), draw(d_out, r)) for module, (d_out, d_in) in known.modules.items()}
    ones = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "ia3_l", "magnitude_vector")
    dense = {name: np.float32(name.endswith(ones)) + draw(*size) for name, size in known.dense.items()}
    return Adapter(factors, dense), known.embeddings


def stored(folder, name, settings, precision="fp32"):
    plan = Plan.model_validate({"base_model": name, **settings})
    base = find(name)
    adapter, embeddings = drawn(base, plan)
    manifest = Manifest(base_digest=base.digest, kind="adapter", precision=precision, embeddings=embeddings)
    write_adapter(folder, adapter, manifest, plan)
    return base, plan, read_stored(folder, base_digest=base.digest)


def logits(model):
    with torch.inference_mode():
        return model.eval()(input_ids=torch.arange(3, 33).reshape(2, 15)).logits.float()


LORA = {"lora": {"target_modules": "all-linear"}}
MERGED = {
    "lora-llama": ("llama", LORA),
    "lora-gpt2": ("gpt2", LORA),
    "rslora": ("llama", {"lora": {"use_rslora": True, "target_modules": ["q_proj"]}}),
    "dora-llama": ("llama", {"lora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}}),
    "dora-gpt2": ("gpt2", {"lora": {"use_dora": True, "target_modules": ["c_attn"]}}),
    "adalora": ("llama", {"method": "adalora"}),
    "tied embeddings": ("llama", {"lora": {"target_modules": ["embed_tokens", "v_proj"]}}),
    "tied output": ("llama", {"lora": {"target_modules": ["lm_head"]}}),
    "whole embeddings": ("llama", {"lora": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "model.norm"]}}),
    "positions": ("gpt2", {"lora": {"target_modules": ["wpe", "c_proj"]}}),
    "ia3-llama": ("llama", {"method": "ia3"}),
    "ia3-gpt2": ("gpt2", {"method": "ia3"}),
    "bitfit-gpt2": ("gpt2", {"method": "bitfit"}),
    "bitfit, biases added": ("llama", {"method": "bitfit", "bitfit": {"add_missing": True}}),
    "full-llama": ("llama", {"method": "full"}),
    "full-gpt2": ("gpt2", {"method": "full"}),
    "freezing": ("llama", {"method": "freezing", "freezing": {"frozen_share": 0.5}}),
}


@pytest.mark.parametrize("case", MERGED)
def test_a_merged_decoder_has_the_logits_of_base_and_adapter_in_plain_transformers(bases, tmp_path, case):
    kind, settings = MERGED[case]
    base, plan, adapter = stored(tmp_path / "a", bases[kind], settings)
    done = merge(base, adapter, tmp_path / "merged")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    beside = logits(with_adapter(adapter.on(plan), base, adapter.adapter)[0])
    # W x + s B (A x) against (W + s B A) x in float32, over some layers of width 32: logits are of order one.
    assert torch.allclose(logits(model), beside, rtol=1e-4, atol=2e-5)
    bare = logits(AutoModelForCausalLM.from_pretrained(base.folder))
    assert not torch.allclose(bare, beside, atol=1e-3), "an adapter that does nothing proves nothing"
    assert (done.dtype, done.rounding, done.adapter_digest) == ("fp32", 0.0, adapter.adapter.digest())
    assert bool(done.remarks) == (plan.method in ("full", "freezing"))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    again = find(str(tmp_path / "merged"))  # a base like any other
    assert again.digest != base.digest


@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit"])
def test_a_merged_classifier_has_its_head_and_its_labels(bases, tmp_path, method):
    labels = {"objective": "classification", "data": {"labels": ["no", "maybe", "yes"]}}
    base, plan, adapter = stored(tmp_path / "a", bases["bert"], {"method": method, **labels})
    beside = logits(with_adapter(plan, base, adapter.adapter)[0])
    merge(base, adapter, tmp_path / "named", plan=plan)
    merge(base, adapter, tmp_path / "plain")
    for folder, names in (("named", ["no", "maybe", "yes"]), ("plain", ["LABEL_0", "LABEL_1", "LABEL_2"])):
        model, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not loading["missing_keys"]
        assert list(model.config.id2label.values()) == names
        assert torch.allclose(logits(model), beside, rtol=1e-4, atol=2e-5)


def test_a_scorer_is_merged_with_its_one_number(bases, tmp_path):
    base, plan, adapter = stored(tmp_path / "a", bases["llama"], {"objective": "reward"})
    merge(base, adapter, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(model), logits(with_adapter(plan, base, adapter.adapter)[0]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("dtype", "smallest"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_rounding_is_told_relative_to_the_change(bases, tmp_path, dtype, smallest):
    """Oracle: the two tensors on disk, in float64. Rounding a number is at most half a unit in its last place."""
    from safetensors.torch import load_file

    base, _, adapter = stored(tmp_path / "a", bases["llama"], {"lora": {"target_modules": ["q_proj"]}})
    done = merge(base, adapter, tmp_path / "merged", dtype=dtype)
    before, after = (load_file(folder / "model.safetensors") for folder in (base.folder, tmp_path / "merged"))
    error = change = 0.0
    for module, pair in adapter.adapter.factors.items():
        wanted = before[f"{module}.weight"].double().numpy() + pair.product()
        found = after[f"{module}.weight"]
        assert found.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        assert np.abs(found.double().numpy() - wanted).max() <= smallest * np.abs(wanted).max()
        error += float(((found.double().numpy() - wanted) ** 2).sum())
        change += float((pair.product() ** 2).sum())
    # Merged in float32 before it is rounded: 1e-3 of a rounding at most.
    assert done.rounding == pytest.approx((error / change) ** 0.5, rel=1e-2)
    assert done.rounding > 0


def test_without_a_word_the_weights_stay_in_what_the_checkpoint_is_in(tmp_path):
    base, _, adapter = stored(tmp_path / "a", saved("llama", tmp_path / "half", dtype="bfloat16"), LORA)
    assert merge(base, adapter, tmp_path / "merged").dtype == "bf16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_of_a_quantised_base_goes_into_the_published_weights_and_that_is_said(bases, tmp_path):
    """Oracle: base and adapter in float32."""
    base, plan, adapter = stored(tmp_path / "a", bases["llama"], LORA, precision="nf4")
    done = merge(base, adapter, tmp_path / "merged")
    assert "nf4" in done.remarks[0]
    assert "weights as published" in done.remarks[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(model), logits(with_adapter(plan, base, adapter.adapter)[0]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["prompt-tuning", "prefix-tuning", "p-tuning-v2", "bottleneck"])
def test_what_has_no_place_in_the_weights_is_refused_with_the_reason(bases, tmp_path, method):
    base, _, adapter = stored(tmp_path / "a", bases["llama"], {"method": method})
    with pytest.raises(AdapterError, match=rf"{method} cannot be merged: .*(before every text|between the layers)"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_biases_for_which_the_class_has_no_place_are_refused(bases, tmp_path):
    """GPT-2's output layer is all that has no bias: BERT's class has one everywhere, Mistral's nowhere."""
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    settings = {"method": "bitfit", "bitfit": {"add_missing": True}}
    base, _, adapter = stored(tmp_path / "a", str(tmp_path / "mistral"), settings)
    with pytest.raises(ModelError, match="has no place for what the adapter adds"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_there_stays_and_another_base_is_refused(bases, tmp_path):
    base, _, adapter = stored(tmp_path / "a", bases["llama"], LORA)
    (tmp_path / "merged").mkdir()
    with pytest.raises(AdapterError, match="is there already"):
        merge(base, adapter, tmp_path / "merged")
    with pytest.raises(BaseMismatchError):
        read_stored(tmp_path / "a", base_digest=find(bases["gpt2"]).digest)


def test_a_real_decoder_is_merged(data, tmp_path):
    base, plan, adapter = stored(tmp_path / "a", str(data / "models" / "stories260k-hf"), LORA)
    merge(base, adapter, tmp_path / "merged", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    beside = logits(with_adapter(plan, base, adapter.adapter)[0])
    assert torch.allclose(logits(model), beside, rtol=1e-4, atol=1e-4 * float(beside.abs().max()))


def test_a_real_encoder_is_merged(encoder, tmp_path):
    labels = {"objective": "classification", "data": {"labels": ["a", "b"]}}
    base, plan, adapter = stored(tmp_path / "a", encoder, {"lora": {"target_modules": ["query"]}, **labels})
    merge(base, adapter, tmp_path / "merged", dtype="fp32")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(model), logits(with_adapter(plan, base, adapter.adapter)[0]), rtol=1e-4, atol=2e-5)
