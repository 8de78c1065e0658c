"""A layer's forward graph over integers as they are stored: onnxruntime multiplies them, and nobody turns them into floats.

The way back stays in float32: gradients span more powers of ten than eight bits hold.
"""

from collections.abc import Collection

import onnx_ir as ir

from edge.linear_layers import drop_unused
from edge.quantised_graph import CONTRIB, put
from edge.runtime.training_graph import LEVELS, SCALES, WEIGHT


def over_integers(forward: ir.Model, names: Collection[str]) -> ir.Model | None:
    """The graph with ``levels.{name}`` (int8 ``(d_in, d_out)``) and ``scales.{name}`` in place of ``weight.{name}``.

    Rows of a call are made integers when they come (``DynamicQuantizeMatMul``), as in a bundle's inference graph.

    Args:
        forward: Of one kind of layer.
        names: Of the weights that are held so in every layer of that kind.

    Returns:
        None where no weight can be taken so.
    """
    made = forward.clone()
    taken = [value for value in made.graph.inputs if str(value.name).removeprefix(WEIGHT) in names]
    changed = [value for value in taken if _multiplied(made.graph, value)]
    if not changed:
        return None
    made.graph.opset_imports.setdefault(CONTRIB, 1)
    drop_unused(made.graph)
    return made


def _multiplied(graph: ir.Graph, weight: ir.Value) -> bool:
    """Changes the products with one weight; whether that is all that was done with it."""
    readers = list(weight.uses())
    turns = [use.node for use in readers if use.node.op_type == "Transpose"]
    uses = [use for node in turns for use in node.outputs[0].uses()] if turns else readers
    if len(turns) not in (0, len(readers)) or any(use.node.op_type != "MatMul" or use.idx != 1 for use in uses):
        return False
    name, sizes = str(weight.name).removeprefix(WEIGHT), [int(size) for size in weight.shape or ()]  # type: ignore[arg-type]
    shape = sizes[::-1] if turns else sizes
    levels = ir.val(f"{LEVELS}{name}", ir.DataType.INT8, shape)
    scales = ir.val(f"{SCALES}{name}", ir.DataType.FLOAT, shape[1:])
    for node in [use.node for use in uses]:
        put(graph, node, [ir.node("DynamicQuantizeMatMul", [node.inputs[0], levels, scales], domain=CONTRIB, name=node.name)])
    graph.inputs.remove(weight)
    graph.inputs.extend([levels, scales])
    return True
