"""Graphs of the exporter's form, small enough for a property test: embedding, linear layers with LoRA inputs, a head."""

import numpy as np
import onnx_ir as ir

VOCABULARY, WIDTH, INNER, LABELS = 50, 40, 172, 3  # neither width is a multiple of 32, and 172 is that of a real model


def small_graph(seed: int = 0, tied: bool = True, outlier: float = 1.0) -> ir.Model:
    """``logits = (x + gelu-free MLP(x)) E^T`` of ``x = E[input_ids]``; LoRA on the first layer; a bias that can be given whole.

    ``outlier`` makes one row of the second layer so many times larger, which rounding then does badly on.
    """
    rng = np.random.default_rng(seed)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="small")

    def constant(name, *shape, scale=1.0):
        array = (scale * rng.standard_normal(shape)).astype(np.float32)
        value = ir.val(name, ir.DataType.FLOAT, shape, const_value=ir.tensor(array, name=name))
        graph.register_initializer(value)
        return value

    def add(op, *inputs, name, **attributes):
        node = ir.node(op, list(inputs), attributes, name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}.y", ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        return node.outputs[0]

    ids = ir.val("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    a, b = (ir.val(f"lora.up.{x}", ir.DataType.FLOAT, s) for x, s in (("A", [WIDTH, "r.up"]), ("B", ["r.up", INNER])))
    for value, shape in ((a, (WIDTH, 0)), (b, (0, INNER))):
        value.const_value = ir.tensor(np.zeros(shape, np.float32), name=value.name)
        graph.register_initializer(value)
    bias = constant("dense.up.bias", INNER)
    whole = constant("dense.head.weight", WIDTH, LABELS)
    graph.inputs.extend([ids, a, b, bias, whole])
    table = constant("embed.weight", VOCABULARY, WIDTH)
    x = add("Gather", table, ids, name="embed", axis=0)
    up, down = constant("up.weight", WIDTH, INNER, scale=WIDTH**-0.5), constant("down.weight", INNER, WIDTH, scale=INNER**-0.5)
    down.const_value.numpy()[:, 0] *= outlier
    h = add("Add", add("MatMul", x, up, name="up"), bias, name="up_bias")
    low = add("MatMul", add("MatMul", x, a, name="lora_up_A"), b, name="lora_up_B")
    h = add("Relu", add("Add", h, low, name="lora_up_add"), name="relu")
    x = add("Add", x, add("MatMul", h, down, name="down"), name="residual")
    head = table if tied else constant("head.weight", VOCABULARY, WIDTH)
    logits = add("MatMul", x, add("Transpose", head, name="head_transpose", perm=[1, 0]), name="head")
    labels = add("MatMul", x, whole, name="labels")
    logits.name, labels.name = "logits", "labels"
    for value, width in ((logits, VOCABULARY), (labels, LABELS)):
        value.shape = ir.Shape(["batch", "sequence", width])
        graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)
