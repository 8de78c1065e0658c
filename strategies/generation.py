"""Answers of a model, to try what was trained."""

from collections.abc import Sequence
from typing import Any

from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.data.encode import prompt_ids
from strategies.writer import continuations


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


def greedy(
    model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int, batch_size: int = 1, **each: Any
) -> list[str]:
    """Greedy answers to questions through the chat template; ``each`` as in ``strategies.writer.continuations``."""
    rows = [prompt_ids([{"role": "user", "content": question}], tokenizer) for question in questions]
    made = continuations(model, tokenizer, rows, max_new_tokens=max_new_tokens, batch_size=batch_size, **each)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in made]
