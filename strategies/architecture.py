"""What a model's configuration says of its size: dimensions, the linear layers of each block, parameters by part.

Nothing is downloaded but ``config.json``. Common dimensions are read through optimum's normalised configurations, which know
what each model type calls them; which linear layers a block has, their biases, norms and ties stand in one reader for each
family below, and the parameter counts are held against transformers' own models by the tests. A model type without a reader
is refused by name: memory that was guessed is worse than none.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from protocol.errors import ModelError, shown
from strategies.base_model import EMBEDDED, find

Kind = Literal["decoder", "encoder", "encoder-decoder"]
Norm = Literal["rms", "layer"]
Activation = Literal["fused", "composed", "relu"]
Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block.

    Attributes:
        name: Last part of the module's name, which LoRA targets name.
        d_in: Width of its input.
        d_out: Width of its output.
        reads: Which tensor it reads; layers that read the same one share what autograd keeps.
        bias: Has a bias of ``d_out``.
    """

    name: str
    d_in: int
    d_out: int
    reads: Literal["states", "attended", "encoded", "normed", "inner"]
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of the weight matrix."""
        return self.d_in * self.d_out

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return self.weights + self.d_out * self.bias


@dataclass(frozen=True)
class Block:
    """Transformer layers of one form.

    Attributes:
        count: How many there are.
        linears: Linear layers of each, experts excepted.
        norm_parameters: Elements of the norms of each.
        intermediate: Width inside the dense MLP; 0 without one.
        expert_intermediate: Width inside one expert; 0 without experts.
        other_parameters: Of each layer: routers.
        attends: Attentions in each layer: 2 in a decoder that also reads an encoder.
    """

    count: int
    linears: tuple[Linear, ...]
    norm_parameters: int
    intermediate: int
    expert_intermediate: int = 0
    other_parameters: int = 0
    attends: int = 1


@dataclass(frozen=True)
class Architecture:
    """A model as its configuration describes it. Widths are in elements.

    Attributes:
        model_type: As transformers calls it.
        kind: Decoder, encoder, or both.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of one head.
        vocab: Rows of the token embedding.
        tied: The output head is the token embedding.
        gated: The MLP multiplies two projections.
        norm: RMS norms are composed of single operations in float32 by transformers; layer norms are one kernel.
        norms: Norms over the residual's width in each layer.
        qk_norm: Queries and keys are normalised too.
        activation: ``fused``: one kernel; ``composed``: of single operations in Python; ``relu`` keeps its output only.
        dropout: After attention and MLP while the base trains, as configured.
        attention_dropout: Of attention's probabilities.
        joint_qkv: One layer projects queries, keys and values.
        softcaps: Attention's scores are capped.
        upcasts: Eager attention takes its softmax in float32.
        experts: Experts of a sparse layer; 0 for a dense model.
        experts_per_token: Experts that each token visits.
        blocks: The layers.
        embedding_parameters: Every embedding table, the norm after it included.
        final_parameters: Norms after the last layer, and an encoder's pooler.
        head_parameters: Output head of a language model; 0 where it is tied.
        context: Longest sequence that was trained for; 0 where it is not said.
    """

    model_type: str
    kind: Kind
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool
    norm: Norm
    norms: int
    blocks: tuple[Block, ...]
    embedding_parameters: int
    final_parameters: int
    head_parameters: int
    qk_norm: bool = False
    activation: Activation = "fused"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    joint_qkv: bool = False
    softcaps: bool = False
    upcasts: bool = True
    experts: int = 0
    experts_per_token: int = 0
    context: int = 0

    @property
    def layers(self) -> int:
        """Layers of all stacks."""
        return sum(block.count for block in self.blocks)

    @property
    def intermediate(self) -> int:
        """Width inside the widest dense MLP, or one expert."""
        return max(max(block.intermediate, block.expert_intermediate) for block in self.blocks)

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part: ``embeddings``, ``linears`` (with biases), ``experts``, ``norms`` (with routers), ``head``."""
        return {
            "embeddings": self.embedding_parameters,
            "linears": sum(block.count * linear.parameters for block, linear in self.each_linear()),
            "experts": sum(block.count * self.expert_weights(block) for block in self.blocks),
            "norms": self.final_parameters
            + sum(block.count * (block.norm_parameters + block.other_parameters) for block in self.blocks),
            "head": self.head_parameters,
        }

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(self.parts.values())

    def each_linear(self) -> Iterable[tuple[Block, Linear]]:
        """Every linear layer with the block that it repeats in."""
        return ((block, linear) for block in self.blocks for linear in block.linears)

    def expert_weights(self, block: Block) -> int:
        """Elements of one layer's experts, which transformers holds as two packed parameters."""
        return self.experts * block.expert_intermediate * self.hidden * (3 if self.gated else 2)

    def targets(self, names: Literal["all-linear"] | Iterable[str]) -> tuple[tuple[Block, Linear], ...]:
        """The linear layers that LoRA targets name, as PEFT matches them: by the end of a module's path.

        Raises:
            ModelError: A name matches none of them, or is a path that ends in a name which several have.
        """
        every = tuple(self.each_linear())
        if names == "all-linear":
            return every
        wanted = [name.rpartition(".")[2] for name in names]
        known = {linear.name for _, linear in every}
        shapes = Counter(linear.name for linear in {linear for _, linear in every})
        if unclear := [shown(name, 100) for name in names if "." in name and shapes[name.rpartition(".")[2]] > 1]:
            raise ModelError(
                f"{', '.join(unclear)}: several linear layers of {self.model_type} end so; give the last part alone"
            )
        if missing := sorted(shown(name, 100) for name in set(wanted) - known):
            raise ModelError(f"no linear layer {', '.join(missing)} in {self.model_type}; it has {', '.join(sorted(known))}")
        return tuple((block, linear) for block, linear in every if linear.name in wanted)


def read(source: Source) -> Architecture:
    """Reads an architecture from a hub name, a folder, an installed package, a ``config.json`` or its content.

    Raises:
        ModelError: There is no configuration, it lacks what its model type needs, or the model type has no reader.
    """
    needed: Collection[str] = ()
    if isinstance(source, Mapping):
        content, where = dict(source), "the configuration"
    else:
        (content, where), needed = _content(str(source)), _WRITTEN
    model_type = str(content.get("model_type", ""))
    reader = _READERS.get(model_type)
    if reader is None:
        said = ", ".join(f"{key}={content[key]!r}" for key in _TELLING if key in content) or "nothing that is known"
        raise ModelError(
            f"{where}: no memory estimate for model_type {model_type[:100]!r} (it says {shown(said)}); "
            f"known are {', '.join(sorted(_READERS))}"
        )
    if wrong := _wrong_sizes(content, model_type, needed):
        raise ModelError(f"{where}: not a whole {model_type} configuration: {'; '.join(wrong)}")
    try:
        made = reader(content if model_type == "chatglm" else _configured(content))
        _check(made)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a hostile value makes its code do
        why = shown(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ModelError(f"{where}: not a whole {model_type} configuration ({why})") from None
    return made


# Far beyond any model: what is computed of them stays a number, in a time that nobody notices.
_SIZES = {"hidden_size": 2**20, "num_hidden_layers": 2**14, "num_attention_heads": 2**14, "vocab_size": 2**28}
_SIZES |= {"intermediate_size": 2**22, "num_key_value_heads": 2**14, "head_dim": 2**14}
_SIZES_OF_CHATGLM = {"hidden_size": 2**20, "num_layers": 2**14, "num_attention_heads": 2**14, "padded_vocab_size": 2**28}
_SIZES_OF_CHATGLM |= {"ffn_hidden_size": 2**22, "kv_channels": 2**14}
_MOST_PARAMETERS = 2**60
# Every config.json has them; for what is missing transformers takes the family's usual size, which may be any other model's.
_WRITTEN = ("hidden_size", "num_hidden_layers")


def _wrong_sizes(content: Mapping[str, Any], model_type: str, needed: Collection[str]) -> list[str]:
    """All that is wrong with the sizes, at once: transformers and the readers stop at the first."""
    if model_type == "chatglm":
        called, sizes, needed = dict[str, str](), _SIZES_OF_CHATGLM, _SIZES_OF_CHATGLM
    else:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        called, sizes = CONFIG_MAPPING[model_type].attribute_map, _SIZES
    wrong = []
    for name, most in sizes.items():
        key = name if name in content else called.get(name, name)
        found = content.get(key)
        if found is None and name not in needed:
            continue
        if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
            said = "is missing" if key not in content else f"is {shown(repr(found), 40)}"
            wrong.append(f"{key} {said}, expected a whole number from 1 to {most}")
    return wrong


def _check(made: Architecture) -> None:
    """No width or count is wrong in kind, sign or size, wherever a reader took it from."""
    numbers = [
        made.hidden,
        made.heads,
        made.kv_heads,
        made.head_dim,
        made.vocab,
        made.layers,
        made.intermediate,
        *made.parts.values(),
    ]
    numbers += [width for _, linear in made.each_linear() for width in (linear.d_in, linear.d_out)]
    if bad := [number for number in numbers if isinstance(number, bool) or not isinstance(number, int) or number < 0]:
        raise ValueError(f"found {bad[0]!r} where a whole number was expected")
    if min(made.intermediate, made.heads, made.kv_heads, *(block.count for block in made.blocks)) < 1:
        raise ValueError("no layers, no heads or no MLP")
    if made.parameters > _MOST_PARAMETERS or max(numbers) > _MOST_PARAMETERS:
        raise ValueError(f"{made.parameters:.3g} parameters; expected at most {_MOST_PARAMETERS:.3g}")
    if made.heads % made.kv_heads:
        raise ValueError(f"{made.kv_heads} key and value heads do not divide {made.heads} query heads")
    if made.experts and not 1 <= made.experts_per_token <= made.experts:
        raise ValueError(f"{made.experts_per_token} of {made.experts} experts for each token; expected 1 to {made.experts}")
    if isinstance(made.context, bool) or not isinstance(made.context, int) or made.context < 0:
        raise ValueError(f"a context of {made.context!r}; expected a whole number of tokens")
    if not all(0 <= share < 1 for share in (made.dropout, made.attention_dropout)):
        raise ValueError(f"dropouts of {made.dropout} and {made.attention_dropout}; expected 0 to below 1")


_MOST_BYTES = 16 * 2**20
_TELLING = ("architectures", "hidden_size", "num_hidden_layers", "vocab_size")


def _content(name: str) -> tuple[dict[str, Any], str]:
    path = Path(name)
    try:
        path = path.expanduser()
        if path.is_dir():
            path = path / "config.json"
        elif path.suffix != ".json":
            path = _named(name)
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:  # no such file; no such home; a name that no file can have
        why = getattr(error, "strerror", None) or error
        raise ModelError(
            f"{shown(str(path), 200)}: not readable ({why}); give a folder with config.json, or that file"
        ) from None
    if len(raw) > _MOST_BYTES:
        raise ModelError(f"{path}: over {_MOST_BYTES // 2**20} MiB; expected a model's config.json")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: not JSON; expected a model's config.json") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: found a {type(content).__name__}, expected a model's config.json")
    return content, str(path)


def _named(name: str) -> Path:
    module = name.replace("-", "_")
    if name == EMBEDDED or (module.isidentifier() and importlib.util.find_spec(module)):
        return find(name).folder / "config.json"
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            get_hf_file_metadata(hf_hub_url(name, "config.json"))  # fails at once, where the download tries for half a minute
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # noqa: BLE001 - the hub's client raises whatever its HTTP library does
        raise ModelError(
            f"{name!r} is no folder, no config.json and no installed package, and its configuration could not be fetched from "
            f"the hub ({type(error).__name__}); give one of these, or {EMBEDDED!r}"
        ) from None


def _configured(content: Mapping[str, Any]) -> Any:
    """The transformers configuration: it knows the defaults that a ``config.json`` leaves out."""
    from transformers import AutoConfig

    rest = {key: value for key, value in content.items() if key not in ("model_type", "quantization_config")}
    return AutoConfig.for_model(content["model_type"], **rest)


def _common(config: Any) -> dict[str, Any]:
    """Dimensions by optimum's names where it knows the model type, else by the usual ones; checked to be possible."""
    from optimum.utils.normalized_config import (  # type: ignore[import-untyped]
        NormalizedConfigManager,
        NormalizedTextConfig,
    )

    try:
        kind = NormalizedConfigManager.get_normalized_config_class(config.model_type)
    except KeyError:
        kind = NormalizedTextConfig
    normal = kind(config)
    hidden, heads = normal.hidden_size, normal.num_attention_heads
    found = {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or hidden // heads,
        "vocab": normal.vocab_size,
        "layers": normal.num_layers,
    }
    if bad := [f"{key} is {value!r}" for key, value in found.items() if not isinstance(value, int) or value < 1]:
        raise ValueError(f"{', '.join(bad)}; expected whole numbers of at least 1")
    return found | {"model_type": config.model_type, "context": getattr(config, "max_position_embeddings", 0) or 0}


def _assembled(d: dict[str, Any], *, tied: bool, head_bias: bool = False, **rest: Any) -> Architecture:
    head = 0 if tied else d["vocab"] * d["hidden"]
    known = {key: value for key, value in d.items() if key != "layers"}
    values = {"kind": "decoder", "head_parameters": head + d["vocab"] * head_bias, "norm": "rms", "norms": 2} | known | rest
    return Architecture(tied=tied, **values)


def _attention(
    d: dict[str, Any], *, qkv_bias: bool = False, out_bias: bool = False, names: str = "q_proj k_proj v_proj o_proj"
) -> tuple[Linear, ...]:
    q, kv, h = d["heads"] * d["head_dim"], d["kv_heads"] * d["head_dim"], d["hidden"]
    query, key, value, out = names.split()
    inputs = [Linear(name, h, width, "states", qkv_bias) for name, width in ((query, q), (key, kv), (value, kv))]
    return (*inputs, Linear(out, q, h, "attended", out_bias))


def _gated(h: int, inner: int, *, bias: bool = False, names: str = "gate_proj up_proj down_proj") -> tuple[Linear, ...]:
    gate, up, down = names.split()
    return (
        Linear(gate, h, inner, "normed", bias),
        Linear(up, h, inner, "normed", bias),
        Linear(down, inner, h, "inner", bias),
    )


def _plain(h: int, inner: int, *, names: str, bias: bool = True) -> tuple[Linear, ...]:
    up, down = names.split()
    return (Linear(up, h, inner, "normed", bias), Linear(down, inner, h, "inner", bias))


def _llama(config: Any) -> Architecture:
    """Llama and what differs from it by a switch: Mistral, Granite, SmolLM3, Qwen2 and 3, Gemma 1 to 3, and their experts."""
    d = _common(config)
    model_type = config.model_type
    every_bias = bool(getattr(config, "attention_bias", False))
    qkv_bias = bool(getattr(config, "qkv_bias", True)) if model_type in ("qwen2", "qwen2_moe") else every_bias
    qk_norm = model_type in ("qwen3", "qwen3_moe", "gemma3_text")
    norms = 4 if model_type in ("gemma2", "gemma3_text") else 2
    h, norm_parameters = d["hidden"], norms * d["hidden"] + qk_norm * 2 * d["head_dim"]
    attention = _attention(d, qkv_bias=qkv_bias, out_bias=every_bias)
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    experts, sparse = _sparse_layers(config, d["layers"])
    blocks = []
    if dense := d["layers"] - sparse:
        linears = attention + _gated(h, config.intermediate_size, bias=mlp_bias)
        blocks.append(Block(dense, linears, norm_parameters, config.intermediate_size))
    if sparse:
        shared = getattr(config, "shared_expert_intermediate_size", 0) if model_type == "qwen2_moe" else 0
        linears = attention + ((*_gated(h, shared), Linear("shared_expert_gate", h, 1, "normed")) if shared else ())
        inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
        blocks.append(Block(sparse, linears, norm_parameters, shared, inner, experts * h))
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=True,
        norms=norms,
        qk_norm=qk_norm,
        experts=experts,
        experts_per_token=config.num_experts_per_tok if experts else 0,
        blocks=tuple(blocks),
        embedding_parameters=d["vocab"] * h,
        final_parameters=h,
        attention_dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
        softcaps=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def _sparse_layers(config: Any, layers: int) -> tuple[int, int]:
    """Experts, and how many layers have them."""
    if config.model_type not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return 0, 0
    experts = config.num_local_experts if config.model_type == "mixtral" else config.num_experts
    every = 1 if config.model_type == "mixtral" else config.decoder_sparse_step
    if experts < 1 or every < 1:
        raise ValueError(f"{experts} experts, decoder_sparse_step {every}; expected at least 1 of both")
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    return experts, sum(layer not in dense and (layer + 1) % every == 0 for layer in range(layers))


def _phi3(config: Any) -> Architecture:
    """Phi-3 and 4, and GLM: queries, keys and values in one layer or three, gate and up projection in one."""
    d = _common(config)
    h, inner, q, kv = d["hidden"], config.intermediate_size, d["heads"] * d["head_dim"], d["kv_heads"] * d["head_dim"]
    if config.model_type == "phi3":
        attention: tuple[Linear, ...] = (Linear("qkv_proj", h, q + 2 * kv, "states"), Linear("o_proj", q, h, "attended"))
    else:
        attention = _attention(d, qkv_bias=bool(config.attention_bias))
    linears = (*attention, Linear("gate_up_proj", h, 2 * inner, "normed"), Linear("down_proj", inner, h, "inner"))
    norms = 4 if config.model_type == "glm4" else 2
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=True,
        norms=norms,
        blocks=(Block(d["layers"], linears, norms * h, inner),),
        embedding_parameters=d["vocab"] * h,
        final_parameters=h,
        dropout=float(getattr(config, "resid_pdrop", 0.0) or 0.0),
        attention_dropout=float(getattr(config, "attention_dropout", 0.0) or 0.0),
        joint_qkv=config.model_type == "phi3",
    )


def _chatglm(content: Mapping[str, Any]) -> Architecture:
    """ChatGLM 2 and 3, GLM-4-9B in its first form: code of their own on the hub, so only the file's own keys are read."""
    h, heads, width = content["hidden_size"], content["num_attention_heads"], content["kv_channels"]
    groups = content["multi_query_group_num"] if content.get("multi_query_attention") else heads
    layers, inner, vocab = content["num_layers"], content["ffn_hidden_size"], content["padded_vocab_size"]
    bias, every = bool(content.get("add_qkv_bias")), bool(content.get("add_bias_linear"))
    linears = (
        Linear("query_key_value", h, (heads + 2 * groups) * width, "states", bias or every),
        Linear("dense", heads * width, h, "attended", every),
        Linear("dense_h_to_4h", h, 2 * inner, "normed", every),
        Linear("dense_4h_to_h", inner, h, "inner", every),
    )
    d = {"model_type": "chatglm", "hidden": h, "heads": heads, "kv_heads": groups, "head_dim": width, "vocab": vocab}
    return _assembled(
        d | {"context": content.get("seq_length", 0)},
        tied=bool(content.get("tie_word_embeddings", False)),
        gated=True,
        joint_qkv=True,
        blocks=(Block(layers, linears, 2 * h, inner),),
        embedding_parameters=vocab * h,
        final_parameters=h if content.get("post_layer_norm", True) else 0,
    )


def _gpt2(config: Any) -> Architecture:
    """GPT-2 and GPT-BigCode: one projection for queries, keys and values, learnt positions."""
    d = _common(config)
    h = d["hidden"]
    inner = config.n_inner or 4 * h
    single = config.model_type == "gpt_bigcode" and config.multi_query
    d["kv_heads"] = 1 if single else d["heads"]
    linears = (
        Linear("c_attn", h, h + 2 * d["kv_heads"] * d["head_dim"], "states", True),
        Linear("c_proj", h, h, "attended", True),
        *_plain(h, inner, names="c_fc c_proj"),
    )
    composed = config.activation_function in ("gelu_new", "gelu_fast", "gelu_python")
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=False,
        norm="layer",
        activation="composed" if composed else "fused",
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        joint_qkv=True,
        upcasts=False,
        blocks=(Block(d["layers"], linears, 4 * h, inner),),
        embedding_parameters=(d["vocab"] + config.n_positions) * h,
        final_parameters=2 * h,
    )


def _gpt_neox(config: Any) -> Architecture:
    """GPT-NeoX and Pythia."""
    d = _common(config)
    h, inner = d["hidden"], config.intermediate_size
    bias = bool(config.attention_bias)
    linears = (
        Linear("query_key_value", h, 3 * h, "states", bias),
        Linear("dense", h, h, "attended", bias),
        *_plain(h, inner, names="dense_h_to_4h dense_4h_to_h"),
    )
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=False,
        norm="layer",
        dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        joint_qkv=True,
        blocks=(Block(d["layers"], linears, 4 * h, inner),),
        embedding_parameters=d["vocab"] * h,
        final_parameters=2 * h,
    )


def _phi(config: Any) -> Architecture:
    """Phi-1.5 and 2: attention and MLP side by side behind one norm."""
    d = _common(config)
    h, inner = d["hidden"], config.intermediate_size
    attention = _attention(d, qkv_bias=True, out_bias=True, names="q_proj k_proj v_proj dense")
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=False,
        norm="layer",
        norms=1,
        head_bias=True,
        activation="composed" if config.hidden_act == "gelu_new" else "fused",
        dropout=config.resid_pdrop,
        attention_dropout=config.attention_dropout,
        blocks=(Block(d["layers"], attention + _plain(h, inner, names="fc1 fc2"), 2 * h, inner),),
        embedding_parameters=d["vocab"] * h,
        final_parameters=2 * h,
    )


def _opt(config: Any) -> Architecture:
    """OPT."""
    d = _common(config)
    h, inner = d["hidden"], config.ffn_dim
    if config.word_embed_proj_dim != h:
        raise ValueError(
            f"word_embed_proj_dim {config.word_embed_proj_dim} differs from hidden_size {h}, which is not read yet"
        )
    attention = _attention(d, qkv_bias=True, out_bias=True, names="q_proj k_proj v_proj out_proj")
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        gated=False,
        norm="layer",
        activation="relu",
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        upcasts=False,
        blocks=(Block(d["layers"], attention + _plain(h, inner, names="fc1 fc2"), 4 * h, inner),),
        embedding_parameters=(d["vocab"] + config.max_position_embeddings + 2) * h,
        final_parameters=2 * h,
    )


def _bert(config: Any) -> Architecture:
    """BERT, RoBERTa, XLM-R and CamemBERT; what stands over the layers for classification (a pooler, a dense layer) counts."""
    d = _common(config)
    d["kv_heads"] = d["heads"]
    h, inner = d["hidden"], config.intermediate_size
    attention = _attention(d, qkv_bias=True, out_bias=True, names="query key value dense")
    return _assembled(
        d,
        tied=True,
        kind="encoder",
        gated=False,
        norm="layer",
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        upcasts=False,
        blocks=(Block(d["layers"], attention + _plain(h, inner, names="dense dense"), 4 * h, inner),),
        embedding_parameters=(d["vocab"] + config.max_position_embeddings + config.type_vocab_size + 2) * h,
        final_parameters=h * h + h,
    )


def _distilbert(config: Any) -> Architecture:
    """DistilBERT, whose classifier has a dense layer before it."""
    d = _common(config)
    h, inner = d["hidden"], config.hidden_dim
    attention = _attention(d, qkv_bias=True, out_bias=True, names="q_lin k_lin v_lin out_lin")
    return _assembled(
        d,
        tied=True,
        kind="encoder",
        gated=False,
        norm="layer",
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        upcasts=False,
        blocks=(Block(d["layers"], attention + _plain(h, inner, names="lin1 lin2"), 4 * h, inner),),
        embedding_parameters=(d["vocab"] + config.max_position_embeddings + 2) * h,
        final_parameters=h * h + h,
    )


def _t5(config: Any) -> Architecture:
    """T5, mT5 and Flan-T5: an encoder, and a decoder that reads it; a table of relative positions in each."""
    d = _common(config)
    d["head_dim"] = config.d_kv
    h, inner = d["hidden"], config.d_ff
    attention = _attention(d, names="q k v o")
    width = d["heads"] * d["head_dim"]
    cross = (
        Linear("q", h, width, "states"),
        Linear("k", h, width, "encoded"),
        Linear("v", h, width, "encoded"),
        Linear("o", width, h, "attended"),
    )
    gated = bool(config.is_gated_act)
    mlp = _gated(h, inner, names="wi_0 wi_1 wo") if gated else _plain(h, inner, names="wi wo", bias=False)
    return _assembled(
        d,
        tied=config.tie_word_embeddings,
        kind="encoder-decoder",
        gated=gated,
        norms=2,
        activation="relu" if config.dense_act_fn == "relu" else "composed" if config.dense_act_fn == "gelu_new" else "fused",
        dropout=config.dropout_rate,
        attention_dropout=config.dropout_rate,
        blocks=(
            Block(config.num_layers, attention + mlp, 2 * h, inner),
            Block(config.num_decoder_layers, attention + cross + mlp, 3 * h, inner, attends=2),
        ),
        embedding_parameters=d["vocab"] * h + 2 * config.relative_attention_num_buckets * d["heads"],
        final_parameters=2 * h,
    )


_READERS: Mapping[str, Callable[[Any], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "granite", "smollm3", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), _llama),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _llama),
    **dict.fromkeys(("phi3", "glm", "glm4"), _phi3),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _gpt2),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _bert),
    **dict.fromkeys(("t5", "mt5"), _t5),
    "chatglm": _chatglm,
    "distilbert": _distilbert,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "phi": _phi,
}
