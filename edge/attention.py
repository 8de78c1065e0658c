"""Attention of an exported decoder: onnxruntime's GroupQueryAttention over a cache that is written in place.

transformers lets a caller bring the attention function of a model. The one here leaves a ``com.microsoft`` node in the graph
whose past and present are one buffer of ``capacity`` positions (Ainslie et al. 2023, arXiv:2305.13245, for the heads that
share keys): a step writes its own keys and values behind those that are there, and nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

NAME = "fedge_in_place"
# What models hand to their attention beside queries, keys and values, and what this function heeds or need not heed.
_HEEDED = {"scaling", "sliding_window", "softcap"}
_OF_NO_EFFECT = {"dropout", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache", "return_dict"}
_KNOWN = _HEEDED | _OF_NO_EFFECT | {"position_ids", "position_embeddings", "cache_position", "is_causal", "logits_to_keep"}


@dataclass
class CacheInGraph:
    """The cache's values while a decoder is traced.

    Attributes:
        past: Key and value of each layer, ``(batch, kv_heads, capacity, head_dim)``.
        seqlens_k: ``(batch,)`` int32, tokens that are valid after the call, less one.
        total: int32 scalar, the most tokens that are valid after the call in any row.
        present: Filled by the trace, layer by layer.
    """

    past: "list[tuple[Tensor, Tensor]]"
    seqlens_k: "Tensor"
    total: "Tensor"
    present: "dict[int, tuple[Tensor, Tensor]]" = field(default_factory=dict)


_current: ContextVar[CacheInGraph] = ContextVar("cache in graph")


@contextmanager
def attending(cache: CacheInGraph) -> Iterator[None]:
    """Within it, models with attention ``NAME`` write to this cache."""
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


def register() -> None:
    """Makes ``NAME`` an attention implementation of transformers, which then makes no masks for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)


def _attention(
    module: Any, query: "Tensor", key: "Tensor", value: "Tensor", attention_mask: "Tensor | None", **settings: Any
) -> "tuple[Tensor, None]":
    """The signature is transformers': query ``(batch, heads, sequence, head_dim)``, result ``(batch, sequence, heads, …)``."""
    import torch

    _check(module, key, value, attention_mask, settings)
    cache = _current.get()
    past_key, past_value = cache.past[module.layer_idx]
    batch, heads, sequence, head_dim = query.shape
    kv_heads = key.shape[1]

    def flat(states: "Tensor") -> "Tensor":
        return states.transpose(1, 2).reshape(batch, sequence, -1)

    scaling, window = settings.get("scaling"), settings.get("sliding_window")
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float(head_dim**-0.5 if scaling is None else scaling),
        "local_window_size": window or -1,
        "softcap": float(settings.get("softcap") or 0.0),
    }
    out, *present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        (flat(query), flat(key), flat(value), past_key, past_value, cache.seqlens_k, cache.total),
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=((batch, sequence, heads * head_dim), past_key.shape, past_value.shape),
        version=1,
    )
    cache.present[module.layer_idx] = (present[0], present[1])
    return out.reshape(batch, sequence, heads, head_dim), None


def _check(module: Any, key: "Tensor", value: "Tensor", mask: "Tensor | None", settings: dict[str, Any]) -> None:
    """Refuses what the operator has no place for; a graph that leaves it out would compute something else."""
    odd = sorted(name for name, setting in settings.items() if name not in _KNOWN and setting is not None)
    kind = type(module).__name__
    if odd:
        raise ModelError(f"{kind}: its attention takes {', '.join(odd)}, for which GroupQueryAttention has no input")
    if mask is not None:
        raise ModelError(f"{kind}: its attention adds a mask of its own, for which GroupQueryAttention has no input")
    if key.shape[-1] != value.shape[-1]:
        raise ModelError(
            f"{kind}: keys have {key.shape[-1]} and values {value.shape[-1]} numbers per head; GroupQueryAttention wants equal"
        )
    if settings.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ModelError(f"{kind}: its attention looks ahead, which a cache cannot follow")
