"""Takes out of a traced decoder the transposes and reshapes that only prepared attention for a form that it does not need.

Models bring queries and keys to ``(batch, heads, sequence, head_dim)`` before they turn them by position.
GroupQueryAttention and RotaryEmbedding both take ``(batch, sequence, heads * head_dim)``, which is what the linear layers give.
In decode, where a step has one token, such nodes cost about as much as attention itself (benchmarks/LOG.md).
"""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_SWAP = [0, 2, 1, 3]


def flatten(model: ir.Model) -> None:
    """Rewrites a graph in place; its outputs stay what they are."""
    for node in list(model.graph):
        if node.op_type == "RotaryEmbedding":
            _turn_flat(model.graph, node)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _skip(node)
    RemoveUnusedNodesPass()(model)


def _turn_flat(graph: ir.Graph, rotary: ir.Node) -> None:
    """``Reshape(Transpose(Rotary(Transpose(x))))`` as ``Rotary(Reshape(x))``."""
    before, after = _producer(rotary.inputs[0]), _only_user(rotary)
    if not (_swaps(before) and _swaps(after)) or before is None or after is None:
        return
    flat, states = _only_user(after), before.inputs[0]
    if flat is None or flat.op_type != "Reshape" or states is None or not states.shape or not _merges(states, flat):
        return
    heads = int(str(states.shape[2]))
    reshaped = ir.node("Reshape", [states, flat.inputs[1]], name=f"{flat.name}_states")
    turned = ir.node(
        "RotaryEmbedding",
        [reshaped.outputs[0], *rotary.inputs[1:]],
        attributes={**{name: each.value for name, each in rotary.attributes.items()}, "num_heads": heads},
        name=rotary.name,
    )
    old = flat.outputs[0]
    for node in (reshaped, turned):
        node.outputs[0].type, node.outputs[0].shape = old.type, old.shape
        node.outputs[0].name = f"{node.name}_flat"
        node.metadata_props.update(rotary.metadata_props)
    graph.insert_before(flat, [reshaped, turned])
    ir.convenience.replace_all_uses_with(old, turned.outputs[0])


def _merges(states: ir.Value, flat: ir.Node) -> bool:
    """Whether a Reshape joins the last two of ``(batch, sequence, heads, head_dim)``."""
    shape = list(states.shape or ())
    made = list(flat.outputs[0].shape or ())
    fixed = len(shape) == 4 and len(made) == 3 and isinstance(shape[2], int) and isinstance(shape[3], int)
    return fixed and made == [shape[0], shape[1], shape[2] * shape[3]] and not flat.outputs[0].is_graph_output()


def _skip(reshape: ir.Node) -> None:
    """A value that was only reshaped back to the shape that it once had is that value."""
    output = reshape.outputs[0]
    if not output.shape or output.is_graph_output():
        return
    for earlier in _reshaped_from(reshape):
        if earlier.shape and list(earlier.shape) == list(output.shape):
            ir.convenience.replace_all_uses_with(output, earlier)
            return


def _reshaped_from(reshape: ir.Node) -> Iterator[ir.Value]:
    node: ir.Node | None = reshape
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        yield node.inputs[0]
        node = node.inputs[0].producer()


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _only_user(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _swaps(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].value) == _SWAP
