"""An adapter's dense tensors and a model's parameters: checked and copied in, taken out as float32 arrays."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from protocol.adapter import Array
from protocol.errors import AdapterError

_MARK = "fedge_trained_tensors"


def mark(model: Any, names: Mapping[str, str]) -> None:
    """Notes on a model which of its parameters (values) an adapter holds under which name (keys)."""
    setattr(model, _MARK, dict(names))


def ready_for_trainer(model: Any) -> None:
    """Lets a trainer train what was marked beside a frozen base without PEFT, and leave that base out of its checkpoints."""
    model._keys_to_ignore_on_save = model.state_dict().keys() - set(getattr(model, _MARK).values())  # noqa: SLF001
    # A trainer asks a quantised model whether PEFT has attached something to it that can train.
    model.is_quantized = False


def marked(model: Any) -> dict[str, Any]:
    """The parameters that were marked, by the name that an adapter's ``dense`` gives them."""
    return {name: model.get_parameter(own) for name, own in getattr(model, _MARK).items()}


def check_names(kind: str, found: Iterable[str], known: Collection[str]) -> None:
    """Refuses an adapter of another model.

    Args:
        kind: What they are names of: ``modules`` or ``tensors``.
        found: In the adapter.
        known: In the model.

    Raises:
        AdapterError: Some are not in the model.
    """
    if unknown := sorted(name for name in found if name not in known):
        raise AdapterError(f"{len(unknown)} {kind} are not in this model (the first is {unknown[0]}); is it of this base?")


def put(parameters: Mapping[str, Any], dense: Mapping[str, Array]) -> None:
    """Copies arrays into parameters of the same names, in place.

    Raises:
        AdapterError: A name or a shape does not fit.
    """
    import torch

    check_names("tensors", dense, parameters)
    with torch.no_grad():
        for name, tensor in dense.items():
            if tensor.shape != tuple(parameters[name].shape):
                raise AdapterError(f"{name}: found shape {tensor.shape}, expected {tuple(parameters[name].shape)}")
            parameters[name].copy_(torch.from_numpy(np.array(tensor)))


def taken(parameters: Mapping[str, Any]) -> dict[str, Array]:
    """The parameters as arrays of their own."""
    return {name: array(tensor) for name, tensor in parameters.items()}


def array(tensor: Any) -> Array:
    """A tensor as a float32 array of its own."""
    made: Array = tensor.detach().float().cpu().numpy().copy()
    return made
