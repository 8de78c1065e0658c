"""What a model computes before its first layer: states, masks and angles of token ids, over the embedding's rows in use."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edge.linear_layers import parameter_names
from edge.tracing import HELD, reason, takes_token_types
from edge.train_graph.layer import BATCH, SEQUENCE
from edge.train_graph.recording import recorded
from edge.train_graph.traced import as_onnx, folded, program
from protocol.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel


def front(
    model: "PreTrainedModel", layers: "Mapping[str, Module]", wanted: Sequence[int], masked: bool, longest: int
) -> ir.Model:
    """``tokens``, ``input_ids``, ``attention_mask`` and ``weight.{name}`` to ``x`` and ``shared.{number}``.

    The embedding's weight holds only the rows that a batch needs, and ``tokens`` says which of them; ``input_ids`` are for
    models that look at padding themselves.

    Args:
        model: In evaluation mode, with attention of plain operators.
        layers: Of ``recording.layers_of``.
        wanted: Numbers of the shared tensors that any layer reads.
        masked: Whether rows are padded with a mask, as an encoder's are; a decoder's are padded behind what it can see.
        longest: Most tokens of a row: tables of positions end somewhere, and a trace heeds that.

    Raises:
        ModelError: It cannot be traced.
    """
    import torch

    embedding = model.get_input_embeddings()
    looked_up = embedding.forward

    class Front(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            setattr(self, HELD, model)

        def forward(self, tokens: Any, input_ids: Any, *mask: Any) -> Any:
            embedding.forward = lambda _: looked_up(tokens)
            try:
                with recorded(layers) as recording:
                    called(model, input_ids, mask[0] if mask else None)
            finally:
                del embedding.forward
            return (recording.hidden, *(recording.shared[number] for number in wanted))

    ids = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    rows = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    example = (ids, ids.clone(), *([ragged(ids)] if masked else []))
    names = ["tokens", "input_ids", "attention_mask"][: len(example)]
    try:
        exported = program(Front().eval(), example, (rows, rows, (rows,)) if masked else (rows, rows))
        made = as_onnx(exported, names, ["x", *(f"shared.{number}" for number in wanted)])
    except Exception as error:  # whatever a model's code or the exporter itself raises
        raise ModelError(f"{type(model).__name__}: what comes before its layers cannot be traced: {reason(error)}") from error
    parameter_names(made.model)
    _weights_as_inputs(made.model, model, embedding)
    return folded(made)


def called(model: "PreTrainedModel", input_ids: "Tensor", mask: "Tensor | None") -> Any:
    """A call as training makes it: one text a row, no cache; gives what the model gives."""
    import torch

    if mask is None:
        return model(input_ids=input_ids, use_cache=False)
    more = {"token_type_ids": torch.zeros_like(input_ids)} if takes_token_types(model) else {}
    return model(input_ids=input_ids, attention_mask=mask, **more)


def ragged(ids: "Tensor") -> "Tensor":
    """A mask that hides something: of one that hides nothing some models make none."""
    import torch

    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return mask


def canonical(model: "PreTrainedModel") -> dict[str, str]:
    """The first name of a parameter by each of its names: of a tied head that of the embedding."""
    first: dict[int, str] = {}
    for name, tensor in model.named_parameters():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}


def _weights_as_inputs(graph: ir.Model, model: "PreTrainedModel", embedding: "Module") -> None:
    names = canonical(model)
    for name, value in list(graph.graph.initializers.items()):
        if name not in names or not value.uses():
            continue
        del graph.graph.initializers[name]
        value.name, value.const_value = f"weight.{names[name]}", None
        if value.shape is not None and any(model.get_parameter(name) is held for held in embedding.parameters()):
            value.shape = ir.Shape(["words", *value.shape[1:]])
        graph.graph.inputs.append(value)
