"""Who writes answers to prompts: a model on this machine, with or without an adapter, or an endpoint."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from protocol.files import read_stored
from protocol.plan import QUANTISED, Plan
from protocol.writer_settings import SecondModel, WriterSettings
from strategies.adapted import with_adapter
from strategies.base_model import find
from strategies.data.encode import prompt_ids
from strategies.data.formats import Message
from strategies.endpoint import Endpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Writer(Protocol):
    """Writes an answer to each prompt."""

    def __call__(self, prompts: Sequence[Sequence[Message]], *, seed: int = 0) -> list[str]:
        """One text for each conversation, in order; the same prompt may stand there several times.

        Args:
            prompts: Messages up to what is to be answered.
            seed: Where answers are drawn, the draw; on this machine the same gives the same.

        Raises:
            EndpointError: An endpoint gave no usable answer.
        """


def writer_of(settings: WriterSettings) -> Writer:
    """The writer that a plan names; a model on this machine is loaded here and stays in memory with the writer.

    Raises:
        ModelError, AdapterError: The model is not there, or does not write.
        ConfigurationError: The environment lacks the endpoint's key.
    """
    if settings.endpoint is None:
        return model_writer(
            *second_model(settings),
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
    endpoint = Endpoint(settings.endpoint)

    def write(prompts: Sequence[Sequence[Message]], *, seed: int = 0) -> list[str]:
        told = endpoint.answers(prompts, temperature=settings.temperature, max_tokens=settings.max_new_tokens, seed=seed)
        return [text.strip() for text in told]

    return write


def model_writer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
) -> Writer:
    """A writer of a model that is in memory already; temperature 0 takes the likeliest token."""

    def write(prompts: Sequence[Sequence[Message]], *, seed: int = 0) -> list[str]:
        ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
        made = continuations(
            model, tokenizer, ids, temperature=temperature, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
        )
        return [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in made]

    return write


def continuations(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
    **each: Sequence[Any],
) -> list[list[int]]:
    """Token ids that a model writes after each prompt, with the token that ends it; torch's own generator is left as it was.

    Args:
        model: A decoder in evaluation mode, with or without an adapter.
        tokenizer: For padding and the end.
        prompts: Token ids; what is written comes in their order, whatever batches they share.
        temperature: Of the draw from the whole distribution; 0 takes the likeliest.
        max_new_tokens: Longest.
        batch_size: Prompts at a time.
        seed: Of the draw.
        each: What else the model's ``generate`` is given, an entry for each prompt.
    """
    import torch

    draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    pad, ends = int(tokenizer.pad_token_id or 0), _ends(model, tokenizer)
    made: dict[int, list[int]] = {}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for places in _batches(prompts, batch_size, alike=_has_virtual_tokens(model)):
            part = [list(prompts[at]) for at in places]
            width = max(map(len, part))
            ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
            told = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(ends) or None,
                pad_token_id=pad,
                **draw,
                **{name: [values[at] for at in places] for name, values in each.items()},
            )[:, width:].tolist()
            for at, answer in zip(places, told, strict=True):
                made[at] = answer[: next((end + 1 for end, token in enumerate(answer) if token in ends), len(answer))]
    return [made[at] for at in range(len(prompts))]


def _batches(prompts: Sequence[Sequence[int]], size: int, *, alike: bool) -> Iterator[list[int]]:
    """Places of prompts of like length, longest first: what does not fit into memory shows at once."""
    batch: list[int] = []
    for at in sorted(range(len(prompts)), key=lambda at: -len(prompts[at])):
        if batch and (len(batch) == size or (alike and len(prompts[at]) != len(prompts[batch[0]]))):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def _has_virtual_tokens(model: Any) -> bool:
    """PEFT puts them before the padding, and counts positions from there: padded, the text would stand too far from them."""
    config = getattr(model, "active_peft_config", None)
    return config is not None and bool(config.is_prompt_learning)


def second_model(settings: SecondModel) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads a model on this machine beside the one that trains, ready for inference.

    Raises:
        ModelError, AdapterError: It is not there, is no decoder, or its adapter does not fit.
    """
    base = find(settings.base_model or "")
    method = "qlora" if settings.precision in QUANTISED else "lora"
    told = {"base_model": base.name, "method": method, "precision": settings.precision}
    plan = Plan.model_validate(told)
    if settings.adapter is None:
        return with_adapter(plan, base, None)
    stored = read_stored(Path(settings.adapter), base_digest=base.digest)
    return with_adapter(stored.on(plan), base, stored.adapter)


def _ends(model: Any, tokenizer: Any) -> set[int]:
    told = model.generation_config.eos_token_id
    return {token for token in (*(told if isinstance(told, list) else [told]), tokenizer.eos_token_id) if token is not None}
