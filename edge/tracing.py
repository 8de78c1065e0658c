"""A loaded PyTorch model as a graph: which inputs it gets, which of their dimensions are free, and what it puts out."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge import attention
from edge.encoder_output import embedding
from protocol.errors import ModelError, shown

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram
    from transformers import PreTrainedModel

OPSET = 23
# The attribute of the traced wrapper that holds the model: it comes before every name in the graph.
HELD = "held"
_BATCH, _SEQUENCE, _CAPACITY = 2, 3, 5  # of the example; none is 1, which a trace would take for a constant


@dataclass(frozen=True)
class Decoder:
    """A decoder's dimensions, as ``edge.export.DecoderShape``."""

    layers: int
    kv_heads: int
    head_dim: int


def decoder(model: "PreTrainedModel", shape: Decoder) -> "ONNXProgram":
    """Prefill and decode as one graph over a cache that is written in place; nothing is folded or fused in it yet.

    Raises:
        ModelError: The model's attention cannot be said with GroupQueryAttention, or cannot be traced.
    """
    import torch

    attention.register()
    model.set_attn_implementation(attention.NAME)
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output layer; expected a decoder")

    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            setattr(self, HELD, model)

        def forward(
            self, input_ids: Any, position_ids: Any, logits_positions: Any, seqlens_k: Any, total: Any, past: Any
        ) -> tuple[Any, ...]:
            cache = attention.CacheInGraph(past, seqlens_k, total)
            # The head is by far the widest layer: it gets the positions that are asked for, and no others.
            hook = head.register_forward_pre_hook(lambda _, given: (given[0].index_select(1, logits_positions),))
            try:
                with attention.attending(cache):
                    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            finally:
                hook.remove()
            _check_layers(model, cache, shape.layers)
            return (logits, *(tensor for layer in range(shape.layers) for tensor in cache.present[layer]))

    fix_angles(model)
    size = (_BATCH, shape.kv_heads, _CAPACITY, shape.head_dim)
    past = [(torch.zeros(size), torch.zeros(size)) for _ in range(shape.layers)]
    example = (
        torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64),
        torch.arange(_SEQUENCE).expand(_BATCH, _SEQUENCE).contiguous(),
        torch.arange(2),
        torch.full((_BATCH,), _SEQUENCE - 1, dtype=torch.int32),
        torch.tensor(_SEQUENCE, dtype=torch.int32),
        past,
    )
    batch, sequence, capacity, kept = (torch.export.Dim(name) for name in ("batch", "sequence", "capacity", "kept"))
    rows = {0: batch, 1: sequence}
    free = (rows, rows, {0: kept}, {0: batch}, None, [({0: batch, 2: capacity},) * 2 for _ in past])
    names = ["input_ids", "position_ids", "logits_positions", "seqlens_k", "total_sequence_length"]
    return _traced(
        Traced().eval(), example, free, names + _pairs("past", shape.layers), ["logits", *_pairs("present", shape.layers)]
    )


def encoder(model: "PreTrainedModel", pooling: str | None, context_tokens: int) -> "ONNXProgram":
    """Texts of at most so many tokens to logits, or with a pooling to embeddings of length 1; nothing is folded yet.

    Raises:
        ModelError: The model cannot be traced.
    """
    import torch

    inner = model if pooling is None else model.base_model
    # onnxruntime wants angles for every row, and models make one row of them for all if they are left to it.
    rotary = any(name.endswith("rotary_emb") for name, _ in model.named_modules())

    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            setattr(self, HELD, model)

        def forward(self, input_ids: Any, attention_mask: Any, *token_type_ids: Any) -> Any:
            more = {"token_type_ids": token_type_ids[0]} if token_type_ids else {}
            if rotary:
                more["position_ids"] = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
            told = inner(input_ids=input_ids, attention_mask=attention_mask, **more)
            return told.logits if pooling is None else embedding(told.last_hidden_state, attention_mask, pooling)

    ids = torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)
    mask = ids.clone()
    mask[0, -1] = 0  # some models leave out a mask that hides nothing
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if takes_token_types(model) else [])]
    example = (ids, mask, torch.zeros_like(ids))[: len(names)]
    # Tables of positions end somewhere, and a trace heeds that.
    rows = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=context_tokens)}
    free = (rows, rows, (rows,)) if len(names) > 2 else (rows, rows)
    return _traced(Traced().eval(), example, free, names, ["logits" if pooling is None else "embedding"])


def takes_token_types(model: "PreTrainedModel") -> bool:
    """Whether a model tells first and second text apart."""
    return (getattr(model.config, "type_vocab_size", 0) or 0) > 1


def _check_layers(model: Any, cache: attention.CacheInGraph, layers: int) -> None:
    if missing := sorted(set(range(layers)) - cache.present.keys()):
        raise ModelError(
            f"{type(model).__name__}: {len(missing)} of {layers} layers (the first is {missing[0]}) do not attend through "
            "transformers' attention interface, so that their cache cannot be written in place"
        )


def fix_angles(model: Any) -> None:
    """Dynamic scaling of rotary angles begins beyond the positions that a base was made for, where no bundle goes."""
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"


def _pairs(which: str, layers: int) -> list[str]:
    return [f"{which}.{layer}.{half}" for layer in range(layers) for half in ("key", "value")]


def _traced(module: Any, example: tuple[Any, ...], free: Any, inputs: Sequence[str], outputs: Sequence[str]) -> "ONNXProgram":
    import torch

    kind = type(getattr(module, HELD)).__name__
    try:
        with quiet(), torch.no_grad():
            # Not through torch.onnx.export alone: it would try three more ways after an error, and hide ours.
            program = torch.export.export(module, example, dynamic_shapes=free, strict=False)
            made: ONNXProgram = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=free,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except ModelError:
        raise
    except Exception as error:  # whatever a model's code or the exporter itself raises
        raise ModelError(f"{kind} cannot be exported: {reason(error)}") from error
    return made


def reason(error: BaseException) -> str:
    """What an exporter's error comes from, in one line: it wraps the cause several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), 300)}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print and log what they do, and what their libraries lack, at length; errors are ours to tell."""
    loud = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnx_ir", "onnxscript", "transformers")]
    before = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loud, before, strict=True):
            logger.setLevel(level)
