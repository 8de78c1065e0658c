"""Bottleneck adapters: small residual networks between the layers of a frozen base, which PEFT does not have.

Each is ``h + up(f(down(h)))`` with ``down`` of shape ``(width / reduction_factor, width)`` and ``up`` back; ``up`` begins at
zero, so that an attached model computes what its base computes. ``houlsby`` places one after the attention and one after the
MLP of every layer (Houlsby et al. 2019, arXiv:1902.00751, figure 2), ``pfeiffer`` one after the MLP alone (Pfeiffer et al.
2021, arXiv:2005.00247), both before the residual sum.

They travel dense: beside the linear layer ``L`` that ends a sub-layer, ``L.bottleneck.down.weight`` of shape ``(m, d)``,
``L.bottleneck.down.bias``, ``(m,)``, ``L.bottleneck.up.weight``, ``(d, m)``, and ``L.bottleneck.up.bias``, ``(d,)``.
"""

from typing import TYPE_CHECKING, Any

from protocol.plan import Plan
from strategies.base_model import heads
from strategies.methods import dense_tensors, whole_modules
from strategies.methods.frozen_base import prepared
from strategies.methods.layers import ends, stack

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_NAME = "bottleneck"
_SPREAD = 0.02  # standard deviation of ``down`` at the start, the one that transformers draws linear layers with


def attach(model: "PreTrainedModel", plan: Plan) -> "PreTrainedModel":
    """Adds the networks and freezes all else but a classifier's head, in place. What trains is float32.

    Raises:
        ModelError: The base is not built of layers of one attention and one MLP.
    """
    import torch

    model = prepared(model, plan)
    model.requires_grad_(False)
    # A stream of its own: nodes whose bases drew more or less before, at another precision, must still begin alike.
    drawn = torch.Generator().manual_seed(torch.initial_seed())
    names = []
    for layer in stack(model):
        attention, mlp = ends(model, layer)
        for place in (attention, mlp) if plan.bottleneck.placement == "houlsby" else (mlp,):
            names += [f"{place}.{_NAME}.{name}" for name in _insert(model.get_submodule(place), model, plan, drawn)]
    names += whole_modules.beside(model, heads(model, plan.objective))
    dense_tensors.mark(model, {name: name for name in names})
    dense_tensors.ready_for_trainer(model)
    for parameter in dense(model).values():
        parameter.requires_grad_(True)
    return model


def dense(model: "PreTrainedModel") -> dict[str, Any]:
    """The networks' and the head's parameters."""
    return dense_tensors.marked(model)


def _insert(end: Any, model: "PreTrainedModel", plan: Plan, drawn: Any) -> list[str]:
    """Puts one network after a linear layer; returns the names of its parameters."""
    import torch

    width = model.config.get_text_config().hidden_size
    inside = max(1, width // plan.bottleneck.reduction_factor)
    down, up = torch.nn.Linear(width, inside, dtype=torch.float32), torch.nn.Linear(inside, width, dtype=torch.float32)
    function = getattr(torch.nn.functional, plan.bottleneck.activation)

    def after(module: Any, inputs: Any, output: "Tensor") -> "Tensor":  # noqa: ARG001
        network = getattr(module, _NAME)
        return output + network["up"](function(network["down"](output.float()))).to(output.dtype)

    with torch.no_grad():
        down.weight.copy_(_SPREAD * torch.randn(inside, width, generator=drawn, device="cpu"))
        for zero in (down.bias, up.weight, up.bias):
            zero.zero_()
    end.add_module(_NAME, torch.nn.ModuleDict({"down": down, "up": up}).to(end.weight.device))
    end.register_forward_hook(after)
    return [f"{name}.{kind}" for name in ("down", "up") for kind in ("weight", "bias")]
