"""A PyTorch function, differentiated or not, as an ONNX graph of plain operators."""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from edge.linear_layers import drop_unused
from edge.tracing import quiet, reason
from protocol.errors import ModelError

if TYPE_CHECKING:
    from onnx_ir import Graph, Model
    from torch.onnx import ONNXProgram

OPSET = 21  # the first whose numbers may have 4 bits; what is traced here needs nothing newer


def differentiated(function: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    """A function that calls ``torch.func`` as a graph of torch's operators without any mutation.

    Args:
        function: Of tensors and lists of them.
        example: Every size that is free has a number of its own in it: the trace takes equal ones for the same.
    """
    import torch
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    table = torch.export.default_decompositions()
    # The derivative of some activations fills what it made empty, for which the exporter has no operator.
    table[torch.ops.aten.empty_like.default] = lambda x, **_: torch.zeros_like(x)
    pure = functionalize(function, remove="mutations")
    with quiet():
        return make_fx(pure, decomposition_table=table, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*example)


def program(function: Callable[..., Any], example: tuple[Any, ...], free: tuple[Any, ...]) -> Any:
    """A function (or a module) as an exported program; ``free`` names the sizes that are not those of the example."""
    import torch

    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.traced = function

        def forward(self, *given: Any) -> Any:
            return self.traced(*given)

    module = function if isinstance(function, torch.nn.Module) and not hasattr(function, "graph") else Traced()
    with quiet(), torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=(free,) if module is not function else free, strict=False)


def as_onnx(exported: Any, inputs: Sequence[str], outputs: Sequence[str]) -> "ONNXProgram":
    """An exported program as a graph in which nothing is folded yet."""
    import torch

    with quiet(), torch.no_grad():
        made = torch.onnx.export(
            exported,
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    if made is None:
        raise ModelError("the exporter gave no graph")
    return made


def folded(made: "ONNXProgram") -> "Model":
    """The graph with constants folded, and without inputs that nothing reads."""
    with quiet():
        made.optimize()
    model: Model = made.model
    _drop_unread(model.graph)
    return model


def flattened(what: str, function: Callable[..., Any], example: tuple[Any, ...], free: tuple[Any, ...]) -> Any:
    """A function as torch's operators alone, to be differentiated: a model's code may look at its inputs only now.

    Raises:
        ModelError: It cannot be traced.
    """
    try:
        exported = program(function, example, free).run_decompositions({})
        made = exported.module(check_guards=False)
    except Exception as error:  # whatever a model's code or the exporter itself raises
        raise ModelError(f"{what} cannot be made a training graph: {reason(error)}") from error
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


def graph(
    what: str,
    function: Callable[..., Any],
    example: tuple[Any, ...],
    free: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> "Model":
    """The whole way for a function that differentiates.

    Args:
        what: It is, for errors.
        function: Of tensors and lists of them.
        example: Its arguments.
        free: Sizes by argument, as of ``torch.export``.
        inputs: Names, in the order of the flattened arguments.
        outputs: Names.

    Raises:
        ModelError: It cannot be traced.
    """
    try:
        return folded(as_onnx(program(differentiated(function, example), example, free), inputs, outputs))
    except ModelError:
        raise
    except Exception as error:  # whatever a model's code or the exporter itself raises
        raise ModelError(f"{what} cannot be made a training graph: {reason(error)}") from error


def leading_to(model: "Model", outputs: Collection[str]) -> "Model":
    """What of a graph leads to some of its outputs: onnxruntime itself would compute all of it."""
    made = model.clone()
    graph = made.graph
    kept = [value for value in graph.outputs if value.name in outputs]
    graph.outputs.clear()
    graph.outputs.extend(kept)
    drop_unused(graph)
    _drop_unread(graph)
    return made


def _drop_unread(graph: "Graph") -> None:
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
