"""LoRA and QLoRA through PEFT: attach to a base, begin or load an adapter of another rank, take out what was trained.

A module's change is ``scaling * B @ A`` of shape ``(d_out, d_in)`` for every kind of layer. A Conv1D (GPT-2) holds its weight
as ``(d_in, d_out)`` and an embedding as ``(d_in, d_out)`` with one row per token, so their weights change by the transpose.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from protocol.adapter import Adapter, Array, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import QUANTISED, Plan
from protocol.product_space import split, stack
from strategies.base_model import Base, heads, original_weight
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_KEPT = "modules_to_save.default"
_FROZEN = "fedge_frozen_directions"


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds trainable factors whose product is zero, and trainable copies of the head and of ``modules_to_save``.

    A is random and B zero (PEFT's start; of an embedding A is zero and B random), whatever the plan's own start: that is for
    a training to begin with (``begin``).

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
    settings = plan.lora
    _check_targets(model, settings.target_modules)
    head = heads(model, plan.objective)
    whole = [*head, *_saved(model, settings.modules_to_save, head)]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_dropout=settings.lora_dropout,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
        target_modules=settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules),
        exclude_modules=_inside(whole),
        modules_to_save=whole or None,
        task_type=TaskType(plan.task_type),
    )
    try:
        made: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"lora.target_modules: {error}") from None
    _keep_whole_modules_in_fp32(made, head)
    return made


def begin(model: "PeftModel", plan: Plan, base: Base) -> Begun:
    """Puts the plan's start into the factors where it is a part of the base, and returns that part: it is no change.

    - ``pissa`` (Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4): the leading directions of the weight ``W`` itself. The paper
      trains ``W - s B_0 A_0 + s B A`` on a changed base; here the base stays as published, and a frozen term ``-s B_0 A_0``
      is added to the layer's output. ``pissa_niter_16`` finds them by a randomised SVD with so many power iterations.
    - ``loftq`` (Li et al. 2023, arXiv:2310.08659, algorithm 1 with one step): the leading directions of what quantisation lost,
      ``W - Q``. Where the base is not quantised nothing was lost.

    Embeddings, and whatever else has no such part, stay as ``attach`` left them.

    Args:
        model: From ``attach``, with nothing loaded into it.
        plan: The one that it was attached with.
        base: Holds the weights before quantisation.

    Returns:
        ``s B_0 A_0`` by module, to be handed to ``extract``.
    """
    from peft.utils.integrations import get_bnb_param_type

    start = plan.lora.init_lora_weights
    if start in ("default", "gaussian"):
        return {}
    begun = {}
    for module, layer in _layers(model).items():
        if _is_embedding(layer) or (start == "loftq" and not get_bnb_param_type(layer.get_base_layer().weight)):
            continue
        whole = _weight(layer)
        if start == "loftq":
            whole = original_weight(base, f"{module}.weight", model.get_base_model().base_model_prefix).to(whole) - whole
        begun[module] = _fill(layer, whole, 16 if start == "pissa_niter_16" else 0)
        if start != "loftq":
            _freeze(layer, replace(begun[module], scaling=-begun[module].scaling))
    return begun


def load(model: "PeftModel", adapter: Adapter, *, fresh: bool = False) -> None:
    """Puts an adapter of any rank into a model whose factors have rank ``r``.

    The adapter's leading directions fill the trainable ones. If it has fewer than ``r``, the others keep PEFT's fresh start (A
    uniform, B zero), which adds nothing to the product and leaves room to learn. If it has more, those beyond ``r`` are
    added to the layer's output and stay frozen: a node of small rank trains little of the global adapter but sees all of
    it, so that what it changes is right for the model that everyone gets.

    Args:
        model: From ``attach``.
        adapter: Of the same base.
        fresh: All of the adapter's directions stay frozen, and the trainable factors keep their fresh start.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    import torch

    layers, tensors = _layers(model), dense(model)
    for kind, found, known in (("modules", adapter.factors, layers), ("tensors", adapter.dense, tensors)):
        if unknown := sorted(found.keys() - known.keys()):
            raise AdapterError(f"{len(unknown)} {kind} are not in this model (the first is {unknown[0]}); is it of this base?")
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            a, b = _pair(layers[module])
            if pair.shape != (b.shape[0], a.shape[1]):
                raise AdapterError(f"{module}: found shape {pair.shape}, expected {(b.shape[0], a.shape[1])}")
            own, rest = split(pair, 0 if fresh else a.shape[0])
            a[: own.r] = torch.from_numpy(np.array(own.A)).to(a)
            b[:, : own.r] = torch.from_numpy(np.array(own.B) * (own.scaling / layers[module].scaling["default"])).to(b)
            _freeze(layers[module], rest)
        for name, tensor in adapter.dense.items():
            if tensor.shape != tuple(tensors[name].shape):
                raise AdapterError(f"{name}: found shape {tensor.shape}, expected {tuple(tensors[name].shape)}")
            tensors[name].copy_(torch.from_numpy(np.array(tensor)).to(tensors[name]))


def train_only(model: "PeftModel", factor: Literal["both", "A", "B"]) -> None:
    """Freezes the other factor of every module (FFA-LoRA, RoLoRA); dense tensors train all the same."""
    for layer in _layers(model).values():
        for name, parameter in zip("AB", _pair(layer), strict=True):
            parameter.requires_grad_(factor in ("both", name))


def extract(model: "PeftModel", begun: Begun = NOTHING) -> Adapter:
    """What was trained, as float32 numpy arrays; the scaling stays beside the factors.

    Args:
        model: After training.
        begun: What ``begin`` returned. It is taken away exactly: ``[B, -B_0] [A; A_0]``, of twice the rank.
    """
    factors = {}
    for module, layer in _layers(model).items():
        a, b = _pair(layer)
        trained = Factors(A=_numpy(a), B=_numpy(b), scaling=float(layer.scaling["default"]))
        factors[module] = beside((1.0, trained), (-1.0, begun[module])) if module in begun else trained
    return Adapter(factors, {name: _numpy(tensor) for name, tensor in dense(model).items()})


def beside(*terms: tuple[float, Factors]) -> Factors:
    """A weighted sum of products as one pair of float32 factors, scaling 1, of the sum of their ranks."""
    left, right = stack(terms)
    return Factors(A=right.astype(np.float32), B=left.astype(np.float32))


def dense(model: "PeftModel") -> dict[str, Any]:
    """Parameters of modules that train whole, under the name that PEFT's files give them."""
    return {
        name.removeprefix(_PREFIX).replace(f".{_KEPT}", ""): tensor
        for name, tensor in model.named_parameters()
        if _KEPT in name
    }


def modules(model: "PeftModel") -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by adapted module."""
    pairs = {module: _pair(layer) for module, layer in _layers(model).items()}
    return {module: (b.shape[0], a.shape[1]) for module, (a, b) in pairs.items()}


def embeddings(model: "PeftModel") -> tuple[str, ...]:
    """The adapted modules that look their weight up by token."""
    return tuple(sorted(module for module, layer in _layers(model).items() if _is_embedding(layer)))


def _layers(model: "PeftModel") -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix(_PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _pair(layer: Any) -> tuple[Any, Any]:
    """A, ``(r, d_in)``, and B, ``(d_out, r)``, as parameters."""
    if _is_embedding(layer):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _is_embedding(layer: Any) -> bool:
    return "default" in layer.lora_embedding_A


def _weight(layer: Any) -> Any:
    """The base's weight as it is held, ``(d_out, d_in)`` in float32."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return weight.T if layer.fan_in_fan_out else weight


def _fill(layer: Any, whole: Any, power_iterations: int) -> Factors:
    """Puts the leading directions of a weight into a layer's factors, balanced; by a randomised SVD where iterations are given.

    A weight may have fewer directions than the rank: the others stay random.
    """
    import torch

    a, b = _pair(layer)
    rank, scaling = min(a.shape[0], *whole.shape), float(layer.scaling["default"])
    if power_iterations:
        u, s, v = torch.svd_lowrank(whole, rank, niter=power_iterations)
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    with torch.no_grad():
        a[:rank] = (root[:, None] * vt[:rank]).to(a)
        b[:, :rank] = (u[:, :rank] * root).to(b)
    return Factors(A=_numpy(a), B=_numpy(b), scaling=scaling)


def _freeze(layer: Any, rest: Factors) -> None:
    """Adds frozen directions to a layer's output, in place of those that an earlier call added."""
    if handle := getattr(layer, _FROZEN, None):
        handle.remove()
    setattr(layer, _FROZEN, layer.register_forward_hook(_adding(layer, rest)) if rest.r else None)


def _adding(layer: Any, pair: Factors) -> Any:
    import torch
    from torch.nn.functional import embedding

    like = _pair(layer)[0]
    a = torch.from_numpy(np.array(pair.A)).to(like)
    b = torch.from_numpy(np.array(pair.B) * pair.scaling).to(like)
    if not _is_embedding(layer):
        return lambda module, inputs, output: output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)
    # Some bases scale what they look up (Gemma); PEFT scales the trainable directions likewise.
    scale = getattr(layer.get_base_layer(), "embed_scale", 1.0)
    return lambda module, inputs, output: output + (embedding(inputs[0], a.T) @ b.T * scale).to(output.dtype)


def _check_targets(model: "PreTrainedModel", targets: Literal["all-linear"] | tuple[str, ...]) -> None:
    """PEFT is content when one of the names is found; here each must name a layer."""
    wanted = () if isinstance(targets, str) else targets
    names = [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    if missing := [target for target in wanted if not any(_ends(name, target) for name in names)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ModelError(f"lora.target_modules: no layer of the base is named {', '.join(missing)}; there are {there}")


def _saved(model: "PreTrainedModel", wanted: tuple[str, ...], head: list[str]) -> list[str]:
    """Whole names of the modules that train whole beside the head."""
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    if missing := [target for target in wanted if not any(_ends(name, target) for name in names)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()}))
        raise ModelError(f"lora.modules_to_save: no module of the base is named {', '.join(missing)}; there are {there}")
    found = [name for name in names if any(_ends(name, target) for target in wanted)]
    if twice := [name for name in found if name.partition(".")[0] in head]:
        raise ModelError(f"lora.modules_to_save: {', '.join(twice)} is of the head, which trains whole anyway; leave it out")
    return found


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _inside(modules: list[str]) -> str | None:
    """A regular expression for modules and all within them: what trains whole needs no factors."""
    return rf"({'|'.join(re.escape(module) for module in modules)})(\..*)?" if modules else None


def _keep_whole_modules_in_fp32(model: "PeftModel", head: list[str]) -> None:
    """In bfloat16 or float16 small updates would be lost; PEFT keeps only the factors in float32.

    What follows an embedding or a norm is held as the base is; after the head comes the loss, which wants float32.
    """
    for name, module in model.named_modules():
        if not name.endswith(_KEPT):
            continue
        held = next(module.parameters()).dtype
        module.float()
        module.register_forward_pre_hook(
            lambda module, inputs: tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
        )
        if name.removeprefix(_PREFIX).partition(".")[0] not in head:
            module.register_forward_hook(lambda module, inputs, output, held=held: output.to(held))


def _numpy(tensor: Any) -> Array:
    array: Array = tensor.detach().float().cpu().numpy().copy()
    return array
