"""LoRA and QLoRA through PEFT: attach to a base, load an adapter of another rank, take out what was trained."""

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import QUANTISED, Plan
from protocol.product_space import split
from strategies.base_model import Base, check_objective, configuration

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_KEPT = "modules_to_save.default"
_FROZEN = "fedge_frozen_directions"
Shapes = tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds trainable factors (A uniform, B zero: PEFT's start) and, for classification, a trainable copy of the head.

    Raises:
        ModelError: The base has none of the modules that the plan names.
    """
    from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
    from torch.nn import Dropout

    if plan.dropout is not None:
        for module in model.modules():
            if isinstance(module, Dropout):
                module.p = plan.dropout
    if plan.precision in QUANTISED:
        checkpointing = plan.training.gradient_checkpointing
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    targets = plan.lora.target_modules
    config = LoraConfig(
        r=plan.lora.r,
        lora_alpha=plan.lora.lora_alpha,
        lora_dropout=plan.lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.CAUSAL_LM if plan.objective == "sft" else TaskType.SEQ_CLS,
    )
    _check_targets(model, targets)
    try:
        made: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"lora.target_modules: {error}") from None
    _keep_head_in_fp32(made)
    return made


def load(model: "PeftModel", adapter: Adapter) -> None:
    """Puts an adapter of any rank into a model whose factors have rank ``r``.

    The adapter's leading directions fill the trainable ones. If it has fewer than ``r``, the others keep PEFT's fresh start (A
    uniform, B zero), which adds nothing to the product and leaves room to learn. If it has more, those beyond ``r`` are
    added to the layer's output and stay frozen: a node of small rank trains little of the global adapter but sees all of
    it, so that what it changes is right for the model that everyone gets.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    import torch

    layers, dense = _layers(model), _dense(model)
    for kind, found, known in (("modules", adapter.factors, layers), ("tensors", adapter.dense, dense)):
        if unknown := sorted(found.keys() - known.keys()):
            raise AdapterError(f"{len(unknown)} {kind} are not in this model (the first is {unknown[0]}); is it of this base?")
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            a, b = layers[module].lora_A["default"].weight, layers[module].lora_B["default"].weight
            if pair.shape != (b.shape[0], a.shape[1]):
                raise AdapterError(f"{module}: found shape {pair.shape}, expected {(b.shape[0], a.shape[1])}")
            own, rest = split(pair, a.shape[0])
            a[: own.r] = torch.from_numpy(np.array(own.A)).to(a)
            b[:, : own.r] = torch.from_numpy(np.array(own.B) * (own.scaling / layers[module].scaling["default"])).to(b)
            _freeze(layers[module], rest, a)
        for name, tensor in adapter.dense.items():
            if tensor.shape != tuple(dense[name].shape):
                raise AdapterError(f"{name}: found shape {tensor.shape}, expected {tuple(dense[name].shape)}")
            dense[name].copy_(torch.from_numpy(np.array(tensor)).to(dense[name]))


def extract(model: "PeftModel") -> Adapter:
    """What was trained, as float32 numpy arrays; the scaling stays beside the factors."""
    factors = {
        module: Factors(
            A=_numpy(layer.lora_A["default"].weight),
            B=_numpy(layer.lora_B["default"].weight),
            scaling=float(layer.scaling["default"]),
        )
        for module, layer in _layers(model).items()
    }
    return Adapter(factors, {name: _numpy(tensor) for name, tensor in _dense(model).items()})


def shapes(base: Base, plan: Plan) -> Shapes:
    """``(d_out, d_in)`` by module and shape by dense tensor, from the configuration alone: no weight is read."""
    found: Shapes = _shapes(base, plan.objective, plan.data.labels, plan.lora.target_modules)
    return found


@lru_cache(maxsize=32)
def _shapes(base: Base, objective: Any, labels: Any, targets: Any) -> Shapes:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    check_objective(base, objective)
    config = configuration(base)
    kind: Any = AutoModelForCausalLM
    if objective == "classification":
        kind, config.num_labels = AutoModelForSequenceClassification, len(labels)
    plan = Plan.model_validate({"objective": objective, "lora": {"r": 1, "target_modules": targets}})
    try:
        with torch.device("meta"):
            empty = kind.from_config(config)
    except (ValueError, TypeError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{base.folder / 'config.json'}: no {objective} model can be built from it ({error})") from None
    with torch.device("meta"):
        model = attach(empty, plan)
    modules = {
        module: (layer.lora_B["default"].weight.shape[0], layer.lora_A["default"].weight.shape[1])
        for module, layer in _layers(model).items()
    }
    return modules, {name: tuple(tensor.shape) for name, tensor in _dense(model).items()}


def _freeze(layer: Any, rest: Factors, like: Any) -> None:
    """Adds frozen directions to a layer's output, in place of those that an earlier call added."""
    if handle := getattr(layer, _FROZEN, None):
        handle.remove()
    setattr(layer, _FROZEN, layer.register_forward_hook(_adding(rest, like)) if rest.r else None)


def _check_targets(model: "PreTrainedModel", targets: Literal["all-linear"] | tuple[str, ...]) -> None:
    """PEFT is content when one of the names is found; here each must name a linear layer."""
    from torch.nn import Embedding

    names = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, Embedding)
    ]
    wanted = () if isinstance(targets, str) else targets
    if missing := [t for t in wanted if not any(name == t or name.endswith(f".{t}") for name in names)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ModelError(f"lora.target_modules: no linear layer of the base is named {', '.join(missing)}; there are {there}")


def _keep_head_in_fp32(model: "PeftModel") -> None:
    """A head in bfloat16 or float16 would lose small updates; PEFT keeps only the factors in float32."""
    for name, module in model.named_modules():
        if name.endswith(_KEPT):
            module.float()
            module.register_forward_pre_hook(lambda module, inputs: tuple(tensor.float() for tensor in inputs))


def _adding(pair: Factors, like: Any) -> Any:
    import torch

    a = torch.from_numpy(np.array(pair.A)).to(like)
    b = torch.from_numpy(np.array(pair.B) * pair.scaling).to(like)

    def add(module: Any, inputs: Any, output: Any) -> Any:  # noqa: ARG001
        return output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return add


def _layers(model: "PeftModel") -> dict[str, Any]:
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if getattr(module, "lora_A", None) is not None and "default" in module.lora_A
    }


def _dense(model: "PeftModel") -> dict[str, Any]:
    """Trainable copies of whole modules, under the name that PEFT's files give them."""
    return {
        name.removeprefix(_PREFIX).replace(f".{_KEPT}", ""): tensor
        for name, tensor in model.named_parameters()
        if _KEPT in name
    }


def _numpy(tensor: Any) -> Array:
    array: Array = tensor.detach().float().cpu().numpy().copy()
    return array
