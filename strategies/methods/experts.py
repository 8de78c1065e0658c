"""Experts: the packed experts of a mixture change by low-rank products through PEFT, and the routers before them train whole.

In a sparse layer (Fedus et al. 2021, arXiv:2101.03961; Jiang et al. 2024, arXiv:2401.04088) a router sends each token to few
of ``E`` experts. transformers holds their weights packed, ``(E, d_out, d_in)`` a parameter, which LoRA on linear layers does
not reach; PEFT adapts such a parameter as a whole. Here each expert's change is a pair of factors of its own,
``MODULE.PARAMETER.NUMBER``, so that a server merges what was learnt expert by expert. Routers, ``(E, width)``, are small and
travel dense. All of an expert's weights train with method ``freezing`` and ``freezing.train: [experts]``.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import Plan
from protocol.product_space import split
from strategies.base_model import heads
from strategies.methods import dense_tensors, float32, whole_modules
from strategies.methods.dense_tensors import array, check_names, put, taken
from strategies.methods.frozen_base import prepared
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_ORIGINAL = "fedge_without_frozen_directions"


def attach(model: "PreTrainedModel", plan: Plan) -> Any:
    """Adds factors whose products are zero to every packed expert and lets routers train, as the plan says; all else is frozen.

    Raises:
        ModelError: The base has no experts, or what routes to them cannot be told.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    model, settings = prepared(model, plan), plan.lora
    model.requires_grad_(False)
    packed, head = _packed(model), heads(model, plan.objective)
    whole = [*head, *(_routers(model, packed) if plan.experts.train != "experts" else ())]
    if plan.experts.train == "router":
        return _whole_alone(model, whole)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        target_modules=[],
        target_parameters=packed,
        modules_to_save=[*whole] or None,
        task_type=TaskType(plan.task_type),
    )
    made = get_peft_model(model, config)
    for module in whole:
        float32.whole(made.get_submodule(f"{_PREFIX}{module}.modules_to_save.default"))
    for layer in _layers(made).values():
        layer.lora_A.float()
        layer.lora_B.float()
    return made


def load(model: Any, adapter: Adapter, *, fresh: bool = False) -> None:
    """Puts an adapter of any rank in place; what it has beyond the rank that trains is added to the frozen experts.

    Args:
        model: From ``attach``.
        adapter: Of the same base; in place of the one that was loaded before.
        fresh: All of its directions stay frozen.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    import torch

    layers = _layers(model)
    there = {f"{name}.{number}": (layer, number) for name, layer in layers.items() for number in range(layer.num_experts)}
    check_names("modules", adapter.factors, there)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.zero_()
            if (original := getattr(layer, _ORIGINAL, None)) is not None:
                layer.get_param().copy_(original)
        for name, pair in adapter.factors.items():
            layer, number = there[name]
            a, b = _pair(layer, number)
            if pair.shape != (b.shape[0], a.shape[1]):
                raise AdapterError(f"{name}: found shape {pair.shape}, expected {(b.shape[0], a.shape[1])}")
            own, rest = split(pair, 0 if fresh else a.shape[0])
            a[: own.r] = torch.from_numpy(np.array(own.A)).to(a)
            b[:, : own.r] = torch.from_numpy(np.array(own.B) * (own.scaling / layer.scaling["default"])).to(b)
            if rest.r:
                _freeze(layer, number, rest)
    put(dense(model), adapter.dense)


def extract(model: Any, begun: Begun = NOTHING) -> Adapter:  # noqa: ARG001 - it begins with no part of the base
    """A pair of factors for each expert's every matrix, and the routers."""
    factors = {}
    for name, layer in _layers(model).items():
        for number in range(layer.num_experts):
            a, b = _pair(layer, number)
            factors[f"{name}.{number}"] = Factors(A=array(a), B=array(b), scaling=float(layer.scaling["default"]))
    return Adapter(factors, taken(dense(model)))


def dense(model: Any) -> dict[str, Any]:
    """Routers, by their names in the base, and a classifier's head."""
    return whole_modules.tensors(model) if _layers(model) else dense_tensors.marked(model)


def modules(model: Any) -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` of each expert's matrices."""
    return {
        f"{name}.{number}": (layer.lora_B["default"].out_features, layer.lora_A["default"].in_features)
        for name, layer in _layers(model).items()
        for number in range(layer.num_experts)
    }


def _packed(model: "PreTrainedModel") -> list[str]:
    found = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if not found:
        raise ModelError(f"{model.config.model_type}: this base has no experts; choose method lora, or a base with experts")
    return found


def _routers(model: "PreTrainedModel", packed: list[str]) -> list[str]:
    """The module beside each layer's experts whose weight has a row for each of them."""
    found = []
    for experts in dict.fromkeys(name.rpartition(".")[0] for name in packed):
        parent, _, own = experts.rpartition(".")
        count = next(model.get_submodule(experts).parameters()).shape[0]
        beside = [
            f"{parent}.{name.rpartition('.')[0]}"
            for name, parameter in model.get_submodule(parent).named_parameters()
            if not name.startswith(f"{own}.") and name.endswith(".weight") and len(parameter) == count
        ]
        if len(beside) != 1:
            raise ModelError(
                f"{model.config.model_type}: {len(beside)} modules beside {experts} have a row for each of {count} experts, "
                "expected the router alone; write experts.train: experts"
            )
        found += beside
    return found


def _whole_alone(model: "PreTrainedModel", modules: list[str]) -> "PreTrainedModel":
    """Routers and a head without factors: nothing for PEFT to do."""
    dense_tensors.mark(model, {name: name for name in whole_modules.beside(model, modules)})
    dense_tensors.ready_for_trainer(model)
    return model


def _layers(model: Any) -> dict[str, Any]:
    """PEFT's layers by the name of the packed parameter that they adapt; two on one module wrap each other."""
    from peft.tuners.lora.layer import ParamWrapper

    return {
        f"{name.removeprefix(_PREFIX).removesuffix('.base_layer')}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def _pair(layer: Any, number: int) -> "tuple[Tensor, Tensor]":
    """One expert's A, ``(r, d_in)``, and B, ``(d_out, r)``, as views: PEFT packs A expert by expert, B rank by rank."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    count = layer.num_experts
    return a.view(count, -1, a.shape[1])[number], b.view(b.shape[0], -1, count)[:, :, number]


def _freeze(layer: Any, number: int, rest: Factors) -> None:
    """Adds directions to one expert's frozen matrix; what it was is kept, for the next adapter."""
    import torch

    weight = layer.get_param()
    if getattr(layer, _ORIGINAL, None) is None:
        setattr(layer, _ORIGINAL, weight.detach().clone())
    change = torch.from_numpy(rest.scaling * (np.array(rest.B) @ np.array(rest.A))).to(weight)
    weight[number] += change if layer._did_swap_in_out_features else change.T  # noqa: SLF001 - who else knows which way it lies
