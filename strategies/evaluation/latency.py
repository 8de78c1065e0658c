"""How fast a model answers one person: seconds to the first token, and tokens per second after it."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from strategies.evaluation.figures import Figure, ratio

PROMPTS = 8
_NEW_TOKENS = 32


class _Clock:
    """A transformers streamer that notes when each token is there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Any) -> None:  # noqa: ARG002 - the first is the prompt
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        pass


def figures(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int = _NEW_TOKENS) -> dict[str, Figure]:
    """Times greedy answers, one prompt at a time after a warm-up; every model writes as many tokens, whatever they say.

    Args:
        model: A decoder in evaluation mode, with or without an adapter.
        tokenizer: For padding.
        prompts: Token ids; the first ``PROMPTS`` are timed, and the others add nothing to the figures.
        new_tokens: Of each answer, at least 2.

    Returns:
        ``time-to-first-token``: mean seconds from the call to the first new token (reading the prompt, and one step).
        ``tokens-per-second``: of all later ones. Both of this machine, at batch size 1.
    """
    _times(model, tokenizer, prompts[0], new_tokens)
    first, rest, timed = np.zeros((3, len(prompts)))
    for at, prompt in enumerate(prompts[:PROMPTS]):
        first[at], rest[at] = _times(model, tokenizer, prompt, new_tokens)
        timed[at] = 1
    return {
        "time-to-first-token": ratio(first, timed, "lower", "seconds"),
        "tokens-per-second": ratio(timed * (new_tokens - 1), rest, unit="tokens/second"),
    }


def _times(model: Any, tokenizer: Any, prompt: Sequence[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first new token, and from there to the last."""
    import torch

    ids, clock = torch.tensor([list(prompt)], device=model.device), _Clock()
    begin = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=int(tokenizer.pad_token_id or 0),
            streamer=clock,
        )
    _, first, *_, last = clock.seconds
    return first - begin, last - first
