"""Bundles of seven nodes that anybody can compute by hand: the mean of a table's rows, as an embedding or as two logits."""

import tempfile
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save
from small_bundles import KEY
from tokenizers import Tokenizer, models, pre_tokenizers

from edge.bundle import write_bundle
from edge.runtime.manifest import Description, EncoderShape

WORDS = {"[unk]": 0, "a": 1, "b": 2}
TABLE = np.array([[0, 0], [1, 2], [3, 5]], np.float32)


def averaging(folder: Path, kind: str, **changes) -> Path:
    """A signed bundle of a classifier (labels no, yes) or an embedder."""
    output = "embedding" if kind == "embedder" else "logits"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
        helper.make_node("Mul", ["rows", "weights"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["weights", "second"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], [output]),
    ]
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", 2])
    held = {"table": TABLE, "last": np.array([-1]), "second": np.array([1])}
    graph = helper.make_graph(nodes, "mean", ids, [out], [numpy_helper.from_array(each, name) for name, each in held.items()])
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[unk]"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    described = Description(
        **{"name": "mean", "version": 1, "base_digest": "ab" * 32, "base_model": "table", "profile": "fp32", **changes},
        kind=kind,
        opset=23,
        minimum_onnxruntime="1.31",
        encoder=EncoderShape(hidden=2, context_tokens=8, pooling="mean" if kind == "embedder" else None),
        labels=() if kind == "embedder" else ("no", "yes"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model.onnx")
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), model)
        write_bundle(folder, described, {"model.onnx": model, "tokenizer/tokenizer.json": words.to_str().encode()}, KEY)
    return folder
