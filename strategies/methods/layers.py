"""Where a transformer's layers are, found by structure: architectures agree on it more than on names.

A model holds its layers in one list as long as its configuration says. In a layer the attention is the part named so that
holds linear layers, and a sub-layer ends with its last linear layer that is as wide as what passes between layers: after it
comes the residual sum (Llama's ``o_proj`` and ``down_proj``, GPT-2's two ``c_proj``, BERT's two ``output.dense``).
"""

from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = ("attention", "attn")


def stack(model: "PreTrainedModel") -> list[str]:
    """Names of the layers' modules, from the input to the output.

    Raises:
        ModelError: There is no such list, or more than one (an encoder with a decoder).
    """
    from torch.nn import ModuleList

    count = _text(model).num_hidden_layers
    found: list[str] = []
    for name, module in model.named_modules():
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, ModuleList) and len(module) == count and outermost:
            found.append(name)
    if len(found) != 1:
        raise ModelError(
            f"{model.config.model_type}: found {len(found)} lists of {count} layers in this base, expected 1; use method lora"
        )
    return [f"{found[0]}.{number}" for number in range(count)]


def ends(model: "PreTrainedModel", layer: str) -> tuple[str, str]:
    """The linear layers of one layer after which its attention and its MLP are added to what passes, by name.

    Raises:
        ModelError: The layer is built otherwise: no attention or several, an MLP of experts.
    """
    from transformers.pytorch_utils import Conv1D

    width = _text(model).hidden_size
    parts: dict[bool, list[str]] = {True: [], False: []}
    attentions = set()
    for child, module in model.get_submodule(layer).named_children():
        attends = any(word in child.lower() or word in type(module).__name__.lower() for word in _ATTENTION)
        for name, inner in module.named_modules():
            if _d_out(inner, Conv1D) is None:
                continue
            if attends:
                attentions.add(child)
            if _d_out(inner, Conv1D) == width:
                parts[attends].append(".".join(part for part in (layer, child, name) if part))
    packed = any(parameter.ndim > 2 for parameter in model.get_submodule(layer).parameters())
    if len(attentions) != 1 or packed or not parts[True] or not parts[False]:
        kind = type(model.get_submodule(layer)).__name__
        raise ModelError(
            f"{model.config.model_type}: a layer of this base ({kind}) is not one attention and one MLP of linear layers, "
            "after which a bottleneck could be placed; use method lora"
        )
    return parts[True][-1], parts[False][-1]


def _d_out(module: Any, conv1d: Any) -> int | None:
    """Outputs of a linear layer, quantised or not; None for anything else."""
    from torch.nn import Linear

    if isinstance(module, Linear):  # bitsandbytes' are subclasses
        return int(module.out_features)
    return int(module.nf) if isinstance(module, conv1d) else None


def _text(model: "PreTrainedModel") -> Any:
    return model.config.get_text_config()
