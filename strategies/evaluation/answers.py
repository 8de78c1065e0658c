"""Greedy answers to many prompts at once: prompts of like length share a batch, padded on the left."""

from collections.abc import Iterator, Sequence
from typing import Any

from strategies.writer import continuations


def greedy(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """The likeliest token after token, with the one that ends an answer.

    The base's own ``generation_config`` holds, but for drawing (a repetition penalty does).

    Args:
        model: A decoder in evaluation mode, with or without an adapter.
        tokenizer: For padding and the end.
        prompts: Token ids; answers come in their order.
        max_new_tokens: Longest answer.
        batch_size: Prompts at a time.
    """
    found: dict[int, list[int]] = {}
    for places in _batches(prompts, batch_size, alike=_has_virtual_tokens(model)):
        part = [prompts[at] for at in places]
        made = continuations(
            model, tokenizer, part, temperature=0.0, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=0
        )
        found |= dict(zip(places, made, strict=True))
    return [found[at] for at in range(len(prompts))]


def _batches(prompts: Sequence[Sequence[int]], size: int, *, alike: bool) -> Iterator[list[int]]:
    """Places of prompts that go together, longest first: what does not fit into memory shows at once."""
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
