"""The linear layers of an exported graph by the names of their modules, with their weights in one form.

The exporter folds transposes of small weights and renames what it folds, splits some layers and fuses others. After this
every linear layer is ``MatMul(x, W)`` and perhaps ``Add(bias)``, with ``W`` ``(d_in, d_out)`` an initialiser
``{module}.weight``: what quantisers, adapters and whoever reads the weights again go by.
"""

import ast
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge.tracing import HELD
from protocol.errors import ModelError

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Linear:
    """One use of a linear layer.

    Attributes:
        module: Its name in the model.
        node: The MatMul.
        shape: ``(d_in, d_out)``.
        output: What the layer puts out: after its bias, if it has one.
        repeated: Whether the model uses the module more than once.
    """

    module: str
    node: ir.Node
    shape: tuple[int, int]
    output: ir.Value
    repeated: bool

    @property
    def input(self) -> ir.Value:
        """What the layer gets, ``(…, d_in)``."""
        found = self.node.inputs[0]
        if found is None:
            raise ModelError(f"{self.module}: its MatMul has no input")
        return found


def parameter_names(model: ir.Model) -> None:
    """Gives initialisers the names of the model's parameters, in place: without the tracer's prefix."""
    for value in list(model.graph.initializers.values()):
        if value.name and value.name.startswith(f"{HELD}."):
            value.name = value.name.removeprefix(f"{HELD}.")


def settle(model: ir.Model, shapes: Mapping[str, tuple[int, int]], kept: Collection[str]) -> list[Linear]:
    """Brings the linear layers into one form, in place.

    Args:
        model: Of ``edge.tracing``, with ``parameter_names``.
        shapes: ``(d_in, d_out)`` by module: every linear layer of the PyTorch model.
        kept: Modules whose weight stays as PyTorch has it, ``(d_out, d_in)`` with a Transpose: tied ones.

    Returns:
        Every use of each, in the order of the graph. A module that the graph does not need is not among them.
    """
    found = list(_uses(model.graph, shapes))
    counts = Counter(module for module, _ in found)
    made: list[Linear] = []
    frozen: dict[str, ir.Value] = {}
    for module, node in found:
        matmul, output = _plain(model.graph, node)
        if module in kept:
            _as_in_torch(model.graph, module, matmul, shapes[module])
        else:
            if module not in frozen:
                frozen[module] = _frozen(model.graph, module, matmul, shapes[module])
            matmul.replace_input_with(1, frozen[module])
        matmul.name = module if counts[module] == 1 else f"{module}.{sum(layer.module == module for layer in made)}"
        made.append(Linear(module, matmul, shapes[module], output, counts[module] > 1))
    drop_unused(model.graph)
    return made


def _uses(graph: ir.Graph, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, ir.Node]]:
    for node in graph:
        if node.op_type in ("MatMul", "Gemm") and (module := _owner(node)) in shapes and _weight(node.inputs[1]) is not None:
            yield module, node


def _owner(node: ir.Node) -> str:
    """The module whose forward made a node."""
    scopes = node.metadata_props.get(_SCOPES)
    path = ast.literal_eval(scopes) if scopes else []
    return str(path[-2]).removeprefix(f"{HELD}.") if len(path) > 1 else ""


def before_transpose(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """What a value is the transpose of, or the value itself, and whether there is a Transpose."""
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "Transpose":
        return value, False
    return producer.inputs[0], True


def _weight(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """The initialiser that a value is, or is the transpose of; None for what is computed, and for a head that is an input."""
    found, transposed = before_transpose(value)
    return (found, transposed) if found is not None and found.const_value is not None and found.is_initializer() else None


def _plain(graph: ir.Graph, node: ir.Node) -> tuple[ir.Node, ir.Value]:
    """A Gemm as MatMul and Add; the node that multiplies, and the layer's output."""
    output = node.outputs[0]
    if node.op_type == "Gemm":
        return _split(graph, node)
    users = [user for user, _ in output.uses()]
    if len(users) == 1 and users[0].op_type == "Add" and any(_is_bias(node, given) for given in users[0].inputs):
        return node, users[0].outputs[0]
    return node, output


def _is_bias(node: ir.Node, value: ir.Value | None) -> bool:
    return value is not None and value.name in (f"{_owner(node)}.bias", f"dense.{_owner(node)}.bias")


def _split(graph: ir.Graph, node: ir.Node) -> tuple[ir.Node, ir.Value]:
    if any(_number(node, name, 1) != 1 for name in ("alpha", "beta")) or _number(node, "transA", 0):
        raise ModelError(f"{_owner(node)}: a Gemm that scales or transposes its input is no linear layer")
    x, weight, *bias = node.inputs
    nodes: list[ir.Node] = []
    if _number(node, "transB", 0):
        nodes.append(ir.node("Transpose", [weight], attributes={"perm": [1, 0]}))
        nodes[-1].outputs[0].name = f"{node.name}_weight"
        weight = nodes[-1].outputs[0]
    matmul = ir.node("MatMul", [x, weight], name=node.name)
    nodes.append(matmul)
    if bias and bias[0] is not None:
        nodes.append(ir.node("Add", [matmul.outputs[0], bias[0]], name=f"{node.name}_bias"))
    old, new = node.outputs[0], nodes[-1].outputs[0]
    matmul.outputs[0].name = f"{node.name}_product"
    for made in nodes:
        made.outputs[0].type = old.type
        made.metadata_props.update(node.metadata_props)
    matmul.outputs[0].shape = new.shape = old.shape
    graph.insert_before(node, nodes)
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
    return matmul, new


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _frozen(graph: ir.Graph, module: str, matmul: ir.Node, shape: tuple[int, int]) -> ir.Value:
    """The initialiser ``{module}.weight`` as ``(d_in, d_out)``; transposed when it is read, so that it is held only once."""
    found = _weight(matmul.inputs[1])
    if found is None:
        raise ModelError(f"{module}: its weight is computed in the graph")
    weight, transposed = found
    held: Any = weight.const_value

    def read() -> ir.TensorProtocol:
        array: NDArray[Any] = held.numpy()
        return ir.tensor(np.ascontiguousarray(array.T if transposed else array))

    have = tuple(int(size) for size in (reversed(held.shape) if transposed else held.shape))
    if have != shape:
        raise ModelError(f"{module}: its weight is {have} in the graph, {shape} in the model")
    name = f"{module}.weight"
    tensor = ir.LazyTensor(read, held.dtype, ir.Shape(shape), name=name) if transposed else held
    if (former := graph.initializers.get(name)) is not None:
        former.name = f"{name}.as_in_torch"  # unused from now on, unless something else reads it
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(held.dtype), const_value=tensor)
    tensor.name = name
    graph.register_initializer(value)
    return value


def _as_in_torch(graph: ir.Graph, module: str, matmul: ir.Node, shape: tuple[int, int]) -> None:
    """Undoes a folded transpose: ``MatMul(x, Transpose({module}.weight))``."""
    found = _weight(matmul.inputs[1])
    if found is None or found[1]:
        return
    folded: Any = found[0].const_value
    name = f"{module}.weight"
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(shape[::-1]), type=ir.TensorType(folded.dtype))
        value.const_value = ir.tensor(np.ascontiguousarray(folded.numpy().T), name=name)
        graph.register_initializer(value)
    turned = ir.node("Transpose", [graph.initializers[name]], attributes={"perm": [1, 0]}, name=f"{module}.transpose")
    turned.outputs[0].name, turned.outputs[0].type = f"{module}.transposed", ir.TensorType(folded.dtype)
    graph.insert_before(matmul, [turned])
    matmul.replace_input_with(1, turned.outputs[0])


def drop_unused(graph: ir.Graph) -> None:
    """Takes out nodes and initialisers that nothing reads, in place; optional inputs stay."""
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]
