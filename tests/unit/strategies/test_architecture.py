"""Architectures read from configurations. Oracle: transformers' own models, built without weights, and PEFT's own count."""

import json

import pytest

from protocol.errors import ModelError
from strategies.architecture import read

# What makes each type small, and different widths different, so that no two terms can stand for each other.
LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
SIZES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "granite": LLAMA,
    "smollm3": LLAMA | {"pad_token_id": 0},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 16},
    "gemma": LLAMA | {"head_dim": 16},
    "gemma2": LLAMA | {"head_dim": 16},
    "gemma3_text": LLAMA | {"head_dim": 16},
    "mixtral": LLAMA | {"num_local_experts": 4},
    "qwen2_moe": LLAMA
    | {"num_experts": 4, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56, "mlp_only_layers": [1]},
    "qwen3_moe": LLAMA
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16, "decoder_sparse_step": 2},
    "phi3": LLAMA | {"pad_token_id": 0},
    "glm": LLAMA | {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    "glm4": LLAMA | {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    "phi": LLAMA | {"num_key_value_heads": 6},
    "gpt_neox": {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 97, "n_positions": 33},
    "gpt_bigcode": {"n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 97, "n_positions": 33, "n_inner": 112},
    "opt": {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "vocab_size": 97,
    },
    "bert": {**LLAMA, "max_position_embeddings": 33},
    "roberta": {**LLAMA, "max_position_embeddings": 33},
    "xlm-roberta": {**LLAMA, "max_position_embeddings": 33},
    "camembert": {**LLAMA, "max_position_embeddings": 33},
    "distilbert": {"dim": 48, "hidden_dim": 112, "n_layers": 3, "n_heads": 6, "vocab_size": 97, "max_position_embeddings": 33},
    "t5": {"d_model": 48, "d_ff": 112, "d_kv": 10, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 6, "vocab_size": 97},
    "mt5": {"d_model": 48, "d_ff": 112, "d_kv": 10, "num_layers": 3, "num_heads": 6, "vocab_size": 97},
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")


def built(model_type):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    config = AutoConfig.for_model(model_type, **SIZES[model_type])
    kind = AutoModelForCausalLM
    if model_type in ENCODERS:
        kind = AutoModelForSequenceClassification
    elif model_type in ("t5", "mt5"):
        kind = AutoModelForSeq2SeqLM
    with torch.device("meta"):
        return kind.from_config(config), config


@pytest.mark.parametrize("model_type", SIZES)
def test_parameters_and_linear_layers_are_those_of_transformers(model_type):
    import torch
    from transformers.pytorch_utils import Conv1D

    model, config = built(model_type)
    architecture = read(config.to_dict())
    labels = config.num_labels * (architecture.hidden + 1) if model_type in ENCODERS else 0
    assert architecture.parameters + labels == sum(p.numel() for p in model.parameters())
    linears = sorted(
        (name.rpartition(".")[2], tuple(sorted(module.weight.shape)))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and ("layer" in name or ".h." in name or "block" in name)
    )
    known = sorted(
        (x.name, tuple(sorted((x.d_in, x.d_out)))) for block, x in architecture.each_linear() for _ in range(block.count)
    )
    assert known == linears


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("bert", ["query", "dense"]),
        ("gpt2", ["attn.c_attn", "c_proj"]),
        ("t5", ["q", "v"]),
        ("phi3", ["qkv_proj"]),
    ],
)
def test_targets_match_as_peft_matches_them(model_type, targets):
    from peft import LoraConfig, get_peft_model

    model, config = built(model_type)
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=targets, exclude_modules=["classifier", "pooler.dense"]))
    counted = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name and "pooler" not in name)
    found = sum(block.count * 3 * (x.d_in + x.d_out) for block, x in read(config.to_dict()).targets(targets))
    assert found == counted


def test_a_target_that_is_no_linear_layer_or_not_clear_is_refused():
    with pytest.raises(ModelError, match="no linear layer q_projection in llama; it has down_proj"):
        read({"model_type": "llama", **LLAMA}).targets(["q_projection"])
    with pytest.raises(ModelError, match="give the last part alone"):
        read({"model_type": "gpt2", **SIZES["gpt2"]}).targets(["mlp.c_proj"])


def test_chatglm_is_read_from_its_own_keys():
    # config.json of THUDM/chatglm2-6b; its model card gives 6,243,584,000 parameters.
    config = {
        "model_type": "chatglm",
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "ffn_hidden_size": 13696,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "padded_vocab_size": 65024,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "post_layer_norm": True,
        "seq_length": 32768,
    }
    assert read(config).parameters == 6_243_584_000
    del config["ffn_hidden_size"]
    with pytest.raises(ModelError, match="not a whole chatglm configuration"):
        read(config)


def test_an_unknown_architecture_is_said_with_what_is_known_of_it():
    with pytest.raises(ModelError) as error:
        read({"model_type": "mamba", "hidden_size": 768})
    assert "no memory estimate for model_type 'mamba'" in str(error.value)
    assert "hidden_size=768" in str(error.value)
    assert "llama" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "found a list"),
        ("{}", "model_type ''"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "not a whole llama"),
        ('{"model_type": "llama", "intermediate_size": "wide"}', "not a whole llama"),
        ('{"model_type": "llama", "intermediate_size": -3}', "not a whole llama"),
        ('{"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}', "not a whole llama"),
        ('{"model_type": "chatglm", "hidden_size": 4096}', "not a whole chatglm"),
    ],
)
def test_broken_configurations_are_refused(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=message):
        read(str(file))


def test_a_folder_a_file_a_package_and_the_embedded_model_are_found(tmp_path, encoder):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    assert read(str(tmp_path)) == read(str(tmp_path / "config.json")) == read({"model_type": "llama", **LLAMA})
    assert read(encoder).parameters == 22_713_216
    assert read("tiny").kind == "decoder"
    with pytest.raises(ModelError, match="not readable"):
        read(str(tmp_path / "none.json"))
    with pytest.raises(ModelError, match="could not be fetched"):
        read("nobody/nothing-of-the-kind")
