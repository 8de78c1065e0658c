"""The graph of one kind of layer: forward, and backward through a forward that is computed again.

Only a layer's input is kept between them (Chen et al. 2016, arXiv:1604.06174), and its weights are inputs: one graph, of which
each way is a part, serves any number of layers.
"""

from typing import TYPE_CHECKING, Any

from edge.train_graph.adapting import adapted, linear, ranks
from edge.train_graph.recording import Call
from edge.train_graph.traced import graph

if TYPE_CHECKING:
    from onnx_ir import Model
    from torch import Tensor

# Of the example; no weight has such a size.
BATCH, SEQUENCE = 3, 7


def layer_graph(call: Call, hidden: "Tensor", shared: "list[Tensor]", free: "list[tuple[str | None, ...]]") -> "Model":
    """``x``, ``dy``, ``shared.{number}``, ``weight.{name}``, ``lora.{module}.A|B`` to ``y``, ``dx`` and ``grad.{module}.A|B``.

    All names are those within the layer.

    Args:
        call: Of the layer, as it was recorded with ``BATCH`` rows of ``SEQUENCE`` tokens.
        hidden: The states that went into it, for their form.
        shared: All shared tensors of the recording.
        free: Of each, which of its sizes is the ``batch`` and which the ``sequence``.

    Raises:
        ModelError: It cannot be traced.
    """
    import torch
    from torch.func import vjp

    weights = dict(call.module.named_parameters())
    modules = linear(call.module)
    numbers = call.shared()

    def forward(x: Any, given: list[Any], held: list[Any], factors: list[Any]) -> Any:
        pairs = dict(zip(modules, zip(factors[::2], factors[1::2], strict=True), strict=True))
        with adapted(call.module, pairs):
            return call(x, dict(zip(numbers, given, strict=True)), dict(zip(weights, held, strict=True)))

    def both(x: Any, dy: Any, given: list[Any], held: list[Any], factors: list[Any]) -> Any:
        y, pulled = vjp(lambda x_, factors_: forward(x_, given, held, factors_), x, factors)
        dx, gradients = pulled(dy)
        return (y, dx, *gradients)

    sizes = {size for tensor in (*weights.values(), *shared, hidden) for size in tensor.shape}
    used = ranks(len(modules), sizes)
    factors = [
        torch.randn(shape) for (d_in, d_out), r in zip(modules.values(), used, strict=True) for shape in ((r, d_in), (d_out, r))
    ]
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=1)
    named = {"batch": batch, "sequence": sequence}
    rows = {0: batch, 1: sequence}
    given = [shared[number] for number in numbers]
    given_free = [{at: named[what] for at, what in enumerate(free[number]) if what} for number in numbers]
    held = [weight.detach() for weight in weights.values()]
    rank = [torch.export.Dim(f"r{number}", min=1) for number in range(len(modules))]
    factors_free = [{at: each} for each in rank for at in (0, 1)]
    names = [f"shared.{number}" for number in numbers] + [f"weight.{name}" for name in weights]
    names += [f"lora.{module}.{side}" for module in modules for side in "AB"]
    return graph(
        f"{type(call.module).__name__} {call.name}",
        both,
        (torch.randn(hidden.shape), torch.randn(hidden.shape), given, held, factors),
        (rows, rows, given_free, [None] * len(held), factors_free),
        ["x", "dy", *names],
        ["y", "dx", *(f"grad.{module}.{side}" for module in modules for side in "AB")],
    )
