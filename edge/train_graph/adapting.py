"""Low-rank factors beside the linear layers of a module while it is traced: ``y + (x A^T) B^T`` (arXiv:2106.09685, eq. 3)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def linear(module: "Module") -> dict[str, tuple[int, int]]:
    """``(d_in, d_out)`` of the linear layers in a module, by name in it."""
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, each in module.named_modules():
        if isinstance(each, Linear):
            found[name] = (int(each.in_features), int(each.out_features))
        elif isinstance(each, Conv1D):
            found[name] = (int(each.nx), int(each.nf))
    return found


@contextmanager
def adapted(module: "Module", factors: "Mapping[str, tuple[Tensor, Tensor]]") -> Iterator[None]:
    """Within it linear layers of a module add their factors, ``A`` ``(r, d_in)`` and ``B`` ``(d_out, r)``, the scaling in B.

    All of them multiply first and add their bias then: torch's operator for both at once takes a trace's sizes for constants.
    """
    layers = {name: module.get_submodule(name) for name in linear(module)}
    for name, layer in layers.items():
        layer.forward = _forward(layer, factors.get(name))
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def _forward(layer: Any, factors: "tuple[Tensor, Tensor] | None") -> Any:
    from torch.nn import Linear
    from torch.nn.functional import linear as multiplied

    def forward(x: "Tensor") -> "Tensor":
        y = multiplied(x, layer.weight if isinstance(layer, Linear) else layer.weight.t())
        if layer.bias is not None:
            y = y + layer.bias
        if factors is None:
            return y
        a, b = factors
        return y + multiplied(multiplied(x, a), b)

    return forward


def ranks(count: int, taken: "set[int]") -> list[int]:
    """A number for each rank of an example that no other size of it has: primes, which no width is made of alone."""
    found: list[int] = []
    candidate = 11
    while len(found) < count:
        if all(candidate % each for each in range(2, int(candidate**0.5) + 1)) and candidate not in taken:
            found.append(candidate)
        candidate += 2
    return found
