"""LoRA and QLoRA through PEFT: attach to a base, begin or load an adapter of another rank, take out what was trained.

A module's change is ``scaling * B @ A`` of shape ``(d_out, d_in)`` for every kind of layer. A Conv1D (GPT-2) holds its weight
as ``(d_in, d_out)`` and an embedding as ``(d_in, d_out)`` with one row per token, so their weights change by the transpose.

DoRA (Liu et al. 2024, arXiv:2402.09353, eq. 5) gives every row of the changed weight a length of its own that trains:
``m * (W + s B A) / |W + s B A|``, ``m`` of shape ``(d_out,)``. The lengths travel dense, as ``MODULE.lora_magnitude_vector``.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError, ModelError
from protocol.plan import Plan
from protocol.product_space import split, stack
from strategies.base_model import Base, heads, original_weight
from strategies.methods import targets, whole_modules
from strategies.methods.dense_tensors import array, check_names, put, taken
from strategies.methods.frozen_base import prepared
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_FROZEN = "fedge_frozen_directions"
_LENGTHS = "lora_magnitude_vector"


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds trainable factors whose product is zero, and trainable copies of the head and of ``modules_to_save``.

    A is random and B zero (PEFT's start; of an embedding A is zero and B random), whatever the plan's own start: that is for
    a training to begin with (``begin``).

    Raises:
        ModelError: The base has none of the modules that the plan names.
    """
    from peft import LoraConfig

    settings = plan.lora
    made = wrapped(
        model,
        plan,
        LoraConfig,
        r=settings.r,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern=dict(settings.alpha_pattern),
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
    )
    for layer in layers(made).values():
        if _is_dora(layer):
            _set_lengths(layer)  # PEFT's have been rounded to what a 16-bit base is held in, and would change it
            _keep_scales(layer.get_base_layer())
    return made


def wrapped(model: "PreTrainedModel", plan: Plan, kind: Any, **more: Any) -> "PeftModel":
    """The base in PEFT's model, with trainable copies of the head and of ``modules_to_save``.

    Args:
        model: The base.
        plan: Says which modules are adapted and which train whole.
        kind: ``peft.LoraConfig`` or a subclass.
        more: Its other arguments.

    Raises:
        ModelError: The base has none of the modules that the plan names, or PEFT cannot adapt one of them.
    """
    from peft import TaskType, get_peft_model

    model = prepared(model, plan)
    settings = plan.lora
    targets.check(model, () if isinstance(settings.target_modules, str) else settings.target_modules, "lora.target_modules")
    head = heads(model, plan.objective)
    whole = [*head, *_saved(model, settings.modules_to_save, head)]
    config = kind(
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules if isinstance(settings.target_modules, str) else list(settings.target_modules),
        exclude_modules=whole_modules.inside(whole),
        modules_to_save=whole or None,
        task_type=TaskType(plan.task_type),
        **more,
    )
    try:
        made: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"lora.target_modules: {error}") from None
    whole_modules.keep_in_fp32(made, head)
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
    for module, layer in layers(model).items():
        if _is_embedding(layer) or (start == "loftq" and not get_bnb_param_type(layer.get_base_layer().weight)):
            continue
        whole = _weight(layer)
        if start == "loftq":
            whole = original_weight(base, f"{module}.weight", model.get_base_model().base_model_prefix).to(whole) - whole
        begun[module] = _fill(layer, whole, 16 if start == "pissa_niter_16" else 0)
        if start != "loftq":
            freeze(layer, replace(begun[module], scaling=-begun[module].scaling))
        elif _is_dora(layer):
            _set_lengths(layer, begun[module])
    return begun


def load(model: "PeftModel", adapter: Adapter, *, fresh: bool = False) -> None:
    """Puts an adapter of any rank into a model whose factors have rank ``r``.

    The adapter's leading directions fill the trainable ones. If it has fewer than ``r``, the others keep PEFT's fresh start (A
    uniform, B zero), which adds nothing to the product and leaves room to learn. If it has more, those beyond ``r`` are
    added to the layer's output and stay frozen: a node of small rank trains little of the global adapter but sees all of
    it, so that what it changes is right for the model that everyone gets. Lengths (DoRA) that the adapter does not hold are
    those of the weights that its factors make: a plain LoRA adapter then answers here as it does anywhere.

    Args:
        model: From ``attach``.
        adapter: Of the same base.
        fresh: All of the adapter's directions stay frozen, and the trainable factors keep their fresh start.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    import torch

    there, tensors = layers(model), dense(model)
    check_names("modules", adapter.factors, there)
    check_names("tensors", adapter.dense, tensors)
    with torch.no_grad():
        for module, pair in adapter.factors.items():
            a, b = _pair(there[module])
            if pair.shape != (b.shape[0], a.shape[1]):
                raise AdapterError(f"{module}: found shape {pair.shape}, expected {(b.shape[0], a.shape[1])}")
            own, rest = split(pair, 0 if fresh else a.shape[0])
            a[: own.r] = torch.from_numpy(np.array(own.A)).to(a)
            b[:, : own.r] = torch.from_numpy(np.array(own.B) * (own.scaling / there[module].scaling["default"])).to(b)
            freeze(there[module], rest)
            if _is_dora(there[module]):
                _set_lengths(there[module], pair)
    put(tensors, adapter.dense)


def train_only(model: "PeftModel", factor: Literal["both", "A", "B"]) -> None:
    """Freezes the other factor of every module (FFA-LoRA, RoLoRA); dense tensors train all the same."""
    for layer in layers(model).values():
        for name, parameter in zip("AB", _pair(layer), strict=True):
            parameter.requires_grad_(factor in ("both", name))


def extract(model: "PeftModel", begun: Begun = NOTHING) -> Adapter:
    """What was trained, as float32 numpy arrays; the scaling stays beside the factors.

    Args:
        model: After training.
        begun: What ``begin`` returned. It is taken away exactly: ``[B, -B_0] [A; A_0]``, of twice the rank.
    """
    factors = {}
    for module, layer in layers(model).items():
        a, b = _pair(layer)
        trained = Factors(A=array(a), B=array(b), scaling=float(layer.scaling["default"]))
        factors[module] = beside((1.0, trained), (-1.0, begun[module])) if module in begun else trained
    return Adapter(factors, taken(dense(model)))


def beside(*terms: tuple[float, Factors]) -> Factors:
    """A weighted sum of products as one pair of float32 factors, scaling 1, of the sum of their ranks."""
    left, right = stack(terms)
    return Factors(A=right.astype(np.float32), B=left.astype(np.float32))


def dense(model: "PeftModel") -> dict[str, Any]:
    """Parameters of modules that train whole, and lengths (DoRA), under the name that PEFT's files give them."""
    lengths = {
        f"{module}.{_LENGTHS}": layer.lora_magnitude_vector["default"].weight
        for module, layer in layers(model).items()
        if _is_dora(layer)
    }
    return lengths | whole_modules.tensors(model)


def modules(model: "PeftModel") -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by adapted module."""
    pairs = {module: _pair(layer) for module, layer in layers(model).items()}
    return {module: (b.shape[0], a.shape[1]) for module, (a, b) in pairs.items()}


def embeddings(model: "PeftModel") -> tuple[str, ...]:
    """The adapted modules that look their weight up by token."""
    return tuple(sorted(module for module, layer in layers(model).items() if _is_embedding(layer)))


def layers(model: "PeftModel") -> dict[str, Any]:
    """PEFT's layers, by the name of the module that they adapt."""
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix(_PREFIX): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _pair(layer: Any) -> tuple[Any, Any]:
    """A, ``(r, d_in)``, and B, ``(d_out, r)``, as parameters."""
    if _is_embedding(layer):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return getattr(a, "weight", a), getattr(b, "weight", b)  # AdaLoRA's are bare


def _is_embedding(layer: Any) -> bool:
    return "default" in layer.lora_embedding_A


def _is_dora(layer: Any) -> bool:
    return "default" in layer.lora_magnitude_vector


def _weight(layer: Any) -> Any:
    """The base's weight as it is held, ``(d_out, d_in)`` in float32."""
    from peft.utils.integrations import dequantize_module_weight

    weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return weight.T if _is_embedding(layer) or layer.fan_in_fan_out else weight


def _set_lengths(layer: Any, pair: Factors | None = None) -> None:
    """Makes the rows of a changed weight as long as they are without DoRA, so that only their directions have changed."""
    import torch

    whole = _weight(layer)
    if pair:
        b, a = (torch.from_numpy(np.array(half)).to(whole) for half in (pair.B, pair.A))
        whole = whole + pair.scaling * (b @ a)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.norm(whole, dim=1))


def _keep_scales(base_layer: Any) -> None:
    """On a CPU, PEFT makes an int8 weight anew when it reads it, without the scales that bitsandbytes has put aside."""
    from peft.utils.integrations import get_bnb_param_type

    def put_back(module: Any, inputs: Any) -> None:  # noqa: ARG001
        if module.weight.SCB is None:
            module.weight.SCB = module.state.SCB

    if get_bnb_param_type(base_layer.weight) == "8bit":
        base_layer.register_forward_pre_hook(put_back)


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
    return Factors(A=array(a), B=array(b), scaling=scaling)


def freeze(layer: Any, rest: Factors) -> None:
    """Adds frozen directions to a layer's output, in place of those that an earlier call added."""
    if handle := getattr(layer, _FROZEN, None):
        handle.remove()
    setattr(layer, _FROZEN, _adding(layer, rest) if rest.r else None)


def _adding(layer: Any, pair: Factors) -> Any:
    """The hook that adds them; DoRA must see them as it measures the weight's rows, so there they join the trainable ones."""
    import torch
    from torch.nn.functional import embedding

    like = _pair(layer)[0]
    a = torch.from_numpy(np.array(pair.A)).to(like)
    b = torch.from_numpy(np.array(pair.B) * pair.scaling).to(like)
    if _is_dora(layer):
        return _joining(layer, a, b / layer.scaling["default"])
    # Some bases scale what they look up (Gemma); PEFT scales the trainable directions likewise.
    scale = getattr(layer.get_base_layer(), "embed_scale", 1.0)

    def add(module: Any, inputs: Any, output: Any) -> Any:
        if module.disable_adapters:  # without its adapter the model is the base, frozen directions or not
            return output
        if _is_embedding(module):
            return output + (embedding(inputs[0], a.T) @ b.T * scale).to(output.dtype)
        return output + (inputs[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return layer.register_forward_hook(add)


def _joining(layer: Any, a: Any, b: Any) -> Any:
    """The hook that hands PEFT's DoRA ``[A; a]`` and ``[B, b]`` in place of A and B."""
    import torch

    class Stacked:
        """As much of a linear layer as DoRA asks for."""

        def __init__(self, weight: Any) -> None:
            self.weight = weight

        def __call__(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight)

    def join(module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
        if _is_embedding(layer):  # there PEFT hands over the transposes
            joined = {"lora_A": torch.cat([named["lora_A"], a.T], 1), "lora_B": torch.cat([named["lora_B"], b.T])}
        else:
            joined = {
                "lora_A": Stacked(torch.cat([named["lora_A"].weight, a])),
                "lora_B": Stacked(torch.cat([named["lora_B"].weight, b], 1)),
            }
        return inputs, {**named, **joined}

    return layer.lora_magnitude_vector["default"].register_forward_pre_hook(join, with_kwargs=True)


def _saved(model: "PreTrainedModel", wanted: tuple[str, ...], head: list[str]) -> list[str]:
    """Whole names of the modules that train whole beside the head."""
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    if missing := [target for target in wanted if not any(targets.ends(name, target) for name in names)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names if not name[-1].isdigit()}))
        raise ModelError(f"lora.modules_to_save: no module of the base is named {', '.join(missing)}; there are {there}")
    found = [name for name in names if any(targets.ends(name, target) for target in wanted)]
    if twice := [name for name in found if name.partition(".")[0] in head]:
        raise ModelError(f"lora.modules_to_save: {', '.join(twice)} is of the head, which trains whole anyway; leave it out")
    return found
