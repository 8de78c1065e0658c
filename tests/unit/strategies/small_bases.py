"""Bases of a few thousand weights on disk, in the builds that most models follow, with the tiny model's tokenizer."""

WIDTH, LAYERS = 32, 4


def saved(kind, folder, dtype="float32", **more):
    """Writes a base of random weights and returns its folder's name."""
    import gc

    import torch
    from transformers import AutoTokenizer

    from strategies.base_model import find

    tokenizer = AutoTokenizer.from_pretrained(find("tiny").folder)
    torch.manual_seed(0)
    made = _BUILT[kind](len(tokenizer), **more)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:  # biases and norms as a checkpoint's: none is exactly zero or one
                parameter += 0.1 * torch.randn_like(parameter)
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gc.freeze()  # a trainer collects garbage before it trains, which takes longer than training if it looks at all libraries
    return str(folder)


def _llama(vocabulary, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, tie_word_embeddings=True, **{**shape, **more})
    )


def _gpt2(vocabulary, **more):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 160}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **{**shape, **more}))


def _bert(vocabulary, **more):
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=vocabulary, **{**shape, **more}))


def _mixtral(vocabulary, **more):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**_sparse(vocabulary), num_local_experts=4, **more))


def _qwen3_moe(vocabulary, **more):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [0]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_sparse(vocabulary), **own, **more))


def _sparse(vocabulary):
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return {**shape, "vocab_size": vocabulary, "num_key_value_heads": 1, "num_experts_per_tok": 2}


_BUILT = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "mixtral": _mixtral, "qwen3-moe": _qwen3_moe}


def logits(model, tokens=40):
    """What a model makes of one row of token ids, in evaluation mode: its last layer's output and its logits."""
    import torch

    with torch.inference_mode():
        made = model.eval()(torch.arange(3, tokens)[None], output_hidden_states=True)
    return torch.cat([made.hidden_states[-1].float().flatten(), made.logits.float().flatten()])
