"""AdaLoRA through PEFT (Zhang et al. 2023, arXiv:2303.10512): ranks go where they matter while the factors train.

A module's change is ``P diag(E) Q`` (eq. 3). It begins with ``init_r`` directions in every module; while it trains, the least
important over all modules are switched off until ``lora.r`` a module are left in the mean (algorithm 1, eq. 11). The pull
towards orthogonal ``P`` and ``Q`` (eq. 4) is added to every objective's gradient: PEFT adds it to the loss that the model
computes, which TRL's trainers do not read.

What travels is plain LoRA, ``B = P`` and ``A = diag(E) Q`` without the directions that are off, of rank at most ``init_r``. A
global adapter is put in as its SVD, which is what ``P``, ``E`` and ``Q`` stand for, and each round shares ranks out anew.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from protocol.adapter import Adapter, Factors
from protocol.errors import AdapterError
from protocol.plan import Plan
from protocol.product_space import compress, split
from strategies.methods import lora
from strategies.methods.dense_tensors import array, check_names, put, taken
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_LOADED = "fedge_loaded_directions"
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
_UNKNOWN = 2**31  # steps: how many there are is known when training begins


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds factors with ``E`` zero, and trainable copies of the head and of ``modules_to_save``.

    Raises:
        ModelError: The base has none of the modules that the plan names, or one is no linear layer.
    """
    from peft import AdaLoraConfig

    return lora.wrapped(
        model,
        plan,
        AdaLoraConfig,
        target_r=plan.lora.r,
        init_r=plan.update_rank,
        deltaT=plan.adalora.delta_t,
        total_step=_UNKNOWN,
        orth_reg_weight=0.0,  # ``penalty`` adds it
    )


def callbacks(model: "PeftModel", plan: Plan, done: int) -> list[Any]:  # noqa: ARG001 - each round shares out anew
    """The trainer callback that shares ranks out after every optimizer step, over the steps that there really are.

    The last reallocation comes at least one step before the end, so that the budget is reached, and at least two after the
    beginning: importance is learnt from gradients, and in the first step those of P and Q are zero. A training of one or two
    steps keeps the ranks that it began with.
    """
    from transformers import TrainerCallback

    config, settings = model.peft_config["default"], plan.adalora

    class Allocate(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            config.total_step = steps = state.max_steps
            config.tfinal = max(1, min(round(settings.tfinal_ratio * steps), steps - 2))
            config.tinit = min(int(settings.tinit_ratio * steps), max(0, steps - config.tfinal - 1))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.max_steps > 2:
                model.base_model.update_and_allocate(state.global_step)

    return [Allocate()]


def penalty(plan: Plan) -> Callable[[Any], Any]:
    """The mean over all P and Q of how far they are from orthogonal, in the Frobenius norm, times its weight, as in PEFT."""
    import torch

    def apart(model: Any) -> Any:
        named = list(model.named_parameters())
        grams = [q @ q.T for name, q in named if name.endswith(".lora_A.default")]
        grams += [p.T @ p for name, p in named if name.endswith(".lora_B.default")]
        distances = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return plan.adalora.orth_reg_weight * torch.stack(distances).mean()

    return apart


def load(model: "PeftModel", adapter: Adapter, *, fresh: bool = False) -> None:
    """Puts an adapter of any rank into a model whose modules have ``init_r`` directions.

    The leading directions train, as their SVD; those beyond are added to the layer's output and stay frozen.

    Args:
        model: From ``attach``.
        adapter: Of the same base.
        fresh: All of the adapter's directions stay frozen.

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    import torch

    there, tensors = lora.layers(model), dense(model)
    check_names("modules", adapter.factors, there)
    check_names("tensors", adapter.dense, tensors)
    for module, pair in adapter.factors.items():
        layer = there[module]
        p, e, q = _triplet(layer)
        if pair.shape != (p.shape[0], q.shape[1]):
            raise AdapterError(f"{module}: found shape {pair.shape}, expected {(p.shape[0], q.shape[1])}")
        own, rest = split(pair, 0 if fresh else len(e))
        found = compress([(1.0, own)], own.shape, own.r)
        values = found.singular_values[: found.factors.r]
        root = np.sqrt(values)
        with torch.no_grad():
            e.zero_()
            e[: len(values), 0] = torch.from_numpy(values / _unit(layer)).to(e)
            q[: len(values)] = torch.from_numpy(found.factors.A / root[:, None]).to(q)
            p[:, : len(values)] = torch.from_numpy(found.factors.B / root).to(p)
        lora.freeze(layer, rest)
        setattr(layer, _LOADED, own.r)
    put(tensors, adapter.dense)


def extract(model: "PeftModel", begun: Begun = NOTHING) -> Adapter:  # noqa: ARG001
    """What was trained, as plain LoRA factors.

    A module has as many directions as are on; but no fewer than were loaded into it, the others zero: who counts its change
    from those must not take one that was switched off for one that was not trained.
    """
    factors = {module: _factors(layer) for module, layer in lora.layers(model).items()}
    return Adapter(factors, taken(dense(model)))


def dense(model: "PeftModel") -> dict[str, Any]:
    """Parameters of modules that train whole."""
    return lora.dense(model)


def modules(model: "PeftModel") -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` by adapted module."""
    return lora.modules(model)


def state(model: "PeftModel") -> dict[str, Any]:
    """How important each number has been so far, and which directions are off."""
    allocator = model.base_model.rankallocator
    pattern = model.peft_config["default"].rank_pattern
    return {"scores": {name: dict(getattr(allocator, name)) for name in _SCORES}, "rank_pattern": pattern}


def restore(model: "PeftModel", state: Mapping[str, Any]) -> None:
    """Puts ``state()`` back."""
    allocator = model.base_model.rankallocator
    for name in _SCORES:
        held = {key: score.to(model.device) for key, score in state["scores"][name].items()}
        setattr(allocator, name, held)
    model.peft_config["default"].rank_pattern = state["rank_pattern"]


def _factors(layer: Any) -> Factors:
    p, e, q = (array(half) for half in _triplet(layer))
    on = np.flatnonzero(e)
    r = max(1, len(on), getattr(layer, _LOADED, 0))
    a, b = np.zeros((r, q.shape[1]), np.float32), np.zeros((p.shape[0], r), np.float32)
    a[: len(on)], b[:, : len(on)] = e[on] * q[on], p[:, on]
    return Factors(a, b, scaling=_unit(layer))


def _triplet(layer: Any) -> tuple[Any, Any, Any]:
    """P, ``(d_out, r)``, E, ``(r, 1)``, and Q, ``(r, d_in)``: PEFT's ``lora_B``, ``lora_E`` and ``lora_A``."""
    return layer.lora_B["default"], layer.lora_E["default"], layer.lora_A["default"]


def _unit(layer: Any) -> float:
    """What PEFT multiplies ``P diag(E) Q`` by."""
    return float(layer.scaling["default"]) / (float(layer.ranknum["default"].detach()) + 1e-5)
