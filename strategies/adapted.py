"""A base with an adapter in place, for use."""

from typing import TYPE_CHECKING

from protocol.adapter import Adapter
from protocol.plan import QUANTISED, Plan
from strategies.base_model import Base, load
from strategies.methods.registry import method_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def with_adapter(plan: Plan, base: Base, adapter: Adapter | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The base at the plan's precision, with an adapter of any rank, ready for inference.

    Raises:
        AdapterError: The adapter does not fit the base.
    """
    import torch
    from transformers import set_seed

    set_seed(plan.training.seed)  # a head that nobody trained yet is the one that training would start from
    model, tokenizer = load(base, plan)
    if torch.cuda.is_available() and plan.precision not in QUANTISED:  # a quantised base is there already
        model.to("cuda")
    return model if adapter is None else attached(model, plan, adapter), tokenizer


def attached(model: "PreTrainedModel", plan: Plan, adapter: Adapter) -> "PreTrainedModel":
    """A loaded base with an adapter of any rank in place, ready for inference; the base itself where there is nothing in it.

    Raises:
        AdapterError: The adapter does not fit the base.
    """
    if not (adapter.factors or adapter.dense):
        return model
    rank = max(adapter.ranks().values(), default=1) or 1
    # A prefix is used as it is, without the network that it was trained through.
    use = "p-tuning-v2" if plan.method == "prefix-tuning" else plan.method
    plan = plan.model_copy(update={"lora": plan.lora.with_rank(rank), "method": use})
    method = method_of(plan)
    model = method.attach(model, plan)
    method.load(model, adapter)
    model.eval()
    return model
