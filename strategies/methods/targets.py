"""Which layers of a base a plan's names mean; a name that means none is a mistake, and PEFT is content with one that does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from protocol.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(model: "PreTrainedModel", targets: Sequence[str], key: str) -> None:
    """Holds names against the layers with a weight of two dimensions.

    Args:
        model: The base.
        targets: Whole names, or the ends of them.
        key: Where the plan names them.

    Raises:
        ModelError: One of them names no layer.
    """
    names = [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    if missing := [target for target in targets if not any(ends(name, target) for name in names)]:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ModelError(f"{key}: no layer of the base is named {', '.join(missing)}; there are {there}")


def ends(name: str, target: str) -> bool:
    """Whether a module's name is a target or ends in it."""
    return name == target or name.endswith(f".{target}")
