"""Trained vectors before the text, through PEFT: soft prompts at the input, prefixes and deep prompts at every layer.

- ``prompt-tuning`` (Lester et al. 2021, arXiv:2104.08691): vectors like those of tokens, ``(tokens, width)``, before theirs.
- ``p-tuning-v2`` (Liu et al. 2022, arXiv:2110.07602, section 3.2): keys and values of every layer,
  ``(tokens, layers * 2 * width of the keys)``, trained as they are.
- ``prefix-tuning`` (Li and Liang 2021, arXiv:2101.00190, section 4.3): the same, made by a small network while they train.

What is kept, sent and averaged is the prompt itself; the network stays behind with the training that drew it, as in the paper
and in PEFT's files. It is far larger than what it makes, and a mean of networks makes no mean of their prefixes. So a training
that is sent a prefix begins at it and trains through a fresh network, as the paper found that it must: ``prefix = sent +
network - network as it was drawn``. Trained bare from the second round on, prefix-tuning would be p-tuning-v2 at a rate that
was chosen for the network (benchmarks/LOG.md).
"""

import inspect
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from protocol.adapter import Adapter
from protocol.errors import ModelError
from protocol.plan import Plan
from strategies.base_model import Base, heads
from strategies.methods import whole_modules
from strategies.methods.dense_tensors import check_names, put
from strategies.methods.frozen_base import prepared
from strategies.methods.method import NOTHING, Begun

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROMPT = "prompt_embeddings"  # PEFT's name, in front of which it puts none of its own


def attach(model: "PreTrainedModel", plan: Plan) -> "PeftModel":
    """Puts a drawn prompt before every text, and a trainable copy of the head in the head's place.

    Unlike with other methods the model no longer computes what the base computes. Logits of ``prompt-tuning`` hold the prompt's
    positions too, before the text's.

    Raises:
        ModelError: This base cannot take such a prompt, or has no room for it.
    """
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    model = prepared(model, plan)
    head = heads(model, plan.objective)
    _check_room(model, plan)
    config: Any
    if plan.method == "prompt-tuning":
        _check_pooling(model, plan)
        config = PromptTuningConfig(token_dim=model.get_input_embeddings().weight.shape[1], **_start(model, plan))
    else:
        _check_takes_keys(model, plan)
        projected = plan.method == "prefix-tuning"
        config = PrefixTuningConfig(prefix_projection=projected, encoder_hidden_size=plan.prompt.encoder_hidden_size)
    config.num_virtual_tokens = plan.prompt.num_virtual_tokens
    config.task_type = TaskType(plan.task_type)
    config.modules_to_save = head or None
    try:
        made: PeftModel = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"method {plan.method} and this base ({model.config.model_type}) do not go together: {error}"
        ) from None
    whole_modules.keep_in_fp32(made, head)
    return made


def load(model: "PeftModel", adapter: Adapter, *, fresh: bool = False) -> None:  # noqa: ARG001 - it has no directions
    """Puts an adapter in place; a network that made a prefix gives way to the prefix (``begin`` brings a fresh one).

    Raises:
        AdapterError: Names or shapes do not fit this model.
    """
    from peft import PrefixEncoder

    check_names("modules", adapter.factors, ())
    if PROMPT in adapter.dense and _by_network(model):
        _put_encoder(model, PrefixEncoder(replace(model.active_peft_config, prefix_projection=False)))
    put(dense(model), adapter.dense)


def begin(model: "PeftModel", plan: Plan, base: Base) -> Begun:  # noqa: ARG001 - it begins with no part of the base
    """Lets a network train the change to a prefix that was loaded; everything else trains as it is."""
    import torch
    from peft import PrefixEncoder

    if plan.method == "prefix-tuning" and not _by_network(model):
        sent = _encoder(model).embedding.weight.detach()
        _put_encoder(model, PrefixEncoder(model.active_peft_config))
        with torch.no_grad():
            rest = sent - _made(_encoder(model))
        _encoder(model).register_forward_hook(lambda module, inputs, made: rest + made)
    return NOTHING


def dense(model: "PeftModel") -> dict[str, Any]:
    """Prompt and head, under the name that PEFT's files give them; a prefix that a network makes is no parameter."""
    import torch

    encoder = _encoder(model)
    with torch.no_grad():
        prompt = _made(encoder) if _by_network(model) else encoder.embedding.weight
    return {PROMPT: prompt, **whole_modules.tensors(model)}


def _encoder(model: "PeftModel") -> Any:
    return model.prompt_encoder["default"]


def _made(encoder: Any) -> Any:
    """The prefix that a network makes: as a batch of one, which is how PEFT makes the one that it saves."""
    import torch

    tokens = encoder.embedding.weight
    return encoder(torch.arange(len(tokens), device=tokens.device)[None])[0]


def _put_encoder(model: "PeftModel", encoder: Any) -> None:
    model.prompt_encoder["default"] = encoder.to(_encoder(model).embedding.weight.device)


def _by_network(model: "PeftModel") -> bool:
    return bool(getattr(_encoder(model), "prefix_projection", False))


def _start(model: "PreTrainedModel", plan: Plan) -> dict[str, Any]:
    """A soft prompt begins as the embeddings of a text, or of drawn tokens (Lester et al., section 2.1)."""
    if plan.prompt.init_text is None:
        return {"prompt_tuning_init": "SAMPLE_VOCAB"}
    return {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": plan.prompt.init_text,
        "tokenizer_name_or_path": model.name_or_path,
    }


def _check_room(model: "PreTrainedModel", plan: Plan) -> None:
    """Bases that learnt a vector for each position have no more of them; a prompt takes its share."""
    limits = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if re.search(r"(^|\.)(\w*position\w*|wpe)$", name) and hasattr(module, "num_embeddings")
    ]
    tokens, longest = plan.prompt.num_virtual_tokens, plan.data.max_length
    if limits and longest + tokens > (room := min(*limits, model.config.max_position_embeddings)):
        raise ModelError(
            f"data.max_length: found {longest}, and the prompt takes {tokens} more of the {room} positions that the base has; "
            f"expected at most {room - tokens}"
        )


def _check_pooling(model: "PreTrainedModel", plan: Plan) -> None:
    """Decoders score a text at its last token, which they look for among token ids; behind a soft prompt they see none."""
    if plan.task_type == "SEQ_CLS" and "score" in dict(model.named_children()):
        raise ModelError(
            f"method prompt-tuning: {type(model).__name__} cannot tell padding from text behind a soft prompt, and would score "
            "padding; choose prefix-tuning, p-tuning-v2, or an encoder"
        )


def _check_takes_keys(model: "PreTrainedModel", plan: Plan) -> None:
    parts = (model, model.base_model)
    if not any("past_key_values" in inspect.signature(part.forward).parameters for part in parts):
        raise ModelError(
            f"method {plan.method}: {type(model).__name__} takes no keys and values from outside; choose prompt-tuning or lora"
        )
