"""Bundles that the runtime's tests open: real exported models, and graphs small enough to compute by hand."""

from pathlib import Path

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from edge.bundle import write_bundle
from edge.runtime.chat_format import ChatTemplate, Turn
from edge.runtime.manifest import (
    BundledAdapter,
    DecoderShape,
    Description,
    EncoderShape,
    Tokens,
    adapter_path,
)
from edge.runtime.model import Model, Resources
from edge.runtime.model import open as opened

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
# What strategies.base_model gives a tokenizer without a template of its own.
CHAT = ChatTemplate(
    system=Turn(before="system:\n", after="\n"),
    user=Turn(before="user:\n", after="\n"),
    assistant=Turn(before="assistant:\n", after="</s>\n"),
    generation="assistant:\n",
)
WORDS = ["<pad>", "<unk>", "a", "b", "c", "d"]


def of_exported(folder: Path, found, tokens: Tokens, tokenizer: Path, chat=CHAT, labels=(), adapter_labels=()) -> Path:
    """The bundle of an ``exported_decoder`` or ``exported_classifier`` in float32."""
    from edge import adapter_file
    from protocol.files import read_stored

    exported = found.exported
    content = {path.name: path for path in Path(found.folder).iterdir()} | {"tokenizer/tokenizer.json": tokenizer}
    listed = {}
    for name, place in found.adapters.items():
        stored = read_stored(place, base_digest=found.base.digest)
        file = folder.parent / f"{name}.onnx_adapter"
        adapter_file.write(file, adapter_file.parameters(stored, exported.lora, exported.dense, found.base.digest))
        content[adapter_path(name)] = file
        listed[name] = BundledAdapter(digest=stored.adapter.digest(), labels=adapter_labels)
    decoder, encoder = exported.decoder, exported.encoder
    described = Description(
        name="tested",
        version=1,
        kind=exported.kind,
        base_digest=found.base.digest,
        profile="fp32",
        opset=exported.opset,
        minimum_onnxruntime="1.31",
        decoder=decoder and DecoderShape(**vars(decoder)),
        encoder=encoder and EncoderShape(**vars(encoder)),
        lora=dict(exported.lora),
        dense=dict(exported.dense),
        tokens=tokens,
        chat=chat,
        labels=labels,
        adapters=listed,
    )
    write_bundle(folder, described, content, KEY)
    return folder


def small(folder: Path, nodes, inputs, outputs, weights, **described) -> Path:
    """A bundle around a graph of these nodes, with a tokenizer of six words."""
    graph = helper.make_graph(
        nodes, "small", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    words = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token=WORDS[1]))
    words.pre_tokenizer = WhitespaceSplit()
    content = {"model.onnx": model.SerializeToString(), "tokenizer/tokenizer.json": words.to_str().encode()}
    told = {"name": "small", "version": 1, "base_digest": "ab" * 32, "profile": "fp32", "opset": 23}
    told |= {"minimum_onnxruntime": "1.31", "tokens": Tokens(pad=0, unk=1)}
    write_bundle(folder, Description(**(told | described)), content, KEY)
    return folder


def tensor(name: str, *shape, kind=TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def embedder(folder: Path, table: np.ndarray, **described) -> Path:
    """An embedding is the mean of its tokens' rows of ``table`` over the mask."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["rows"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["wide"]),
        node("Mul", ["rows", "wide"], ["kept"]),
        node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        node("ReduceSum", ["mask", "middle"], ["count"], keepdims=1),
        node("Div", ["sum", "count"], ["embedding"]),
    ]
    inputs = [tensor(name, "batch", "sequence", kind=TensorProto.INT64) for name in ("input_ids", "attention_mask")]
    weights = {"table": table, "last": np.array([2]), "middle": np.array([1])}
    shape = EncoderShape(hidden=table.shape[1], context_tokens=8, pooling="mean")
    outputs = [tensor("embedding", "batch", table.shape[1])]
    return small(folder, nodes, inputs, outputs, weights, kind="embedder", encoder=shape, **described)


def concat_decoder(folder: Path, table: np.ndarray, places: np.ndarray) -> Path:
    """One layer of one head without projections: keys are ``table[id] + places[position]``, values ``table[id]``."""
    node, hidden = helper.make_node, table.shape[1]
    nodes = [
        node("Gather", ["table", "input_ids"], ["value"]),
        node("Gather", ["places", "position_ids"], ["place"]),
        node("Add", ["value", "place"], ["key"]),
        node("Unsqueeze", ["key", "one"], ["new_key"]),
        node("Unsqueeze", ["value", "one"], ["new_value"]),
        node("Concat", ["past.0.key", "new_key"], ["present.0.key"], axis=2),
        node("Concat", ["past.0.value", "new_value"], ["present.0.value"], axis=2),
        node("Transpose", ["present.0.key"], ["turned"], perm=[0, 1, 3, 2]),
        node("MatMul", ["new_key", "turned"], ["all_scores"]),
        # Token j is seen from position i where j <= i.
        node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        node("Squeeze", ["total"], ["end"]),
        node("Range", ["zero", "end", "step"], ["earlier"]),
        node("Unsqueeze", ["position_ids", "seen_axes"], ["position"]),
        node("LessOrEqual", ["earlier", "position"], ["seen"]),
        node("Where", ["seen", "all_scores", "never"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "present.0.value"], ["mixed"]),
        node("Squeeze", ["mixed", "one"], ["states"]),
        node("Gather", ["states", "logits_positions"], ["kept"], axis=1),
        node("MatMul", ["kept", "head"], ["logits"]),
    ]
    whole = {name: tensor(name, "batch", "sequence", kind=TensorProto.INT64) for name in ("input_ids", "position_ids")}
    inputs = [*whole.values(), tensor("attention_mask", "batch", "total", kind=TensorProto.INT64)]
    inputs += [tensor("logits_positions", "kept", kind=TensorProto.INT64)]
    inputs += [tensor(f"past.0.{what}", "batch", 1, "past", hidden) for what in ("key", "value")]
    outputs = [tensor("logits", "batch", "kept", len(table))]
    outputs += [tensor(f"present.0.{what}", "batch", 1, "all", hidden) for what in ("key", "value")]
    weights = {"table": table, "places": places, "head": np.ascontiguousarray(table.T), "one": np.array([1])}
    weights |= {"zero": np.array(0), "step": np.array(1), "seen_axes": np.array([1, 3]), "never": np.float32(-1e9)}
    shape = DecoderShape(
        layers=1, kv_heads=1, head_dim=hidden, context_tokens=len(places), vocabulary=len(table), cache="concat"
    )
    described = {"kind": "decoder", "decoder": shape}
    return small(folder, nodes, inputs, outputs, {name: np.asarray(value) for name, value in weights.items()}, **described)


def open_tested(folder: Path, **settings) -> Model:
    return opened(folder, KEY.public_key(), state=None, resources=Resources(threads=1, **settings))
