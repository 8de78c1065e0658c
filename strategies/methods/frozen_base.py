"""Gets a base ready to be trained beside, not in: dropout as planned, and a quantised one as PEFT wants it."""

from typing import TYPE_CHECKING

from protocol.plan import QUANTISED, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepared(model: "PreTrainedModel", plan: Plan) -> "PreTrainedModel":
    """The same model, in place. On a quantised base everything is frozen and what is not quantised becomes float32."""
    from peft import prepare_model_for_kbit_training
    from torch.nn import Dropout

    if plan.dropout is not None:
        for module in model.modules():
            if isinstance(module, Dropout):
                module.p = plan.dropout
    if plan.precision in QUANTISED:
        checkpointing = plan.training.gradient_checkpointing
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    return model
