"""Answers of a model, to try what was trained."""

from collections.abc import Sequence
from typing import Any

from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.data.encode import prompt_ids


def answer(plan: Plan, base: Base, questions: Sequence[str], adapter: Adapter | None, max_new_tokens: int) -> list[str]:
    """Greedy answers of a base that is loaded for them, with or without an adapter.

    Args:
        plan: Of objective sft; its precision holds the base.
        base: The frozen base.
        questions: What the user says.
        adapter: None for the base as it is.
        max_new_tokens: Longest answer.
    """
    return greedy(*with_adapter(plan, base, adapter), questions, max_new_tokens)


def greedy(model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers, one question at a time through the chat template."""
    return [continued(model, tokenizer, [question], max_new_tokens)[0] for question in questions]


def continued(model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int, **more: Any) -> list[str]:
    """Greedy answers to questions in one batch, padded on the left; ``more`` goes to the model's ``generate``."""
    import torch

    rows = [prompt_ids([{"role": "user", "content": question}], tokenizer) for question in questions]
    longest, pad = max(map(len, rows)), tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            **more,
        )
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)).strip() for row in made]
