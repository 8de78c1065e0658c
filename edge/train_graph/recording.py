"""The layers of a model as it calls them: which module, with what beside the hidden states, and which calls are of one kind.

A model is one long function only to look at: it makes hidden states and what all layers share (masks, angles), calls its layers
one after the other, and reads the last states. The calls are taken from a run of the model itself, so that no architecture is
known by name here.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Shared:
    """Stands in a call for one of the tensors that all layers share."""

    number: int


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        name: Of the module.
        module: The layer.
        args, kwargs: What it got; ``Shared`` for tensors, the hidden states (the first of ``args``) left out.
        kind: Equal for calls that one graph serves, with other weights.
    """

    name: str
    module: "Module"
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kind: str

    def shared(self) -> list[int]:
        """Numbers of the shared tensors that it got, in order and each once."""
        found: list[int] = []
        _each_leaf((self.args, self.kwargs), lambda leaf: found.append(leaf.number) if isinstance(leaf, Shared) else None)
        return sorted(set(found))

    def __call__(self, hidden: "Tensor", shared: "Mapping[int, Tensor]", parameters: "Mapping[str, Tensor]") -> "Tensor":
        """The layer on other states, shared tensors by number and parameters by their names in the layer."""
        from torch.func import functional_call

        args, kwargs = _each_leaf(
            (self.args, self.kwargs), lambda leaf: shared[leaf.number] if isinstance(leaf, Shared) else leaf
        )
        told = functional_call(self.module, dict(parameters), (hidden, *args), dict(kwargs))
        return told[0] if isinstance(told, tuple) else told


@dataclass
class Recording:
    """What layers were called with, while ``recorded`` holds.

    Attributes:
        hidden: States before the first layer.
        calls: In order.
        shared: Tensors that layers got, by number.
    """

    hidden: "Tensor | None"
    calls: list[Call]
    shared: "list[Tensor]"


def layers_of(model: "Module") -> dict[str, "Module"]:
    """The modules that a model runs one after the other, by name: the outermost list of modules.

    Raises:
        ModelError: It has none.
    """
    from torch.nn import ModuleList

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module)]
    if not lists:
        raise ModelError(f"{type(model).__name__}: has no list of layers; its adapters cannot be trained on devices")
    name, found = min(lists, key=lambda each: each[0].count("."))
    return {f"{name}.{number}": layer for number, layer in enumerate(found)}


@contextmanager
def recorded(layers: "Mapping[str, Module]") -> "Iterator[Recording]":
    """Within it layers give back the states that they get, and what else they get is written down."""
    recording = Recording(None, [], [])

    def recorder(name: str, module: "Module") -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _positional(args, kwargs)
            if recording.hidden is None:
                recording.hidden = args[0]
            rest = _each_leaf((args[1:], kwargs), lambda leaf: _number(recording.shared, leaf))
            recording.calls.append(Call(name, module, rest[0], rest[1], _kind(module, rest)))
            return args[0]

        return forward

    with _instead(layers.values(), {id(module): recorder(name, module) for name, module in layers.items()}):
        yield recording


@contextmanager
def giving(layers: "Mapping[str, Module]", states: "Tensor") -> Iterator[None]:
    """Within it every layer gives these states, whatever it gets."""
    with _instead(layers.values(), {id(module): lambda *_, **__: states for module in layers.values()}):
        yield


@contextmanager
def _instead(modules: "Any", forwards: Mapping[int, Any]) -> Iterator[None]:
    found = list(modules)
    for module in found:
        module.forward = forwards[id(module)]
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return args, kwargs
    return (kwargs[_HIDDEN],), {name: given for name, given in kwargs.items() if name != _HIDDEN}


def _number(shared: "list[Tensor]", leaf: Any) -> Any:
    import torch

    if not isinstance(leaf, torch.Tensor):
        return leaf
    for number, known in enumerate(shared):
        if known is leaf:
            return Shared(number)
    shared.append(leaf)
    return Shared(len(shared) - 1)


def _each_leaf(tree: Any, change: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _each_leaf(branch, change) for name, branch in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(_each_leaf(branch, change) for branch in tree)
    return change(tree)


def _kind(module: "Module", rest: Any) -> str:
    """Everything that two layers may differ in but for the numbers of their parameters and their place."""
    parts: list[Any] = [
        repr(_each_leaf(rest, lambda leaf: leaf if isinstance(leaf, Shared | int | float | str) else type(leaf)))
    ]
    for name, each in module.named_modules():
        plain = {
            key: value
            for key, value in vars(each).items()
            if isinstance(value, int | float | str | None | tuple) and key not in ("layer_idx", "layer_id", "training")
        }
        parts.append((name, type(each).__name__, sorted(plain.items(), key=lambda pair: pair[0])))
    parts += [(name, tuple(tensor.shape)) for name, tensor in module.named_parameters()]
    parts += [(name, tuple(tensor.shape), _digest(tensor)) for name, tensor in module.named_buffers()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _digest(tensor: "Tensor") -> str:
    return hashlib.sha256(tensor.detach().contiguous().cpu().float().numpy().tobytes()).hexdigest()
