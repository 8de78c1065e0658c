"""Where the rewards of reinforcement learning come from: a model that scores answers, a judge, or functions by name."""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import ConfigurationError, ModelError
from protocol.files import base_model_of, read_stored
from protocol.formats import CONFIG
from protocol.plan import QUANTISED, Plan
from strategies.adapted import with_adapter
from strategies.base_model import configuration, find, load
from strategies.data.encode import answered_ids
from strategies.data.formats import Message
from strategies.judge import judge_of
from strategies.methods.registry import shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# From prompts (messages) and an answer to each, a number for each; more is better.
Reward = Callable[[Sequence[Sequence[Message]], Sequence[str]], list[float]]


def rewards_of(plan: Plan) -> list[Reward]:
    """What a plan's ``rl`` section names; an answer's reward is their sum.

    Raises:
        ConfigurationError: There is no such function.
        ModelError, AdapterError: What is named as a model does not score.
    """
    settings = plan.rl
    found = [_function(name) for name in settings.reward_functions]
    if settings.judge:
        found.append(judge_of(settings.judge).score)
    return [*found, _model(settings.reward_model, plan)] if settings.reward_model else found


def scores(model: Any, texts: Sequence[Sequence[int]], pad: int, batch_size: int) -> list[float]:
    """What a model with one output says of each text.

    Args:
        model: A sequence classifier, with or without an adapter, in evaluation mode.
        texts: Token ids.
        pad: The padding token, which the model looks for to find a text's end.
        batch_size: Texts that are read at once; those of like length go together.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    found: dict[int, float] = {}
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    with torch.inference_mode():
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            ids = [torch.tensor(list(texts[at])) for at in part]
            batch = pad_sequence(ids, batch_first=True, padding_value=pad).to(model.device)
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
            logits = model(input_ids=batch, attention_mask=mask).logits
            found |= dict(zip(part, logits[:, 0].double().tolist(), strict=True))
    return [found[at] for at in range(len(texts))]


def _function(name: str) -> Reward:
    module, _, attribute = name.partition(":")
    where = f"rl.reward_functions: {name!r}"
    try:
        function = getattr(importlib.import_module(module), attribute, None) if module and attribute else None
    except ImportError as error:
        raise ConfigurationError(
            "plan", [f"{where}: no module {module!r} ({type(error).__name__}); put its folder on PYTHONPATH"]
        ) from None
    if not callable(function):
        raise ConfigurationError("plan", [f"{where}: no function of that name; expected module:function"])

    def reward(prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        made = [float(value) for value in function(list(prompts), list(answers))]
        if len(made) != len(answers) or not all(map(math.isfinite, made)):
            raise ConfigurationError(
                "plan", [f"{where}: {len(made)} number(s) for {len(answers)} answers; expected a finite one for each"]
            )
        return made

    return reward


def _model(name: str, plan: Plan) -> Reward:
    model, tokenizer = _adapted(Path(name), plan) if (Path(name) / CONFIG).is_file() else _classifier(name, plan)
    pad = int(tokenizer.pad_token_id or 0)

    def reward(prompts: Sequence[Sequence[Message]], answers: Sequence[str]) -> list[float]:
        texts = [answered_ids(prompt, answer, tokenizer) for prompt, answer in zip(prompts, answers, strict=True)]
        return scores(model, texts, pad, plan.training.batch_size)

    return reward


def _adapted(folder: Path, plan: Plan) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    base = find(base_model_of(folder))
    stored = read_stored(folder, base_digest=base.digest)
    reader = stored.on(_reader(base.name, plan))
    if missing := shape(base, reader).head - stored.adapter.dense.keys():
        raise ModelError(
            f"rl.reward_model: {folder} holds no {', '.join(sorted(missing))}; expected an adapter of objective reward"
        )
    return with_adapter(reader, base, stored.adapter)


def _classifier(name: str, plan: Plan) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    base = find(name)
    config = configuration(base)
    built = getattr(config, "architectures", None) or ()
    if not any(kind.endswith("ForSequenceClassification") for kind in built) or config.num_labels != 1:
        raise ModelError(
            f"rl.reward_model: {name!r} is built as {', '.join(built) or 'nothing that it names'} with {config.num_labels} "
            "output(s); expected a sequence classifier with one, or the folder of an adapter of objective reward"
        )
    return load(base, _reader(name, plan))


def _reader(name: str, plan: Plan) -> Plan:
    """The plan of a reward model that is held as the policy's base is."""
    method = "qlora" if plan.precision in QUANTISED else "lora"
    return Plan.model_validate({"base_model": name, "objective": "reward", "method": method, "precision": plan.precision})
