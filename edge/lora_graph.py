"""Adapters as optional inputs of a graph: low-rank factors beside every linear layer, heads and biases whole.

A module's output ``y`` becomes ``y + (x A) B`` (Hu et al. 2021, arXiv:2106.09685, eq. 3) with inputs ``lora.{module}.A``
``(d_in, r)`` and ``lora.{module}.B`` ``(r, d_out)``: PEFT's two factors transposed, its scaling inside B. Every module has a
rank of its own, and without an adapter it is 0. What is given whole replaces the base's own tensor, which is the default.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.linear_layers import Linear
from protocol.errors import ModelError

Size = int | Literal["labels"]


def add_lora(model: ir.Model, layers: Iterable[Linear]) -> dict[str, tuple[int, int]]:
    """Gives layers their two inputs, in place; returns ``(d_in, d_out)`` by module.

    A module that the model uses several times (layers that share weights) has one pair of inputs, as it has one adapter.
    """
    found: dict[str, tuple[int, int]] = {}
    factors: dict[str, tuple[ir.Value, ir.Value]] = {}
    for number, layer in enumerate(layers):
        name, (d_in, d_out) = layer.module, layer.shape
        if name not in found:
            found[name] = layer.shape
            a = _optional(model.graph, f"lora.{name}.A", (d_in, f"r.{name}"), np.zeros((d_in, 0), np.float32))
            b = _optional(model.graph, f"lora.{name}.B", (f"r.{name}", d_out), np.zeros((0, d_out), np.float32))
            factors[name] = a, b
        elif found[name] != layer.shape:
            raise ModelError(f"{name}: found shapes {found[name]} and {layer.shape} for one module")
        _beside(model.graph, layer, *factors[name], f"lora_{name}" + (f"_{number}" if layer.repeated else ""))
    return found


def _beside(graph: ir.Graph, layer: Linear, a: ir.Value, b: ir.Value, name: str) -> None:
    """``y + (x A) B`` in place of ``y``; the names keep these nodes apart from those whose weights are quantised."""
    y = layer.output
    users = list(y.uses())
    down = ir.node("MatMul", [layer.input, a], name=f"{name}_A")
    up = ir.node("MatMul", [down.outputs[0], b], name=f"{name}_B")
    total = ir.node("Add", [y, up.outputs[0]], name=f"{name}_add")
    for node, what in ((down, "xA"), (up, "xAB"), (total, "y")):
        node.outputs[0].name, node.outputs[0].type = f"{name}_{what}", y.type
    total.outputs[0].shape = y.shape
    producer = y.producer()
    if producer is None:
        raise ModelError(f"{layer.module}: its output is an input of the graph")
    graph.insert_after(producer, [down, up, total])
    for user, at in users:
        user.replace_input_with(at, total.outputs[0])
    for at, output in enumerate(graph.outputs):
        if output is y:
            total.outputs[0].name, y.name = y.name, f"{name}_base"
            graph.outputs[at] = total.outputs[0]


def open_dense(model: ir.Model, tensors: Mapping[str, tuple[Size, ...]]) -> dict[str, ir.TensorProtocol]:
    """Makes initialisers inputs named ``dense.{parameter}``, in place, before anything is folded.

    An optimiser that saw their values would take biases of zeros out of the graph.

    Args:
        model: Its initialisers have the names of the model's parameters.
        tensors: Shape by parameter; ``"labels"`` where an adapter may bring any number of rows.

    Returns:
        Their values, for ``close_dense``.
    """
    graph = model.graph
    held = {}
    for name, shape in tensors.items():
        value = graph.initializers.get(name)
        if value is None or value.const_value is None or not value.uses():
            continue
        held[name] = value.const_value
        del graph.initializers[name]
        value.name, value.shape, value.const_value = f"dense.{name}", ir.Shape(shape), None
        graph.inputs.append(value)
        if "labels" in shape:
            _forget_shapes(value)
    return held


def close_dense(model: ir.Model, held: Mapping[str, ir.TensorProtocol]) -> set[str]:
    """Gives the inputs of ``open_dense`` their values as defaults, in place; returns the names of those that are needed."""
    graph = model.graph
    needed = set()
    for value in list(graph.inputs):
        name = (value.name or "").removeprefix("dense.")
        if name == value.name:
            continue
        if not value.uses():
            graph.inputs.remove(value)
            continue
        value.const_value = held[name]
        held[name].name = value.name
        graph.register_initializer(value)
        needed.add(name)
    return needed


def _forget_shapes(value: ir.Value) -> None:
    """Between a last layer and the graph's output, what was traced with the base's number of labels holds for no other."""
    graph = value.graph
    outputs = [] if graph is None else list(graph.outputs)
    for node, _ in value.uses():
        for output in node.outputs:
            if output in outputs:
                output.shape = ir.Shape([output.shape[0] if output.shape else "batch", "labels"])
            else:
                output.shape = None
            _forget_shapes(output)


def _optional(graph: ir.Graph, name: str, shape: tuple[int | str, ...], default: NDArray[np.float32]) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(default, name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
