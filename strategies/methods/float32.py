"""Keeps what trains in float32 inside a base that is held in fewer bits: in 16 bits small updates would be lost."""

from typing import Any


def whole(module: Any) -> None:
    """A module in float32 that takes what a 16-bit base gives it: a head, after which comes the loss, which wants float32."""
    module.float()
    module.register_forward_pre_hook(
        lambda module, inputs: tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
    )


def one(module: Any, name: str) -> str:
    """One parameter of a module in float32, while the module goes on to compute with it in the type that it had.

    Returns:
        The parameter's name in the module from now on: a parameter that already was float32 keeps its own.
    """
    import torch
    from torch.nn.utils.parametrize import register_parametrization

    held = getattr(module, name).dtype
    if held == torch.float32:
        return name

    class Narrowed(torch.nn.Module):  # type: ignore[misc]
        def forward(self, wide: Any) -> Any:
            return wide.to(held)

    register_parametrization(module, name, Narrowed(), unsafe=True)  # it changes the type
    original = module.parametrizations[name].original
    original.data = original.data.float()
    return f"parametrizations.{name}.original"
