"""A classifier's head that starts from the names of its labels instead of from noise.

The base already places "transfer money" near sentences that ask for it. Let ``z_c`` be what the head's last layer sees when
the base reads the name of label c, and ``mu`` their mean. Row c starts as ``2 (z_c - mu) / |z_c - mu|`` and its bias as
``-row . mu``, so that logits measure the direction from the middle of all labels. In a federation this gives every label a
place before anyone has trained it, also at nodes that will never see one of its rows.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NORM = 2.0  # rows long enough for confident logits from the start; chosen on CLINC150's validation rows (benchmarks/LOG.md)


def start(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", labels: Sequence[str]) -> None:
    """Sets the last layer's rows, and its bias where it has one, in place.

    Args:
        model: In evaluation mode, with a head of ``len(labels)`` rows.
        tokenizer: Of the same base.
        labels: Names, in the order of the rows; underscores are read as spaces.

    Raises:
        ModelError: The model has no linear layer with a row per label.
    """
    import torch
    from torch.nn.functional import normalize

    tensors = last_layer({name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, len(labels))
    if not tensors:
        raise ModelError(f"head.init label-names: the model has no layer with {len(labels)} rows; use head.init: random")
    layer: Any = model.get_submodule(min(tensors).rpartition(".")[0])
    texts = tokenizer([label.replace("_", " ") for label in labels], padding=True, return_tensors="pt").to(model.device)
    seen: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**texts)
        handle.remove()
        features = seen[0].float()
        if features.ndim == 3:  # a decoder's head reads every token; the last one before the padding stands for the text
            last = texts["attention_mask"].cumsum(1).argmax(1)
            features = features[torch.arange(len(labels)), last]
        centre = features.mean(0)
        rows = _NORM * normalize(features - centre, dim=1)
        layer.weight.copy_(rows)
        if layer.bias is not None:
            layer.bias.copy_(-rows @ centre)


def last_layer(shapes: Mapping[str, tuple[int, ...]], rows: int) -> set[str]:
    """Names of the tensors of a head's last layer: those with a row per label. A head may have hidden layers before it.

    Args:
        shapes: Shape by tensor name, in the model's order.
        rows: How many labels.
    """
    modules = [name.rpartition(".")[0] for name, shape in shapes.items() if shape and shape[0] == rows]
    return {name for name, shape in shapes.items() if modules and name.rpartition(".")[0] == modules[-1] and shape[0] == rows}
