"""Modules that train whole beside an adapter, as PEFT's ``modules_to_save``: a classifier's head and what the plan names."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from strategies.methods import float32

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_KEPT = "modules_to_save.default"


def prefix(model: "PeftModel") -> str:
    """What PEFT puts before the names of the base's own modules."""
    return "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."


def tensors(model: "PeftModel") -> dict[str, Any]:
    """Their parameters, under the name that PEFT's files give them."""
    found = ((name, tensor) for name, tensor in model.named_parameters() if _KEPT in name)
    return {name.removeprefix(prefix(model)).replace(f".{_KEPT}", ""): tensor for name, tensor in found}


def inside(modules: Sequence[str]) -> str | None:
    """A regular expression for modules and all within them: what trains whole needs no adapter."""
    return rf"({'|'.join(re.escape(module) for module in modules)})(\..*)?" if modules else None


def beside(model: "PreTrainedModel", modules: Sequence[str]) -> list[str]:
    """Holds modules of a base without PEFT's wrapping in float32 and lets them train; returns the names of their parameters."""
    names = []
    for module in modules:
        part = model.get_submodule(module)
        float32.whole(part)
        part.requires_grad_(True)
        names += [f"{module}.{name}" for name, _ in part.named_parameters()]
    return names


def keep_in_fp32(model: "PeftModel", head: Sequence[str]) -> None:
    """In bfloat16 or float16 small updates would be lost; PEFT keeps only what it adds in float32.

    What follows an embedding or a norm is held as the base is; after the head comes the loss, which wants float32.

    Args:
        model: With an adapter attached.
        head: The modules among them that are a head of the task's own.
    """
    for name, module in model.named_modules():
        if not name.endswith(_KEPT):
            continue
        held = next(module.parameters()).dtype
        float32.whole(module)
        if name.removeprefix(prefix(model)).partition(".")[0] not in head:
            module.register_forward_hook(lambda module, inputs, output, held=held: output.to(held))
