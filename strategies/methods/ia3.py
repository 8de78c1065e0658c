"""IA3 through PEFT (Liu et al. 2022, arXiv:2205.05638, section 3.3): one trained factor per number that a layer passes on.

Keys and values are scaled as they leave their layer, ``l * (W x)`` with ``l`` of shape ``(d_out, 1)``; the inside of the MLP as
it enters the layer that leads out, ``W (l * x)`` with ``l`` of shape ``(1, d_in)``. All begin at one. A fused layer (GPT-2's
``c_attn``) is scaled whole, its queries too.
"""

from typing import TYPE_CHECKING, Any

from protocol.errors import ModelError
from protocol.plan import Plan
from strategies.base_model import heads
from strategies.methods import targets, whole_modules
from strategies.methods.frozen_base import prepared

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_SCALE = ".ia3_l.default"


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Adds factors of one, and a trainable copy of the head.

    Raises:
        ModelError: The base has none of the modules that the plan names, or PEFT does not know which it should take.
    """
    from peft import IA3Config, TaskType, get_peft_model

    model = prepared(model, plan)
    head = heads(model, plan.objective)
    named = plan.ia3.target_modules
    targets.check(model, named or (), "ia3.target_modules")
    config = IA3Config(
        target_modules=list(named) if named else None,
        feedforward_modules=list(plan.ia3.feedforward_modules) if named else None,
        exclude_modules=whole_modules.inside(head),
        modules_to_save=head or None,
        task_type=TaskType(plan.task_type),
    )
    try:
        made: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ModelError(f"ia3.target_modules: {error}; name layers of this base there") from None
    whole_modules.keep_in_fp32(made, head)
    return made


def dense(model: "PeftModel") -> dict[str, Any]:
    """Factors and head, under the name that PEFT's files give them."""
    start = whole_modules.prefix(model)
    scales = {
        name.removeprefix(start).replace(_SCALE, ".ia3_l"): tensor
        for name, tensor in model.named_parameters()
        if name.endswith(_SCALE)
    }
    return scales | whole_modules.tensors(model)
