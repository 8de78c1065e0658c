"""Small bundles to sign, change and refuse: one that embeds texts, and others of noise, which only look as bundles do."""

import hashlib
import json
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.bundle import write_bundle
from edge.runtime.manifest import BundledAdapter, DecoderShape, Description, EncoderShape, adapter_path

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
TRUSTED = (KEY.public_key(),)


def noise(seed: int, size: int) -> bytes:
    """Bytes that no compression makes smaller."""
    return hashlib.shake_256(seed.to_bytes(8)).digest(size)


def description(version: int = 1, adapters: tuple[str, ...] = ("north", "south"), **changes) -> Description:
    fields = {
        "name": "clinic",
        "version": version,
        "kind": "decoder",
        "base_digest": "ab" * 32,
        "profile": "q8",
        "opset": 23,
        "minimum_onnxruntime": "1.31",
        "decoder": DecoderShape(layers=2, kv_heads=2, head_dim=8, context_tokens=64, vocabulary=512),
        "lora": {"model.layers.0.self_attn.q_proj": (16, 16)},
        "adapters": {name: BundledAdapter(digest="cd" * 32, method="lora", r=4) for name in adapters},
    }
    return Description(**(fields | changes))


def contents(adapters: tuple[str, ...] = ("north", "south"), weights: int = 200_000) -> dict[str, bytes]:
    made = {
        "model.onnx": noise(1, 3_000),
        "model.onnx.data": noise(2, weights),
        "tokenizer/tokenizer.json": noise(3, 2_000),
    }
    for name in adapters:
        made[adapter_path(name)] = noise(int.from_bytes(name.encode()[:4]), 1_000)
        made[f"adapters/{name}.json"] = b"{}"
    return made


def bundle(folder: Path, version: int = 1, adapters: tuple[str, ...] = ("north", "south"), key=KEY, weights=200_000, **changes):
    write_bundle(folder, description(version, adapters, **changes), contents(adapters, weights), key)
    return folder


def embedder(version: int = 1, **changes) -> Description:
    """Of ``working``."""
    shape = EncoderShape(hidden=8, context_tokens=16, pooling="mean")
    fields = {"kind": "embedder", "decoder": None, "encoder": shape, "lora": {}, "dense": {"table": (64, 8)}}
    return description(version, **(fields | changes))


def working(folder: Path) -> dict[str, bytes]:
    """Contents of a bundle that runs: the sum of a text's rows of a table, which adapters replace whole."""
    import onnx
    import onnxruntime
    from onnx import helper

    table = np.random.default_rng(5).normal(size=(64, 8)).astype(np.float32)
    ids, mask = (
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")
    )
    dense = helper.make_tensor_value_info("dense.table", onnx.TensorProto.FLOAT, [64, 8])
    nodes = [
        helper.make_node("Gather", ["dense.table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["counts"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["counts", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["embedding"], keepdims=0),
    ]
    numbers = {"last": np.array([2]), "middle": np.array([1]), "dense.table": table}
    graph = helper.make_graph(
        nodes,
        "embedder",
        [ids, mask, dense],
        [helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["b", 8])],
        [onnx.numpy_helper.from_array(value, name) for name, value in numbers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1000)
    words = {"[UNK]": 0} | {f"w{number}": number for number in range(1, 64)}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    tokenizer["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    made = {"tokenizer/tokenizer.json": json.dumps(tokenizer).encode()}
    for number, name in enumerate(("north", "south"), 2):
        adapter = onnxruntime.AdapterFormat()
        adapter.set_parameters({"dense.table": onnxruntime.OrtValue.ortvalue_from_numpy(table * number)})
        adapter.export_adapter(str(folder / "adapter"))
        made[adapter_path(name)] = (folder / "adapter").read_bytes()
    return made | {name: (folder / name).read_bytes() for name in ("model.onnx", "model.onnx.data")}
