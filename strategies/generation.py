"""Answers of a base with or without an adapter, to try what was trained."""

from collections.abc import Sequence

from protocol.adapter import Adapter
from protocol.plan import Plan
from strategies.adapted import with_adapter
from strategies.base_model import Base
from strategies.data.encode import prompt_ids


def answer(plan: Plan, base: Base, questions: Sequence[str], adapter: Adapter | None, max_new_tokens: int) -> list[str]:
    """Greedy answers, one question at a time through the chat template.

    Args:
        plan: Of objective sft; its precision holds the base.
        base: The frozen base.
        questions: What the user says.
        adapter: None for the base as it is.
        max_new_tokens: Longest answer.
    """
    import torch

    model, tokenizer = with_adapter(plan, base, adapter)
    answers = []
    for question in questions:
        ids = torch.tensor([prompt_ids([{"role": "user", "content": question}], tokenizer)], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip())
    return answers
