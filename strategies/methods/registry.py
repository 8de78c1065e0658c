"""From a plan's method to what does it, and the shape of its adapter before any weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import protocol.plan
from protocol.data_settings import DataSettings
from protocol.method_settings import LoraSettings
from protocol.plan import Plan
from protocol.training_settings import TrainingSettings
from strategies.base_model import Base, heads, skeleton
from strategies.methods import adalora, bitfit, bottleneck, experts, freezing, full, ia3, lora, prompts, xlora
from strategies.methods.method import Method, of_tensors

_LORA = Method(
    lora.attach,
    lora.load,
    lora.extract,
    lora.dense,
    lora.modules,
    lora.embeddings,
    begin=lora.begin,
    train_only=lora.train_only,
)
_FULL = Method(
    full.attach,
    full.load,
    full.extract,
    full.dense,
    full.modules,
    full.embeddings,
    begin=full.begin,
    metrics=full.metrics,
    trains_base=True,
)
_PROMPTS = of_tensors(prompts.attach, prompts.dense, prompts.load, begin=prompts.begin)
METHODS: Mapping[protocol.plan.Method, Method] = {
    "lora": _LORA,
    "qlora": _LORA,
    "adalora": Method(
        adalora.attach,
        adalora.load,
        adalora.extract,
        adalora.dense,
        adalora.modules,
        callbacks=adalora.callbacks,
        penalty=adalora.penalty,
        state=adalora.state,
        restore=adalora.restore,
    ),
    "full": _FULL,
    "freezing": replace(_FULL, attach=freezing.attach, callbacks=freezing.callbacks),
    "bitfit": of_tensors(bitfit.attach, bitfit.dense),
    "bottleneck": of_tensors(bottleneck.attach, bottleneck.dense),
    "experts": Method(experts.attach, experts.load, experts.extract, experts.dense, experts.modules),
    "ia3": of_tensors(ia3.attach, ia3.dense),
    "prompt-tuning": _PROMPTS,
    "prefix-tuning": _PROMPTS,
    "p-tuning-v2": _PROMPTS,
    "xlora": Method(xlora.attach, xlora.load, xlora.extract, xlora.dense, xlora.modules, begin=xlora.begin),
}


@dataclass(frozen=True)
class Shape:
    """What an adapter holds.

    Attributes:
        modules: ``(d_out, d_in)`` by module with factors.
        dense: Shape by tensor.
        embeddings: The modules that look their weight up by token.
        head: The tensors that are a head of the task's own.
    """

    modules: Mapping[str, tuple[int, int]]
    dense: Mapping[str, tuple[int, ...]]
    embeddings: tuple[str, ...]
    head: frozenset[str]


def method_of(plan: Plan) -> Method:
    """What carries out a plan's method."""
    return METHODS[plan.method]


def shape(base: Base, plan: Plan) -> Shape:
    """The shape of a plan's adapter on a base, from the configuration alone: no weight is read.

    Raises:
        ModelError: The plan names modules that the base has not.
    """
    lora = LoraSettings(r=1, target_modules=plan.lora.target_modules, modules_to_save=plan.lora.modules_to_save)
    # What does not matter for it is left out, so that plans that differ there alone share an answer.
    alike = plan.model_copy(
        update={
            "lora": lora.model_copy(update={"use_dora": plan.lora.use_dora}),
            "method": "lora" if plan.method == "qlora" else plan.method,
            "precision": "fp32",
            "data": DataSettings(labels=plan.data.labels, max_length=plan.data.max_length),
            "training": TrainingSettings(),
            "dropout": None,
        }
    )
    return _shape(base, alike.model_dump_json())


@lru_cache(maxsize=64)
def _shape(base: Base, written: str) -> Shape:
    import torch

    plan = Plan.model_validate_json(written)
    method = method_of(plan)
    with torch.device("meta"):
        empty = skeleton(base, plan.objective, plan.data.labels)
        roots = heads(empty, plan.objective)
        model = method.attach(empty, plan)
    dense = {name: tuple(tensor.shape) for name, tensor in method.dense(model).items()}
    head = frozenset(name for name in dense if name.partition(".")[0] in roots)
    return Shape(method.modules(model), dense, method.embeddings(model), head)
