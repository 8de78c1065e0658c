"""The second route for decoders whose attention GroupQueryAttention cannot express: transformers' own exporter.

Its graph takes the past at its real length and gives it back longer, copied: slower at long contexts, but of any architecture
that transformers itself exports. transformers calls the exporter experimental.
"""

import re
from typing import TYPE_CHECKING, Any

import onnx_ir

from edge.tracing import OPSET, Decoder, quiet, reason
from protocol.errors import ModelError
from strategies.base_model import Base

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

_CACHED = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
_PAST = {"input": "past", "output": "present"}


def decoder(base: Base) -> "tuple[ONNXProgram, Decoder]":
    """Prefill and decode as one graph of ``input_ids``, ``attention_mask`` over past and new tokens, perhaps ``position_ids``.

    Raises:
        ModelError: transformers cannot export it either, or its cache is not one key and one value of a form per layer.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    ids = torch.full((2, 5), 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a mask that hides nothing would be left out of the graph
    with quiet():
        # Attention of plain operators: those fused for torch have forms that ONNX lacks.
        settings = {"attn_implementation": "eager", "dtype": torch.float32, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(str(base.folder), **settings).eval()
    kind = type(model).__name__
    try:
        with quiet(), torch.no_grad():
            parts = decompose_for_generation(model, {"input_ids": ids, "attention_mask": mask}, multi_token_decode=True)
            part, inputs = parts["decode"]
            config = OnnxConfig(dynamic=True, opset_version=OPSET, optimize=False)
            graph, _ = OnnxExporter().export_program(part, inputs, config)
            program = torch.onnx.ONNXProgram(graph, None)
    except Exception as error:  # whatever a model's code or the exporter itself raises
        raise ModelError(f"{kind} cannot be exported with transformers.exporters: {reason(error)}") from error
    return program, _renamed(graph, kind)


def _renamed(graph: onnx_ir.Model, kind: str) -> Decoder:
    """Gives inputs, outputs and their free dimensions the names that runtimes know; returns the cache's form."""
    cached: dict[tuple[int, str], tuple[Any, Any]] = {}
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        sizes = tuple(value.shape or ())
        if (found := _CACHED.fullmatch(value.name or "")) and len(sizes) == 4:
            layer = int(found[2]), found[3]
            cached.setdefault(layer, (_size(sizes[1]), _size(sizes[3])))  # inputs come first; outputs do not always tell
            value.name = f"{_PAST[found[1]]}.{found[2]}.{found[3]}"
            heads, head_dim = cached[layer]
            value.shape = onnx_ir.Shape(["batch", heads, "past" if found[1] == "input" else "total", head_dim])
        elif value.name in _FREE:
            value.shape = onnx_ir.Shape([*_FREE[value.name], *sizes[2:]])
        else:
            raise ModelError(f"{kind}: its graph has {value.name}, which is neither text nor a cache of keys and values")
    layers = len(cached) // 2
    names = {value.name for value in (*graph.graph.inputs, *graph.graph.outputs)}
    wanted = {f"{which}.{at}.{half}" for which in _PAST.values() for at in range(layers) for half in ("key", "value")}
    forms = sorted({str(form) for form in cached.values()})
    if len(forms) != 1 or not wanted <= names or not all(isinstance(size, int) for size in cached[0, "key"]):
        raise ModelError(f"{kind}: its cache has {len(cached)} parts of forms {', '.join(forms)}; expected one form for all")
    return Decoder(layers, *map(int, cached[0, "key"]))


def _size(dimension: Any) -> int | str:
    """A graph in which nothing is folded yet has fixed sizes as symbols, too: ``"16"``."""
    text = str(dimension.value if isinstance(dimension, onnx_ir.SymbolicDim) else dimension)
    return int(text) if text.isdigit() else text


_FREE = {
    "input_ids": ("batch", "sequence"),
    "attention_mask": ("batch", "total"),
    "position_ids": ("batch", "sequence"),
    "logits": ("batch", "sequence"),
}
