"""BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): every bias of the base trains, and a classifier's head; nothing else.

They travel dense, under their own names. A base may have no biases at all (Llama has none): what is added to it then begins at
zero, so that the model computes what it did.
"""

from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from protocol.plan import Plan
from strategies.base_model import heads
from strategies.methods import dense_tensors, float32, whole_modules
from strategies.methods.frozen_base import prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: "PreTrainedModel", plan: Plan) -> "PreTrainedModel":
    """Freezes all but the biases and the head, in place. They are float32, and compute in the base's own type.

    Raises:
        ModelError: The base has no bias, and none are to be added.
    """
    model = prepared(model, plan)
    model.requires_grad_(False)
    head = heads(model, plan.objective)
    if plan.bitfit.add_missing:
        _add_missing(model, head)
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias") and name.partition(".")[0] not in head]
    if not biases:
        raise ModelError(
            f"{model.config.model_type}: this base has no biases to train; write bitfit.add_missing: true (linear layers get "
            "one that begins at zero), or choose method lora"
        )
    names = {}
    for bias in biases:
        module, _, name = bias.rpartition(".")
        held = float32.one(model.get_submodule(module), name)
        names[bias] = f"{module}.{held}" if module else held
    names |= {name: name for name in whole_modules.beside(model, head)}
    dense_tensors.mark(model, names)
    dense_tensors.ready_for_trainer(model)
    for parameter in dense(model).values():
        parameter.requires_grad_(True)
    return model


def dense(model: "PreTrainedModel") -> dict[str, Any]:
    """Biases and the head's parameters, by their names in the base."""
    return dense_tensors.marked(model)


def _add_missing(model: "PreTrainedModel", head: list[str]) -> None:
    """Every linear layer but the output layer gets a bias, as ``all-linear`` adapts every one but that."""
    import torch

    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        inside = name.partition(".")[0] not in head and module is not output
        if inside and isinstance(module, torch.nn.Linear) and module.bias is None:
            module.bias = torch.nn.Parameter(torch.zeros_like(module.weight[:, 0]))
