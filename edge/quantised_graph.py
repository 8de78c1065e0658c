"""The graph whose weights have fewer bits: which initialisers those are, and the operators that multiply with them.

Linear layers become ``MatMulNBits`` and the token embedding ``GatherBlockQuantized``, over blocks of 32 (``edge.blockwise``). A
tied head stays tied: both read the same packed bytes. What an adapter gives (``lora.*``, ``dense.*``) stays as it is, and so
do norms, biases and tables of positions, which are small.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edge import graph_file
from edge.blockwise import BLOCK, Blocks, Floats, round_to_nearest, unpacked
from edge.linear_layers import before_transpose, drop_unused
from protocol.errors import ConfigurationError, ModelError

CONTRIB = "com.microsoft"
# Activations in 8 bits too, block by block: the kernels that are several times faster than float32 (others are slower than it).
_ACCURACY_LEVEL = 4
# Of a weight in integers: two of its products with an unsigned byte must fit 16 bits, where processors without VNNI add them.
_LARGEST_INTEGER = 64


@dataclass(frozen=True)
class Weight:
    """One matrix that linear layers multiply with, the token embedding, or both when tied.

    Attributes:
        value: The initialiser, float32.
        turned: Held ``(d_out, d_in)`` as in PyTorch (a Transpose stands before the MatMul), not ``(d_in, d_out)``.
        layers: The MatMuls.
        lookups: The Gathers of token ids.
    """

    value: ir.Value
    turned: bool
    layers: tuple[ir.Node, ...]
    lookups: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """Of the initialiser."""
        return str(self.value.name)

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``; of an embedding ``(vocabulary, width)``."""
        rows, columns = constant(self.value).shape.numpy()
        return (rows, columns) if self.turned else (columns, rows)

    def rows(self) -> Floats:
        """The numbers, ``(d_out, d_in)``."""
        array: Floats = constant(self.value).numpy()
        return np.ascontiguousarray(array if self.turned else array.T)


def weights_of(model: ir.Model) -> list[Weight]:
    """Every matrix that is quantised, in the order of the graph: constant, two-dimensional, and no input of the graph."""
    layers: dict[str, list[ir.Node]] = {}
    lookups: dict[str, list[ir.Node]] = {}
    values: dict[str, tuple[ir.Value, bool]] = {}
    for node in model.graph:
        found = _multiplied(node) or _looked_up(node)
        if found is None:
            continue
        value, turned = found
        key = str(value.name)
        if values.setdefault(key, (value, turned))[1] == turned:
            (layers if node.op_type == "MatMul" else lookups).setdefault(key, []).append(node)
    return [
        Weight(value, turned, tuple(layers.get(key, ())), tuple(lookups.get(key, ())))
        for key, (value, turned) in values.items()
    ]


def with_levels(model: ir.Model, levels: Mapping[str, Blocks]) -> ir.Model:
    """A copy of a graph in which some weights are quantised; the others, and the graph given, stay as they are."""

    def put(graph: ir.Graph, weight: Weight) -> None:
        if weight.name in levels:
            _blockwise(graph, weight, levels[weight.name])

    return each_weight(model, put)


def weight_bytes(model: ir.Model) -> int:
    """The most bytes that a graph's constant tensors take on disk, with what ``edge.graph_file`` leaves between them."""
    sizes = [constant(value).nbytes for value in model.graph.initializers.values()]
    return sum(size + (graph_file.ALIGNMENT if size > graph_file.ALIGNED_FROM else 0) for size in sizes)


def too_small(asked: int, least: int, how: str) -> ConfigurationError:
    """The error for a bound that cannot be met."""
    return ConfigurationError("largest_bytes", [f"found {asked:,}; the weights take at least {least:,} bytes {how}"])


def _multiplied(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The constant matrix of a MatMul, and whether a Transpose stands before it."""
    value, turned = before_transpose(node.inputs[1] if node.op_type == "MatMul" else None)
    return None if value is None or not is_matrix(value) else (value, turned)


def _looked_up(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """The table of a Gather that token ids go into."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, ids = node.inputs[0], node.inputs[1]
    if ids is not None and (cast := ids.producer()) is not None and cast.op_type == "Cast":
        ids = cast.inputs[0]
    if table is None or ids is None or ids.name != "input_ids" or not is_matrix(table):
        return None
    return table, True


def is_matrix(value: ir.Value) -> bool:
    """Whether a value is a constant float32 matrix, and nothing that an adapter may give."""
    return (
        value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def each_weight(model: ir.Model, put: Callable[[ir.Graph, Weight], None]) -> ir.Model:
    """A copy of a graph, with something else put in the place of each weight."""
    made = model.clone()
    for weight in weights_of(made):
        put(made.graph, weight)
    made.graph.opset_imports[CONTRIB] = 1  # not every graph had any of its operators before
    drop_unused(made.graph)
    return made


def _blockwise(graph: ir.Graph, weight: Weight, found: Blocks) -> None:
    d_out, d_in = weight.shape
    held = [_initializer(graph, f"{weight.name}.q{found.bits}", found.packed)]
    held.append(_initializer(graph, f"{weight.name}.scales", found.scales))
    form = {"bits": found.bits, "block_size": BLOCK}
    if weight.lookups:
        table = _table(graph, weight, found, *held)
        for node in weight.lookups:
            _look_up(graph, node, table, found, form)
    if weight.layers and found.zero_points is not None:
        held.append(_initializer(graph, f"{weight.name}.zero_points", found.zero_points))
    for node in weight.layers:
        settings = {"K": d_in, "N": d_out, "accuracy_level": _ACCURACY_LEVEL, **form}
        put(graph, node, [ir.node("MatMulNBits", [node.inputs[0], *held], settings, domain=CONTRIB, name=node.name)])


def _table(graph: ir.Graph, weight: Weight, found: Blocks, levels: ir.Value, scales: ir.Value) -> list[ir.Value]:
    """Levels, scales and zero points as a lookup wants them, ``(vocabulary, blocks, …)``: the very levels of the head."""
    rows, blocks = found.scales.shape
    column = _initializer(graph, f"{weight.name}.column", np.array([rows, blocks, 1], np.int64))
    turned = ir.node("Reshape", [scales, column], name=f"{weight.name}.scales_of_rows")
    graph.insert_before(weight.lookups[0], turned)
    _typed(turned.outputs[0], f"{weight.name}.scales_of_rows", ir.DataType.FLOAT)
    table = [levels, turned.outputs[0]]
    if found.zero_points is not None:
        zeros = unpacked(found.zero_points, found.bits)[:, :blocks, None]
        table.append(_initializer(graph, f"{weight.name}.zero_points_of_rows", np.ascontiguousarray(zeros)))
    return table


def _look_up(graph: ir.Graph, node: ir.Node, table: list[ir.Value], found: Blocks, form: Mapping[str, int]) -> None:
    levels, scales, *zeros = table
    settings = {"gather_axis": 0, "quantize_axis": 2, **form}
    gather = ir.node("GatherBlockQuantized", [levels, node.inputs[1], scales, *zeros], settings, domain=CONTRIB, name=node.name)
    flat = _initializer(graph, f"{node.name}.flat", np.array([0, 0, -1], np.int64))
    nodes = [gather, ir.node("Reshape", [gather.outputs[0], flat], name=f"{node.name}_flat")]
    if found.d_in % BLOCK:
        ends = [_initializer(graph, f"{node.name}.{what}", np.array([at], np.int64)) for what, at in _cut(found.d_in)]
        nodes.append(ir.node("Slice", [nodes[-1].outputs[0], *ends], name=f"{node.name}_cut"))
    put(graph, node, nodes)


def _cut(width: int) -> list[tuple[str, int]]:
    return [("first", 0), ("last", width), ("axis", 2)]


def integers(graph: ir.Graph, weight: Weight) -> None:
    """Channels of a weight in 8 bits, rows of a call when they come; the embedding in blocks."""
    if weight.lookups:
        levels = round_to_nearest(weight.rows(), 8)
        _blockwise(graph, Weight(weight.value, True, (), weight.lookups), levels)
    if not weight.layers:
        return
    array = weight.rows()
    scale = np.abs(array).max(1) / _LARGEST_INTEGER
    integers_of = np.round(array / np.where(scale == 0, 1, scale)[:, None]).astype(np.int8)
    held = [
        _initializer(graph, f"{weight.name}.int8", np.ascontiguousarray(integers_of.T)),
        _initializer(graph, f"{weight.name}.channel_scales", scale.astype(np.float32)),
    ]
    for node in weight.layers:
        put(graph, node, [ir.node("DynamicQuantizeMatMul", [node.inputs[0], *held], domain=CONTRIB, name=node.name)])


def halves(graph: ir.Graph, weight: Weight) -> None:
    """Float16 on disk, float32 before anything is computed."""
    array = constant(weight.value).numpy()
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise ModelError(f"{weight.name}: holds numbers beyond float16's largest, 65504; use q8, which scales them")
    held = _initializer(graph, f"{weight.name}.fp16", half)
    for node in weight.lookups:
        gather = ir.node("Gather", [held, node.inputs[1]], {"axis": 0}, name=node.name)
        put(graph, node, [gather, _to_float(gather.outputs[0], f"{node.name}_float")])
    if weight.layers:
        cast = _to_float(held, f"{weight.name}_float")
        graph.insert_before(graph[0], cast)
        _typed(cast.outputs[0], f"{weight.name}_float", ir.DataType.FLOAT)
        for use, at in list(weight.value.uses()):
            use.replace_input_with(at, cast.outputs[0])


def _to_float(value: ir.Value, name: str) -> ir.Node:
    return ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=name)


def put(graph: ir.Graph, old: ir.Node, nodes: list[ir.Node]) -> None:
    """Nodes in the place of one; the value that comes out keeps its name, type and shape."""
    for position, node in enumerate(nodes[:-1]):
        node.outputs[0].name = f"{old.name}.{position}"
    before, after = old.outputs[0], nodes[-1].outputs[0]
    after.type, after.shape = before.type, before.shape
    graph.insert_before(old, nodes)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    name = before.name
    graph.remove(old, safe=True)
    after.name = name


def _typed(value: ir.Value, name: str, dtype: ir.DataType) -> None:
    value.name, value.type = name, ir.TensorType(dtype)


def _initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def constant(value: ir.Value) -> ir.TensorProtocol:
    """The numbers of an initialiser."""
    if value.const_value is None:
        raise ModelError(f"{value.name}: an initialiser without numbers")
    return value.const_value
