"""A base handed to runtimes that people already have: a GGUF file (llama.cpp and its kin), an onnxruntime-genai folder.

onnxruntime-genai comes with a converter, which is called. llama.cpp's stands in its repository and in no package; its file
format does have one (``gguf``: writer, tensor names, quantisers), and for models of the Llama form a file is written with that.
What it cannot hold faithfully is refused. An adapter is merged into a base first (``strategies.adapters.merge``).
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge.full_precision import check_full_precision
from protocol.errors import ConfigurationError, ModelError
from protocol.files import whole_folder
from strategies.base_model import Base, configuration, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

Held = Literal["f32", "f16", "q8_0"]
GenaiPrecision = Literal["fp32", "fp16", "int4"]
_LLAMAS = ("LlamaForCausalLM", "MistralForCausalLM")
_INSTEAD = "convert it with convert_hf_to_gguf.py of the llama.cpp repository"
_CONVERTER_SECONDS = 4 * 3600
_SAID = 400


def to_genai(base: Base, output: Path, precision: GenaiPrecision = "int4") -> Path:
    """A folder for onnxruntime-genai on a CPU, made by its own model builder (extra ``fedge[genai]``).

    Args:
        base: A decoder.
        output: The folder; replaced whole.
        precision: Of the weights.

    Raises:
        ConfigurationError: The extra is not installed, or no such precision.
        ModelError: The builder does not know the architecture, or failed.
    """
    _needs("onnxruntime_genai", "genai")
    _one_of(precision, get_args(GenaiPrecision), "precision")
    check_full_precision(base)
    config = configuration(base)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % 16:  # the builder would write it, and its runtime would fail at the first token
        raise ModelError(f"{base.name!r}: heads of {width} numbers; onnxruntime-genai's attention takes multiples of 16")
    with whole_folder(output, replaces=False) as draft, tempfile.TemporaryDirectory() as cache:
        # Its modules import each other by bare names: it runs as a program, not as a library.
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(base.folder), "-o", str(draft)]
        command += ["-p", precision, "-e", "cpu", "-c", cache]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CONVERTER_SECONDS, cwd=cache)
        if done.returncode or not (draft / "genai_config.json").is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")[-_SAID:]
            raise ModelError(f"{base.name!r}: onnxruntime-genai's model builder ended with {done.returncode}: {last}")
    return output


def to_gguf(base: Base, output: Path, held: Held = "q8_0") -> Path:
    """A GGUF file of a decoder of the Llama form with its tokenizer (extra ``fedge[gguf]``).

    Args:
        base: Llama or Mistral, with a byte-fallback BPE tokenizer (SentencePiece's kind).
        output: The file; replaced whole.
        held: How matrices are held; those that 32 does not divide, and all vectors, are held wider (float16, float32).

    Raises:
        ConfigurationError: The extra is not installed, or no such form.
        ModelError: The file could not hold this model faithfully.
    """
    _needs("gguf", "gguf")
    _one_of(held, get_args(Held), "held")
    check_full_precision(base)
    config = configuration(base)
    words = _words(base, int(config.vocab_size))
    _check_llama(base, config)
    from gguf import GGUFWriter

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        draft = Path(folder) / output.name
        writer = GGUFWriter(draft, "llama")
        _describe(writer, base, config)
        _add_words(writer, base, words)
        for name, array in _tensors(base, config):
            _add(writer, name, array, held)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        shutil.move(draft, output)
    return output


def _needs(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigurationError("hand-over", [f"needs {module}, which is not installed; pip install 'fedge[{extra}]'"])


def _one_of(found: str, known: tuple[str, ...], what: str) -> None:
    if found not in known:
        raise ConfigurationError("hand-over", [f"{what}: found {found!r}, expected one of {', '.join(known)}"])


def _check_llama(base: Base, config: Any) -> None:
    kinds = getattr(config, "architectures", None) or ["a model without architectures"]
    rope = getattr(config, "rope_parameters", None) or {}
    wrong = [f"{kind} is not of the Llama form" for kind in kinds if kind not in _LLAMAS]
    if rope.get("rope_type", "default") != "default":
        wrong.append(f"rotary positions of type {rope['rope_type']!r}")
    wrong += [f"{name} is set" for name in ("attention_bias", "mlp_bias", "sliding_window") if getattr(config, name, None)]
    if getattr(config, "hidden_act", "silu") != "silu":
        wrong.append(f"activation {config.hidden_act!r}")
    if wrong:
        raise ModelError(f"{base.name!r} cannot be written as GGUF here: {'; '.join(wrong)}; {_INSTEAD}")


def _words(base: Base, size: int) -> list[tuple[bytes, float, int]]:
    """Every token with its score and type. llama.cpp joins the pair whose token scores highest: the order of the merges."""
    from gguf import TokenType

    try:
        model = json.loads((base.folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        vocabulary: dict[str, int] = dict(model["vocab"])
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        byte_fallback = bool(model.get("byte_fallback"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        merges, byte_fallback, vocabulary = [], False, {}
    if not byte_fallback:
        raise ModelError(
            f"{base.name!r}: its tokenizer is no byte-fallback BPE, whose rules GGUF names only by kind; {_INSTEAD}"
        )
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    tokenizer = load_tokenizer(base)
    special = set(tokenizer.all_special_ids)
    found = {**vocabulary, **tokenizer.get_added_vocab()}
    words = [(f"<unused {at}>".encode(), 0.0, int(TokenType.UNUSED)) for at in range(size)]
    for word, at in found.items():
        kind = TokenType.CONTROL if at in special else TokenType.NORMAL
        if len(word) == 6 and word.startswith("<0x"):
            kind = TokenType.BYTE
        elif at not in special and word not in vocabulary:
            kind = TokenType.USER_DEFINED
        if at == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        words[at] = word.encode(), -float(ranks.get(word, len(ranks))), int(kind)
    return words


def _describe(writer: "GGUFWriter", base: Base, config: Any) -> None:
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(base.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_words(writer: "GGUFWriter", base: Base, words: list[tuple[bytes, float, int]]) -> None:
    tokenizer = load_tokenizer(base)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([word for word, _, _ in words])
    writer.add_token_scores([score for _, score, _ in words])
    writer.add_token_types([kind for _, _, kind in words])
    for add, at in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if at is not None:
            add(at)
    some = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(some) and some[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tensors(base: Base, config: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor by GGUF's name, as GGUF lays it out."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in sorted(base.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in sorted(opened.keys()):
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise ModelError(f"{base.name!r}: GGUF has no place for its tensor {key}; {_INSTEAD}")
                array: NDArray[np.float32] = opened.get_tensor(key).float().numpy()
                if name.endswith(("attn_q.weight", "attn_k.weight")):
                    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
                    array = _interleaved(array, heads)
                yield name, array


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotary positions pair neighbours in GGUF, and halves of a head in PyTorch: the rows of each head are dealt out anew."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _add(writer: "GGUFWriter", name: str, array: NDArray[np.float32], held: Held) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = {"f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}[held]
    if array.ndim < 2:
        kind = GGMLQuantizationType.F32
    elif held == "q8_0" and array.shape[-1] % 32:
        kind = GGMLQuantizationType.F16
    writer.add_tensor(name, quants.quantize(array, kind), raw_dtype=kind)
