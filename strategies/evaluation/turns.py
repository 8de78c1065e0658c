"""One base and several adapters, one after the other: one model is in memory, and the base is read once where it can be."""

from collections.abc import Iterator, Mapping
from typing import Any

from protocol.adapter import Adapter
from protocol.plan import LOW_RANK, Plan
from strategies.adapted import attached, with_adapter
from strategies.base_model import Base

# PEFT takes these off a base and leaves it as it was. Others change the base itself, or PEFT wraps all of it.
_COME_OFF = (*LOW_RANK, "ia3")


def each(contestants: Mapping[str, tuple[Plan, Adapter | None]], base: Base) -> Iterator[tuple[str, Plan, Any, Any]]:
    """Name, plan, model in evaluation mode and tokenizer of each contestant in turn; a model is gone when the next one comes.

    Args:
        contestants: By name, the plan to use an adapter with and the adapter, None for the base as it is. The plans differ in
            their method alone. Of a quantised base, what is not quantised becomes float32 with the first adapter and stays so:
            the base as it is goes first.
        base: The frozen base.

    Raises:
        AdapterError: An adapter does not fit the base.
    """
    bare = tokenizer = None
    for who, (plan, adapter) in contestants.items():
        if bare is None:
            bare, tokenizer = with_adapter(plan, base, None)
        model: Any = bare if adapter is None else attached(bare, plan, adapter)
        bare = None
        yield who, plan, model, tokenizer
        if adapter is None or not (adapter.factors or adapter.dense):
            bare = model
        elif plan.method in _COME_OFF:
            bare = model.unload()
        del model
